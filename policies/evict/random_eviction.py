"""Random eviction: what budget alone is worth; the lower bound of every evictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kvlib.policies.base import BudgetedEvictor, Needs, RecipeError, Sizes, Split, View, check_whole, register, shares


@register
@dataclass(frozen=True)
class RandomEviction(BudgetedEvictor):
    """Keep the first tokens and a random choice of the others; evict once, when the prompt ends: the scale's lower end.

    budget: tokens per KV head (int) or fraction of the prompt (float).
    seed:   another seed, another choice.

    The choice is a hash of seed, layer, head, position and the prompt's tokens: another prompt, another choice, so that
    samples are independent draws, but a row's neighbours and padding have no part in it.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[Needs] = Needs(token_ids=True)

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "seed", self.seed)
        if self.seed >= 2**31:
            raise RecipeError(self.name, "seed", self.seed, "give a whole number below 2147483648")

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """sink | random choice: no window is sure of its place."""
        return shares(self.tokens(seen), sizes, block=0, recent=0)

    def score(self, view: View) -> Tensor:
        """Uniform in [0, 1)."""
        head = _mixed(view.heads + (self.seed << 32)).view(1, -1, 1)
        positions = view.positions.long()
        tokens = _mixed(view.token_ids ^ (positions << 32)).masked_fill(~view.valid, 0)
        prompt = tokens[:, :1].sum(-1, keepdim=True)  # every head's candidates are the whole prompt
        return ((_mixed(positions ^ head ^ prompt) >> 40) & 0xFFFFFF).float() / 2**24


def _mixed(x: Tensor) -> Tensor:
    """A 64-bit finaliser (SplitMix64): every bit of the result depends on every bit of x, int64."""
    x = x - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
