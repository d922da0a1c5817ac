"""Entries of ragged buffers, picked one by one for each head."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, ids: Tensor, heads: int) -> Tensor:
    """Entries ids [B, H', m] of x [B, heads or 1, T, ...]: [B, max(heads, H'), m, ...]."""
    batch, lists, m = ids.shape
    wide = max(lists, heads)
    head = torch.arange(batch * wide, device=ids.device).view(batch, wide, 1) // (wide // x.shape[1])
    flat = (head * x.shape[2] + ids).flatten()
    return x.flatten(0, 2).index_select(0, flat).view(batch, wide, m, *x.shape[3:])
