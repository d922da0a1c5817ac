"""SnapKV: the last prompt queries vote for what generation will read, arXiv 2404.14469 (NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvlib.policies.base import (
    Budget,
    BudgetedEvictor,
    Needs,
    RecipeError,
    Sizes,
    Split,
    View,
    check_whole,
    register,
    shares,
)


@register
@dataclass(frozen=True)
class SnapKV(BudgetedEvictor):
    """Keep what the last prompt queries attend to, smoothed over neighbours, and those last tokens; evict once.

    budget: tokens per KV head (int) or fraction of the prompt (float), the observation window included.
    window: how many last prompt queries vote, at most half the budget; they are always kept.
    kernel, pooling: odd width and kind ("max" or "avg") of the pooling along positions.
    adaptive: the heads of a layer share their budgets by votes (AdaKV, arXiv 2407.11550).

    Defaults are those of the paper's LongBench runs (the reference code's own are kernel=5, pooling="avg").  Votes are
    averaged over the query heads of each KV head, then pooled.  A few first tokens are protected as sinks (recipe term
    `sink=0` for the paper's letter).  Generated tokens are never evicted.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "2404.14469"

    budget: Budget = 2048
    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "window", self.window, 1)
        check_whole(self.name, "kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise RecipeError(self.name, "kernel", self.kernel, f"give an odd width, such as {self.kernel + 1}")
        if self.pooling not in ("avg", "max"):
            raise RecipeError(self.name, "pooling", self.pooling, "give 'avg' or 'max'")

    def requirements(self) -> Needs:
        """Votes of the observation window."""
        return Needs(votes=self.window)

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """sink | votes' choice | window."""
        return shares(self.tokens(seen), sizes, block=0, recent=self.window)

    def score(self, view: View) -> Tensor:
        """Votes pooled along positions."""
        assert view.votes is not None
        return pooled(view.votes, self.kernel, self.pooling)


def pooled(votes: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pool votes [B, H, M] along M, stride 1, same length; "avg" counts the zero padding, as the reference does."""
    if pooling == "max":
        return max_pool1d(votes, kernel, stride=1, padding=kernel // 2)
    return avg_pool1d(votes, kernel, stride=1, padding=kernel // 2)
