"""Merge partial attention outputs over disjoint sets of keys into the attention over their union."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvlib.kernels.attention import Partial
from kvlib.kernels.launch import Example, jit, power, tl
from kvlib.kernels.ops import register

_PARTS = 8  # that one launch reads
_ROWS = 4  # query rows of one program


@jit(do_not_specialize=["rows", "n"])
def merge_rows(
    OUTS,  # a tuple of pointers, one per part
    LSES,
    SINKS,
    OUT,
    LSE,
    rows,
    n,
    stride_b,
    stride_h,
    stride_n,
    stride_lb,
    stride_lh,
    stride_ln,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A few query rows over all parts; what a part without keys holds as its output is read but selected away."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dv = tl.arange(0, BLOCK_DV)
    live = r < rows
    b = (r // (HEADS * n)).to(tl.int64)
    h = r // n % HEADS
    at = b * stride_b + h.to(tl.int64) * stride_h + (r % n).to(tl.int64) * stride_n
    lse_at = b * stride_lb + h.to(tl.int64) * stride_lh + (r % n).to(tl.int64) * stride_ln
    inside = live[:, None] & (dv < DV)[None, :]

    if SINKS is None:
        sink = tl.full([BLOCK_R], float("-inf"), tl.float32)
    else:
        sink = tl.load(SINKS + h, mask=live, other=0.0).to(tl.float32)
    top = sink
    for p in tl.static_range(len(LSES)):
        top = tl.maximum(top, tl.load(LSES[p] + lse_at, mask=live, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2((sink - safe) * 1.4426950408889634)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for p in tl.static_range(len(LSES)):
        x = tl.load(LSES[p] + lse_at, mask=live, other=float("-inf"))
        weight = tl.exp2((x - safe) * 1.4426950408889634)
        o = tl.load(OUTS[p] + at[:, None] + dv[None, :], mask=inside, other=0.0)
        acc += tl.where((weight == 0.0)[:, None], 0.0, weight[:, None] * o)
        total += weight
    dead = total == 0.0
    whole = tl.where(dead, 1.0, total)
    place = r.to(tl.int64)
    tl.store(OUT + place[:, None] * DV + dv[None, :], acc / whole[:, None], mask=inside)
    tl.store(LSE + place, tl.where(dead, float("-inf"), safe + tl.log2(whole) * 0.6931471805599453), mask=live)


def launched(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launch `merge_rows`, once for up to 8 parts; arguments as of `merge_parts`."""
    batch, heads, n, dv = outs[0].shape
    rows = batch * heads * n
    out = outs[0].new_empty((batch, heads, n, dv))
    lse = outs[0].new_empty((batch, heads, n))
    if rows == 0:
        return out, lse
    given, given_lse = _alike(outs[:_PARTS]), _alike(lses[:_PARTS])
    if given[0].stride(3) != 1:
        given = [x.contiguous() for x in given]
    merge_rows[(-(-rows // _ROWS),)](
        tuple(given),
        tuple(given_lse),
        None if sinks is None else sinks.contiguous(),
        out,
        lse,
        rows,
        n,
        *given[0].stride()[:3],
        *given_lse[0].stride(),
        HEADS=heads,
        DV=dv,
        BLOCK_R=_ROWS,
        BLOCK_DV=power(dv),
        num_warps=4,
    )
    return launched([out, *outs[_PARTS:]], [lse, *lses[_PARTS:]]) if len(outs) > _PARTS else (out, lse)


def _alike(xs: Sequence[Tensor]) -> list[Tensor]:
    """The same values, all with the same strides."""
    same = all(x.stride() == xs[0].stride() for x in xs)
    return list(xs) if same else [x.contiguous() for x in xs]


def weighted(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in torch; arguments as of `merge_parts`."""
    every = [*lses] if sinks is None else [*lses, sinks.float().view(1, -1, 1).expand_as(lses[0])]
    stacked = torch.stack(every)
    top = stacked.amax(0).clamp_min_(torch.finfo(torch.float32).min)
    weights = (stacked - top).exp_()
    total = weights.sum(0)
    weights /= total.clamp_min(1e-37)
    nothing = stacked.isneginf()
    if nothing.any():
        outs = [o.masked_fill(none.unsqueeze(-1), 0.0) for o, none in zip(outs, nothing, strict=False)]
    out = weights[0].unsqueeze(-1) * outs[0]
    for weight, o in zip(weights[1:], outs[1:], strict=False):  # the sinks' weight has no part: no value
        out.addcmul_(weight.unsqueeze(-1), o)
    return out, top + total.log()


def _fake(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


merge_parts = register(
    "merge(Tensor[] outs, Tensor[] lses, Tensor? sinks=None) -> (Tensor, Tensor)",
    cpu=weighted,
    cuda=launched,
    fake=_fake,
)
"""`merge` on tensors: outs [B, Hq, n, dv] fp32 with their lses [B, Hq, n] fp32, in any strides, and sinks [Hq] of any float
dtype; returns out and lse.  Where a lse is -inf the output beside it is never multiplied in, whatever it holds."""


def merge(parts: Sequence[Partial], sinks: Tensor | None = None) -> Partial:
    """Exact n-way merge of partial results over disjoint keys; each but a lone one needs its lse.

    A part over no keys has lse = -inf and is the identity; if every part is such, the result is (0, -inf).  `sinks` [Hq]
    are a model's own attention sinks (gpt-oss): logits that take probability and carry no value.  Raises ValueError where a
    lse is missing.  Source: arXiv 2402.05099.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0]
    lses = [part.lse for part in parts if part.lse is not None]
    if len(lses) != len(parts):
        raise ValueError("parts can be merged by their log-sum-exp only: ask attention for lse")
    return Partial(*merge_parts([part.out for part in parts], lses, sinks))


def merge_segments(out: Tensor, lse: Tensor, segment: Tensor, segments: int) -> Partial:
    """Merge the pieces of each segment: out [G, g, n, dv], lse [G, g, n], segment [G] in 0..segments - 1.

    Returns [segments, g, n, dv] and [segments, g, n]; a segment without pieces is the identity (0, -inf).
    """
    shape = (segments, *lse.shape[1:])
    index = segment.view(-1, 1, 1).expand_as(lse)
    top = torch.full(shape, torch.finfo(torch.float32).min, device=lse.device)
    top.scatter_reduce_(0, index, lse, "amax")
    weight = (lse - top[segment]).exp_()
    total = torch.zeros(shape, device=lse.device).index_add_(0, segment, weight)
    merged = torch.zeros((*shape, out.shape[-1]), device=lse.device)
    merged.index_add_(0, segment, out * weight.unsqueeze(-1))
    return Partial(merged / total.clamp_min(1e-37).unsqueeze(-1), top + total.log())


def examples() -> Iterator[Example]:
    """Launches to compile: what a decode step merges first, then more parts, other heads, sinks."""
    for parts, dv, n, sunk in (
        (2, 128, 1, False),
        (8, 128, 1, False),
        (3, 64, 16, True),
        (4, 80, 1, False),
        (2, 256, 8, True),
    ):
        outs, lses = [torch.empty(1, 32, n, dv)] * parts, [torch.empty(1, 32, n)] * parts
        sinks = torch.empty(32) if sunk else None

        def launch(outs: list[Tensor] = outs, lses: list[Tensor] = lses, sinks: Tensor | None = sinks) -> object:
            return launched(outs, lses, sinks)

        yield Example(f"{parts} parts, d {dv}, n {n}{', sinks' if sunk else ''}", launch)
