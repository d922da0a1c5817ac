"""The tokens of chosen clusters, written out, and the one cluster that fits in part, cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import PAGE, Case, Shape
from kvlib.kernels.selection import Listing, cut, gathered_cut, list_units, searched_units

_LONGEST = 2 * PAGE


def cases(s: Shape) -> Iterator[Case]:
    """Clusters of 16 tokens on average and 32 at most, 2,048 tokens of them."""
    lists, room = s.batch * s.heads, s.listed - 5

    def pool() -> tuple[Tensor, ...]:
        size = 1 + s.below(_LONGEST, s.batch, s.heads, s.pages)
        start, order = size.cumsum(-1) - size, s.uniform(s.batch, s.heads, s.pages).argsort(-1)
        return order, start.int(), size.int(), torch.full((s.batch, 1, 1), room, device=s.device)

    def listed(order: Tensor, start: Tensor, size: Tensor, space: Tensor) -> Listing:
        return list_units(order, start, size, space, s.listed, _LONGEST)

    def searched(order: Tensor, start: Tensor, size: Tensor, space: Tensor) -> tuple[Tensor, ...]:
        return searched_units(order, start, size, space, 0, s.listed, _LONGEST)

    def listed_off(given: tuple[Any, ...], found: Any) -> float:
        return float(sum((a[-1:] != b).sum() for a, b in zip(found, searched(*s.like(*given)), strict=True)))

    yield Case("listing", "clusters", lambda: [pool()], listed, listed_off, 0.0, lists * (s.listed + _LONGEST) * 8)

    def make() -> list[tuple[Any, ...]]:
        k = s.normal(s.batch, s.heads, s.pages * _LONGEST, s.d)
        return [(s.query(), k, *searched(*pool()))]

    def run(q: Tensor, k: Tensor, ids: Tensor, before: Tensor, length: Tensor) -> Tensor:
        return cut(q[:, :, 0], k, Listing(ids, before, length), s.scale, 0.0, s.listed, _LONGEST)

    def off(given: tuple[Any, ...], found: Tensor) -> float:
        """Share of tokens that only one of the two has chosen; where tokens end, both may repeat any."""
        q, k, ids, before, length = s.like(*given)
        wanted = gathered_cut(q[:, :, 0], k, ids, before, length, 0, 0, s.scale, 0.0, s.listed, _LONGEST)
        seen = min(room, int(length.min()))
        pairs = zip(found[-1, :, :seen], wanted[0, :, :seen], strict=True)
        return max(float((~torch.isin(a, b)).float().mean()) for a, b in pairs)

    moved = lists * (2 * s.listed * 8 + _LONGEST * s.d * s.dtype.itemsize)
    yield Case("listing", "cut", make, run, off, 1e-3, moved, held=s.dense)
