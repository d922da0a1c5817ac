"""Attention over one rectangle of keys, returning what a merge needs: the output and its log-sum-exp.

The query heads that share a KV head are folded into the rows of one matrix product, and the query rows are walked in
blocks, so neither a repeated copy of the keys nor a rows x keys score matrix ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvlib.kernels import fused, host
from kvlib.kernels.decode import ROWS, decode, serves
from kvlib.kernels.prefill_sparse import prefill_sparse
from kvlib.kernels.prefill_sparse import serves as walks
from kvlib.kernels.ran import note
from kvlib.kernels.take import take

# Elements of one block of scores: small enough to stay in a core's cache, large enough to keep the product efficient.
_BLOCK_ELEMENTS = 2**22
_BLOCK_ROWS = 64


@dataclass(frozen=True)
class Visible:
    """Which keys a query row sees.  Query row i of n stands at key index T - n + i.

    causal: keys after the row's own index are hidden.
    start:  [B] first key of each batch row, or None for 0; earlier slots are padding.
    length: number of keys of each batch row [B], or of each KV head [B, H], counted from slot 0, or None for all T.
    window: only the newest `window` keys (the row's own included) are seen, besides the first `sink` from `start`
            (one number, or [B] per batch row).
    mask:   [B, 1, H or Hq, n, T], True or 0 where visible, False or a negative number (added) elsewhere.
    """

    causal: bool = False
    start: Tensor | None = None
    length: Tensor | None = None
    window: int | None = None
    sink: int | Tensor = 0
    mask: Tensor | None = None

    @property
    def is_length(self) -> bool:
        """Whether nothing but a length says what is seen."""
        return not self.causal and self.start is None and self.window is None and self.mask is None

    @property
    def may_hide_all(self) -> bool:
        """Whether some row may see no key at all."""
        return self.start is not None or self.length is not None or self.mask is not None


EVERYTHING = Visible()


class Partial(NamedTuple):
    """Attention over some of a sequence's keys.

    out [B, Hq, n, dv] fp32, softmax-normalised over these keys; lse [B, Hq, n] fp32, natural log, or None where it was not
    asked for; p [B, Hq, T] fp32, the probabilities of a single query row, or None where they were not asked for.
    """

    out: Tensor
    lse: Tensor | None
    p: Tensor | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    visible: Visible = EVERYTHING,
    softcap: float | None = None,
    lse: bool = True,
    probabilities: bool = False,
) -> Partial:
    """Softmax attention of q over k, v; with `lse` also the natural-log sum of exp of its scaled logits.

    q [B, Hq, n, d], k [B, H, T, d], v [B, H, T, dv] with Hq a multiple of H.  A row that sees no key gives (0, -inf), the
    identity of `merge`.  `probabilities` are to be had for n = 1 only.
    """
    found = _by_kernel(q, k, v, scale, visible, softcap, probabilities)
    if found is not None:
        return found
    batch, q_heads, n, _ = q.shape
    heads, dv = k.shape[1], v.shape[-1]
    note("decode" if n * (q_heads // heads) <= ROWS else "prompts", "torch")
    values = v.flatten(0, 1)
    outs, lses = [], []
    p = k.new_empty(0)
    for i, j, lo, hi, s in blocked_scores(q, k, scale, visible, softcap):
        p = s.softmax(-1)
        if visible.may_hide_all:
            p.nan_to_num_(0.0)
        rows = p.to(v.dtype).flatten(1, 2)
        outs.append(torch.bmm(rows, values[:, lo:hi]).view(batch * heads, -1, j - i, dv))
        if lse:
            lses.append(_lse(s, p, visible.may_hide_all))
    out = (outs[0] if len(outs) == 1 else torch.cat(outs, 2)).float().view(batch, q_heads, n, dv)
    total = None
    if lse:
        total = (lses[0] if len(lses) == 1 else torch.cat(lses, 2)).view(batch, q_heads, n)
    return Partial(out, total, p.view(batch, q_heads, -1) if probabilities else None)


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visible, softcap: float | None, probabilities: bool
) -> Partial | None:
    """The same by a kernel of one pass, where there is one for it: few query rows, or a prompt on a GPU."""
    n, keys = q.shape[2], k.shape[2]
    if visible.mask is not None or (visible.causal and visible.length is not None) or not keys:
        return None
    start, length = visible.start, visible.length
    banded = visible.window is not None and visible.window < keys
    if n * (q.shape[1] // k.shape[1]) > ROWS or (banded and (n > 1 or isinstance(visible.sink, Tensor) or visible.sink)):
        return None if probabilities else _prompt(q, k, v, scale, visible, softcap)
    if banded:
        assert visible.window is not None
        beyond = keys - visible.window
        k, v = k[:, :, beyond:], v[:, :, beyond:]
        start = None if start is None else (start - beyond).clamp_(min=0)
        length = None if length is None else (length - beyond).clamp_(min=0)
    causal = visible.causal and n > 1
    if q.is_cuda and not probabilities and serves(q, k, v):
        count = length
        if start is not None:
            many = length is not None and length.dim() > 1
            count = (k.shape[2] if length is None else length) - (start.unsqueeze(1) if many else start)
        count = None if count is None else count.clamp(min=0).int()
        return Partial(*decode(q, k, v, scale, softcap or 0.0, causal, length=count, start=start))
    if host.serves(q, k, v):
        return Partial(
            *host.decode(
                q, k, v, scale, start=start, length=length, causal=causal, softcap=softcap, probabilities=probabilities
            )
        )
    return None


def _prompt(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Visible, softcap: float | None) -> Partial | None:
    """Many query rows on a GPU: all keys by somebody else's kernel; a window, padding and what that refuses by ours."""
    if not q.is_cuda or visible.length is not None:
        return None
    window = k.shape[2] if visible.window is None else min(visible.window, k.shape[2])
    if window == k.shape[2] and visible.start is None and fused.serves(q, k, v, softcap):
        note("prompts", fused.describe())
        out, lse = fused.fused(q, k, v, scale, softcap, visible.causal)
        return Partial(out.float(), lse)
    if not (visible.causal and isinstance(visible.sink, int) and walks(q, k, v)):
        return None
    found = prefill_sparse(q, k, v, scale, 128, softcap or 0.0, window=window, sink=visible.sink, start=visible.start)
    return Partial(*found)


def attend_listed(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, scale: float, visible: Visible = EVERYTHING, softcap: float | None = None
) -> Partial:
    """Attention of q [B, Hq, n, d] over the entries ids [B, H', m] of k [B, H, T, d] and v [B, H, T, dv], H' as in `take`;
    of `visible` its length [B] or [B, H']."""
    if host.serves(q, k, v) if not q.is_cuda else serves(q, k, v):
        length = None if visible.length is None else visible.length.int()
        return Partial(*decode(q, k, v, scale, softcap or 0.0, length=length, ids=ids))
    k, v = (take(x, ids, k.shape[1]) for x in (k, v))
    return attention(q, k, v, scale, visible, softcap)


def attend_scores(s: Tensor, visible: Visible, softcap: float | None, heads: int) -> tuple[Tensor, Tensor]:
    """Probabilities [B, Hq, n, T] and log-sum-exp [B, Hq, n] of scaled logits s [B, Hq, n, T] fp32 over `heads` KV heads;
    s is overwritten."""
    batch, q_heads, n, keys = s.shape
    if softcap is not None:
        s = s.div_(softcap).tanh_().mul_(softcap)
    if visible is not EVERYTHING:
        _hide(s.view(batch, heads, q_heads // heads, n, keys), visible, keys - n, 0, (0, n, keys))
    p = s.softmax(-1)
    if visible.may_hide_all:
        p.nan_to_num_(0.0)
    return p, _lse(s, p, visible.may_hide_all)


def _lse(s: Tensor, p: Tensor, may_hide_all: bool) -> Tensor:
    """Log-sum-exp of logits s from their softmax p: the largest probability is 1 / sum(exp(s - max))."""
    lse = s.amax(-1) - p.amax(-1).log_()
    return lse.nan_to_num_(nan=float("-inf"), neginf=float("-inf")) if may_hide_all else lse


def blocked_scores(
    q: Tensor, k: Tensor, scale: float, visible: Visible, softcap: float | None = None
) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Walk the query rows in blocks: yields (i, j, lo, hi, s) with s [B * H, g, j - i, hi - lo] the fp32 logits of
    rows i..j over keys lo..hi, hidden ones -inf.  Keys outside lo..hi are invisible to the whole block."""
    batch, q_heads, n, d = q.shape
    heads, keys = k.shape[1], k.shape[2]
    group = q_heads // heads
    q = q.reshape(batch * heads, group, n, d)
    k = k.flatten(0, 1)
    step = max(16, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, batch * q_heads * keys)))
    for i in range(0, n, step):
        j = min(n, i + step)
        lo, hi = _key_range(visible, keys - n + i, keys - n + j, keys)
        rows = q if j - i == n else q[:, :, i:j]
        s = _product(rows.reshape(batch * heads, group * (j - i), d), k[:, lo:hi].transpose(1, 2), scale)
        s = s.view(batch * heads, group, j - i, hi - lo)
        if softcap is not None:
            s = s.div_(softcap).tanh_().mul_(softcap)
        if visible is not EVERYTHING:
            _hide(s.view(batch, heads, group, j - i, hi - lo), visible, keys - n + i, lo, (i, j, keys))
        yield i, j, lo, hi, s


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Scaled matrix products in fp32 (on CPU in half precision: rounded to it once)."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32).mul_(scale)
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale).float()


def _key_range(visible: Visible, first: int, last: int, keys: int) -> tuple[int, int]:
    """Keys that some row of a block, standing at indices first..last - 1, may see."""
    no_sink = isinstance(visible.sink, int) and visible.sink == 0
    lo = max(0, first - visible.window + 1) if visible.window is not None and no_sink else 0
    return lo, (last if visible.causal else keys)


def _hide(s: Tensor, visible: Visible, first: int, lo: int, block: tuple[int, int, int]) -> None:
    """Set hidden logits of s [B, H, g, m, e] to -inf; rows stand at key indices first.., keys at lo..."""
    m, e = s.shape[-2:]
    device, inf = s.device, float("-inf")
    if visible.causal and m > 1:  # only the block's own triangle can lie in the future
        s[..., e - m :].masked_fill_(torch.ones(m, m, dtype=torch.bool, device=device).triu_(1), inf)
    if visible.start is not None or visible.length is not None or visible.window is not None:
        key = torch.arange(lo, lo + e, device=device)
        if visible.start is not None:
            s.masked_fill_((key < visible.start[:, None])[:, None, None, None], inf)
        if visible.length is not None:
            s.masked_fill_((key >= visible.length.view(len(visible.length), -1, 1))[:, :, None, None], inf)
        if visible.window is not None and e > visible.window - m + 1:
            row = torch.arange(first, first + m, device=device)[:, None]
            far = key <= row - visible.window
            begin = torch.zeros(1, dtype=torch.long, device=device) if visible.start is None else visible.start
            far = far & (key >= (begin + visible.sink)[:, None, None])
            s.masked_fill_(far[:, None, None], inf)
    if visible.mask is not None:
        i, j, keys = block
        mask = visible.mask[:, :, i:j, lo : min(lo + e, keys)]
        mask = mask.reshape(len(mask), s.shape[1], -1, *mask.shape[2:]) if mask.shape[1] > 1 else mask[:, :, None]
        if mask.dtype == torch.bool:
            s.masked_fill_(~mask, inf)
        else:
            s.add_(mask)
