"""Merge partial attention outputs over disjoint sets of keys into the attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvlib.kernels.attention import Partial


def merge(parts: Sequence[Partial], sinks: Tensor | None = None) -> Partial:
    """Exact n-way merge of partial results over disjoint keys; each but a lone one needs its lse.

    A part over no keys is (0, -inf), the identity; if every part is empty so is the result.  `sinks` [Hq] are a model's
    own attention sinks (gpt-oss): logits that take probability and carry no value.  Source: arXiv 2402.05099.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0]
    lses = [part.lse for part in parts if part.lse is not None]
    if len(lses) != len(parts):
        raise ValueError("parts can be merged by their log-sum-exp only: ask attention for lse")
    if sinks is not None:
        lses.append(sinks.float().view(1, -1, 1).expand_as(lses[0]))
    stacked = torch.stack(lses)
    top = stacked.amax(0).clamp_min_(torch.finfo(torch.float32).min)
    weights = (stacked - top).exp_()
    total = weights.sum(0)
    weights /= total.clamp_min(1e-37)
    out = weights[0].unsqueeze(-1) * parts[0].out
    for weight, part in zip(weights[1:], parts[1:], strict=False):  # the sinks' weight has no part: no value
        out.addcmul_(weight.unsqueeze(-1), part.out)
    return Partial(out, top + total.log())


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
