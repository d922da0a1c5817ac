"""TokenSelect: every head votes for tokens by its own softmax, and all heads read the winners, arXiv 2411.02886."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kvlib.policies.base import Budget, RecipeError, check_flag, register
from kvlib.policies.selection import Block, Index, Past, Selector, Units, cosine


@register
@dataclass(frozen=True)
class TokenSelect(Selector):
    """Read the tokens that get most of the votes of a layer's heads, and again while the query stays the same.

    budget: tokens a decode query reads (int), or fraction of the prompt (float); the paper's 2,048 chosen, 512 newest and
        128 sinks are 2,688.
    scope:  "layer" (all heads vote for one list), "kv_head" or "query_head".
    dense_layers: first layers that read everything; never more than a quarter of the model's.
    theta:  cosine with the query of the last choice from which on that choice serves again (0.9); above 1: never.
    raw:    votes without the attention's scale, as in the paper's code.

    Keys are scored as they are stored, post-rotary and at their own positions.
    """

    name: ClassVar[str] = "tokenselect"
    paper: ClassVar[str] = "2411.02886"
    reads_keys: ClassVar[bool] = True

    budget: Budget = 2688
    scope: str = "layer"
    theta: float = 0.9
    raw: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self.name, "raw", self.raw)
        if isinstance(self.theta, bool) or not isinstance(self.theta, int | float):
            raise RecipeError(self.name, "theta", self.theta, "give a cosine, or a number above 1 to choose at every step")

    @property
    def remembers(self) -> bool:
        """A choice that serves again is of an earlier query."""
        return self.theta <= 1

    @property
    def scaled(self) -> bool:
        """Unless raw votes are asked for."""
        return not self.raw

    @property
    def run(self) -> int:
        """Single tokens."""
        return 1

    @property
    def portions(self) -> tuple[int, int, int]:
        """As the paper's; a choice serves for a block at most, so that no token is out of reach for longer."""
        return 128, 512, 64

    def build(self, block: Block) -> Units:
        """Nothing but the keys themselves."""
        return Units({})

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """The true scores."""
        assert index.products is not None
        return index.products(q)

    def reuse(self, q: Tensor, past: Past, tokens: np.ndarray) -> Tensor | None:
        """The last choice, while all heads' queries together stay close to those it was made for."""
        return None if self.theta > 1 or past.query is None else cosine(q, past.query) >= self.theta
