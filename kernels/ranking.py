"""Deterministic top-k under per-row budgets: higher score first, then lower position."""

from __future__ import annotations

import torch
from torch import Tensor


def best(score: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
    """Mask [B, H, M] of the `budget` [B] best valid candidates of each head; candidates come in order of position."""
    return (_rank(score, valid) < budget.view(-1, 1, 1)) & valid


def best_shared(score: Tensor, valid: Tensor, budget: Tensor, floor: float = 0.2) -> Tensor:
    """Like `best`, but the heads of a row share `H * budget` tokens by score; each is sure of `floor * budget`.

    Source: AdaKV, arXiv 2407.11550 (safeguard 0.2).
    """
    heads = score.shape[1]
    sure = (_rank(score, valid) < (budget * floor).long().view(-1, 1, 1)) & valid
    lifted = score.masked_fill(sure, float("inf")).flatten(1)[:, None]
    shared = _rank(lifted, valid.flatten(1)[:, None]) < (budget * heads).view(-1, 1, 1)
    return shared.view_as(score) & valid


def _rank(score: Tensor, valid: Tensor) -> Tensor:
    order = score.float().masked_fill(~valid, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)
