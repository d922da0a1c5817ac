"""Pruned vectors with their zeros again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bench.kernels.case import Case, Shape, error
from kvlib.kernels.expand import expand, expanded
from kvlib.kernels.quantise import pack

SPARSITY = 0.7
_PATTERNS = 4096  # random sets of channels, which tokens draw from


def cases(s: Shape) -> Iterator[Case]:
    """Mustafar's keys or values."""
    tokens = s.batch * s.heads * s.context
    k = s.d - int(SPARSITY * s.d)
    read = tokens * (s.d // 8 + k * s.dtype.itemsize)
    moved = read + tokens * s.d * s.dtype.itemsize

    def make() -> list[tuple[Tensor, Tensor]]:
        patterns = pack((s.uniform(_PATTERNS, s.d).argsort(-1) < k).byte(), 1)
        drawn = (_PATTERNS, s.batch, s.heads, s.context)
        return [(patterns[s.below(*drawn)], s.normal(*drawn[1:], k)) for _ in range(s.copies(moved))]

    def run(bitmap: Tensor, kept: Tensor) -> Tensor:
        return expand(bitmap, kept)

    def off(given: tuple[Tensor, Tensor], found: Tensor) -> float:
        return error(found[-1:], expanded(*s.like(*given)))

    yield Case("expand", f"{k} of {s.d}", make, run, off, 0.0, moved, held=read)
