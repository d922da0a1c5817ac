"""Attention over codes of a few bits where they lie: one function, whatever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from kvlib.kernels import host
from kvlib.kernels.attention import Partial
from kvlib.kernels.decode_q4 import decode_q4
from kvlib.kernels.host import Codes
from kvlib.kernels.ran import note

__all__ = ["Codes", "attend_codes", "code_scores", "code_sums"]


def attend_codes(
    q: Tensor,
    k: Tensor | Codes,
    v: Tensor | Codes,
    ids: Tensor | None,
    length: Tensor | None,
    scale: float,
    softcap: float | None,
    probabilities: bool = False,
) -> Partial | None:
    """Attention of q [B, Hq, n, d] fp32 over keys and values [B, H, T, .], either of which may be codes: of all tokens, or
    of those of ids [B, H', m], of each row or list the first length [B] or [B, H']; None where no kernel takes them.
    `probabilities` as of `attention`."""
    if q.is_cuda:
        if probabilities or not isinstance(k, Codes) or not isinstance(v, Codes) or not _launched(q, k, v):
            return None
        note("codes", "Triton")
        count = None if length is None else length.int()
        found = decode_q4(q, k.codes, k.range, v.codes, v.range, scale, k.span, softcap or 0.0, length=count, ids=ids)
        return Partial(*found)
    if host.serves(q, k, v):
        return Partial(
            *host.decode_codes(q, k, v, scale, length=length, ids=ids, softcap=softcap, probabilities=probabilities)
        )
    return None


def _launched(q: Tensor, k: Codes, v: Codes) -> bool:
    """Whether `decode_q4` takes these: heads of a power of two, ranges of keys per token or channel, those of values for
    32 channels or more, as the kernel keeps them in registers; ranges and values that it can read as words."""
    d, groups = q.shape[3], v.range.shape[-1]
    if not all(_in_pairs(x) for x in (k.range, v.range, v.codes)):
        return False
    whole = d == v.size and d in (32, 64, 128, 256) and groups & (groups - 1) == 0 and d >= 32 * groups
    return whole and (k.span > 1 or k.range.shape[-1] == 1)


def _in_pairs(x: Tensor) -> bool:
    """Whether tokens of x [B, H, T, ...] begin at even elements, so that two can be read as one word."""
    return not any(step % 2 for step in (*x.stride()[:3], x.storage_offset()))


def code_scores(q: Tensor, planes: Sequence[Codes]) -> Tensor | None:
    """Products [B, Hq, n, T] fp32 of q [B, Hq, n, d] with keys that are the sum of `planes`; None where no kernel reads
    them."""
    q = q.float()
    if not all(host.serves(q, k, None) for k in planes):
        return None
    return reduce(torch.Tensor.add_, (host.scores(q, k) for k in planes))


def code_sums(p: Tensor, planes: Sequence[Codes]) -> Tensor | None:
    """Values [B, Hq, n, d] fp32, the sum of `planes`, under weights p [B, Hq, n, T]; None where no kernel reads them."""
    if not all(host.serves(p.new_empty((1, 1, 1, v.size)), v, v) for v in planes):
        return None
    return reduce(torch.Tensor.add_, (host.weighted_sum(p.float().contiguous(), v) for v in planes))
