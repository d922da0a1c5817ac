"""Scores of pages by the boxes around their keys."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bench.kernels.case import PAGE, Case, Shape, error
from kvlib.kernels.bounds import bounded, bounds


def boxes(s: Shape) -> tuple[Tensor, Tensor]:
    """Upper and lower corners [B, H, T / 16, d] of pages of random keys."""
    middle = s.normal(s.batch, s.heads, s.pages, s.d)
    return middle + 1.75, middle - 1.75


def boxes_moved(s: Shape) -> int:
    """Bytes of the boxes."""
    return s.batch * s.heads * s.pages * 2 * s.d * s.dtype.itemsize


def cases(s: Shape) -> Iterator[Case]:
    """Quest's pages of 16."""
    moved = boxes_moved(s) + s.batch * s.q_heads * s.pages * 4

    def make() -> list[tuple[Tensor, ...]]:
        return [(s.query()[:, :, 0], *boxes(s)) for _ in range(s.copies(moved))]

    def run(q: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return bounds(q, first, second, True)

    def off(given: tuple[Tensor, ...], found: Tensor) -> float:
        q, first, second = s.like(*given)
        return error(found[-1:], bounded(q, first, second, True))

    yield Case("bounds", f"boxes of pages of {PAGE}", make, run, off, 2e-3, moved)
