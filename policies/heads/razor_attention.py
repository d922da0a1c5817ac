"""Induction probe: a training-free score of how much a head retrieves, arXiv 2407.15891 (RazorAttention)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlib.kernels.attention import Visible, blocked_scores

REPEATS = 4  # the probe text: one random block, four times


def induction(
    q: Tensor, k: Tensor, scale: float, period: int, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Mean attention paid to the token after an earlier copy of the present one, per KV head: [B, H] in [0, 1].

    q [B, Hq, n, d], k [B, H, n, d] of a text of n = 1 + REPEATS * period tokens: a first token, then a block of `period`
    tokens repeated.  The score of a KV head is the highest of its query heads.
    """
    batch, q_heads, n, _ = q.shape
    heads = k.shape[1]
    total = torch.zeros(batch * heads, q_heads // heads, device=q.device)
    for i, j, _, hi, s in blocked_scores(q, k, scale, Visible(causal=True), softcap):
        if j <= 1 + period:
            continue
        if sinks is None:
            p = s.softmax(-1)
        else:  # a model's own sinks [Hq] take their share and carry nothing
            extra = sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, s.shape[2], 1).reshape(*s.shape[:3], 1)
            p = torch.cat([s, extra], -1).softmax(-1)[..., :-1]
        row = torch.arange(max(i, 1 + period), j, device=q.device)
        for m in range(1, REPEATS):
            column = row - m * period + 1
            seen = (column >= 2) & (column < hi)  # the copy itself lies behind the first token
            total += p[:, :, row[seen] - i, column[seen]].sum(-1)
    return (total / (n - 1 - period)).view(batch, heads, -1).amax(-1)
