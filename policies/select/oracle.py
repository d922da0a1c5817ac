"""Oracle top-k: what a selector with perfect knowledge would read; the upper bound of every selector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.policies.base import register
from kvlib.policies.selection import Block, Index, Selector, Units


@register
@dataclass(frozen=True)
class Oracle(Selector):
    """Read the keys that really get most of the attention, found by computing all of it: the scale's upper end.

    budget: tokens a decode query reads per KV head (int), or fraction of the prompt (float).

    The query heads of a KV head read the same keys: the newest token and those with the largest sum of their attention
    probabilities, so no other choice of as many keys captures more.  Nothing is saved: a yardstick for methods that guess.
    """

    name: ClassVar[str] = "oracle"
    reads_keys: ClassVar[bool] = True

    @property
    def run(self) -> int:
        """Single tokens."""
        return 1

    @property
    def minimum(self) -> int:
        """The newest token."""
        return 1

    @property
    def portions(self) -> tuple[int, int, int]:
        """No token is read but the newest and those chosen."""
        return 0, 0, 1

    def build(self, block: Block) -> Units:
        """Nothing but the keys themselves."""
        return Units({})

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """The true scores."""
        assert index.products is not None
        return index.products(q)
