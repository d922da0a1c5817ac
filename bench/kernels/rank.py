"""The best pages by the votes of the query heads that share them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bench.kernels.case import PAGE, Case, Shape, error
from kvlib.kernels.selection import rank, vote


def chosen_error(logits: Tensor, found: Tensor, heads: int) -> float:
    """How far the votes for units found [B, H, k] are from the largest, best first; two may be as good but for rounding.
    Infinite where a unit was chosen twice."""
    votes = vote(logits, heads)
    twice = bool((found.sort(-1).values.diff(dim=-1) == 0).any())
    return float("inf") if twice else error(votes.gather(-1, found), votes.topk(found.shape[-1]).values)


def cases(s: Shape) -> Iterator[Case]:
    """Enough pages of 16 for 2,048 tokens."""
    best = s.listed // PAGE
    moved = s.batch * (s.q_heads * s.pages * 4 + s.heads * best * 8)

    def make() -> list[tuple[Tensor, ...]]:
        return [(2 * s.uniform(s.batch, s.q_heads, s.pages).logit(1e-6),) for _ in range(s.copies(moved))]

    def run(logits: Tensor) -> Tensor:
        found: Tensor = rank(logits, best, s.heads)
        return found

    def off(given: tuple[Tensor, ...], found: Tensor) -> float:
        return chosen_error(given[0][-1:], found[-1:], s.heads)

    yield Case("rank", f"{best} best pages", make, run, off, 1e-4, moved)
