"""Encoding on write: a prompt's keys and values as codes of 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bench.kernels.case import Case, Shape
from kvlib.kernels.pack import pack_codes, quantised

SPAN = 128  # tokens that share a range of keys


def cases(s: Shape) -> Iterator[Case]:
    """Keys by channel in spans of 128 tokens, values token by token."""
    tokens = s.batch * s.heads * s.context
    span = min(SPAN, s.context)
    for variant, group, per_channel in ((f"keys, span {span}", span, True), ("values", 0, False)):
        ranges = 4 * s.d / span if per_channel else 4
        moved = int(tokens * (s.d * s.dtype.itemsize + s.d / 2 + ranges))

        def make(moved: int = moved) -> list[tuple[Tensor, ...]]:
            return [(s.keys(),) for _ in range(s.copies(moved))]

        def run(x: Tensor, group: int = group, per_channel: bool = per_channel) -> Any:
            return pack_codes(x, 4, group, per_channel)

        def off(given: tuple[Tensor, ...], found: Any, group: int = group, per_channel: bool = per_channel) -> float:
            """Codes and ranges that differ, of the last head."""
            wanted = quantised(given[0][-1:, -1:], 4, group, per_channel)
            return float(sum((a[-1:, -1:] != b).sum() for a, b in zip(found, wanted, strict=True)))

        yield Case("pack", variant, make, run, off, 0.0, moved, held=tokens * s.d * s.dtype.itemsize)
