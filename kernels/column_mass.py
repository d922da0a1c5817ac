"""Attention probability that each key collects, by the two-pass form: no rows x keys matrix is ever held."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlib.kernels.attention import EVERYTHING, Visible, blocked_scores


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, visible: Visible = EVERYTHING, softcap: float | None = None
) -> Tensor:
    """Sum over the query rows, and over the query heads of each KV head, of exp(logit - lse).

    q [B, Hq, n, d], k [B, H, T, d]; lse [B, Hq, n] over *all* keys the rows attended, of which k may be a part, and +inf
    for rows that do not count (padding).  Returns [B, H, T] fp32.
    """
    batch, heads, keys = k.shape[:3]
    lse = lse.reshape(batch * heads, -1, q.shape[2], 1)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # a row that saw no key gives no key any mass
    mass = torch.zeros(batch * heads, keys, device=q.device)
    for i, j, lo, hi, s in blocked_scores(q, k, scale, visible, softcap):
        mass[:, lo:hi] += s.sub_(lse[:, :, i:j]).exp_().sum((1, 2))
    return mass.view(batch, heads, keys)
