"""Quest: pages of keys, each promising at most what its box of channel ranges allows, arXiv 2406.10774."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kvlib.kernels.bounds import bounds
from kvlib.policies.base import Budget, RecipeError, check_whole, register
from kvlib.policies.selection import Block, Index, Past, Selector, Units

KINDS = ("minmax", "meanstd", "cuboid")


@register
@dataclass(frozen=True)
class Quest(Selector):
    """Read the pages whose channel-wise bounds promise the largest scores.

    budget: tokens a decode query reads per KV head (int), sinks and newest tokens included, or fraction of the prompt
        (float).
    scope:  "kv_head" (the query heads of a KV head choose together), "layer" or, as in the paper, "query_head".
    dense_layers: first layers that read everything (2 in the paper); never more than a quarter of the model's.
    page:   tokens per page (16).
    bounds: what a page is known by, two vectors each: "minmax", the paper's box, whose score no key of the page exceeds;
            "meanstd", its mean and standard deviation per channel; "cuboid", the box's centre and the mean distance from it
            (ArkVale's cuboid-mean).
    logical: tokens per logical page (0: page), of which a page takes the best score (LServe).
    every:  decode steps a choice serves (1; LServe: 4).
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "2406.10774"

    budget: Budget = 1024
    dense_layers: int = 2
    page: int = 16
    bounds: str = "minmax"
    logical: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_whole(self.name, "page", self.page, 1)
        super().__post_init__()
        check_whole(self.name, "logical", self.logical)
        check_whole(self.name, "every", self.every, 1)
        if self.bounds not in KINDS:
            raise RecipeError(self.name, "bounds", self.bounds, f"give one of {', '.join(KINDS)}")
        if self.logical and self.page % self.logical:
            raise RecipeError(self.name, "logical", self.logical, f"give a divisor of page={self.page}")

    @property
    def run(self) -> int:
        """Pages of equal size."""
        return self.page

    @property
    def remembers(self) -> bool:
        """A choice of several steps is of the first one's query."""
        return self.every > 1

    @property
    def minimum(self) -> int:
        """At least three pages."""
        return 3 * self.page

    @property
    def portions(self) -> tuple[int, int, int]:
        """The first and the newest page are read in any case, and the one that is not full yet."""
        return self.page, self.page, self.page

    def build(self, block: Block) -> Units:
        """Two vectors per logical page."""
        logical = self.logical or self.page
        shape = (*block.keys.shape[:2], -1, self.page // logical, logical, block.keys.shape[3])
        pages = block.keys.reshape(shape)
        if self.bounds == "meanstd":
            mean = pages.float().mean(4)
            first, second = mean, (pages.float() - mean.unsqueeze(4)).square().mean(4).sqrt()
        else:
            high, low = pages.amax(4), pages.amin(4)
            first, second = high, low
            if self.bounds == "cuboid":
                first = (high.float() + low.float()) / 2
                second = (pages.float() - first.unsqueeze(4)).abs().mean(4)
        return Units({"first": first.to(block.keys.dtype), "second": second.to(block.keys.dtype)})

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """The best that any point of a page's box can score."""
        first, second = index.summary["first"], index.summary["second"]
        s = bounds(q, first.flatten(2, 3), second.flatten(2, 3), self.bounds == "minmax")
        return s if first.shape[3] == 1 else s.view(*s.shape[:2], *first.shape[2:4]).amax(-1)

    def reuse(self, q: Tensor, past: Past, tokens: np.ndarray) -> np.ndarray | None:
        """A choice serves `every` steps, or until another page is full."""
        return None if self.every == 1 else tokens - past.tokens < self.every
