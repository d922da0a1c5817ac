"""Decode attention over GEAR's codes of 4 bits, low-rank terms and entries that stand out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from bench.kernels.case import Case, Shape, pair_error
from bench.kernels.decode_q4 import codes
from kvlib.kernels.decode_gear import decode_gear, restored_decode
from kvlib.policies.selection import SEGMENT

BITS, RANK, PAGE = 4, 4, 128  # the paper's bits and rank; tokens among which a channel's outliers are sought


def corrected(s: Shape, segments: int, outliers: int) -> int:
    """Bytes of codes, ranges of values, factors of tokens, outliers of 3 bytes, and of ranges and factors of segments."""
    page = min(PAGE, s.context)
    per_token = 2 * s.d * BITS / 8 + 4 + 2 * 2 * RANK + 3 * outliers * (1 + s.d / page)
    per_segment = 4 * s.d + 2 * 2 * s.d * RANK
    return int(s.batch * s.heads * (s.context * per_token + segments * per_segment))


def cases(s: Shape) -> Iterator[Case]:
    """With two outliers per token and as many per page of a channel, gear, and without, gear_l; segments as of a prompt."""
    page, segments = min(PAGE, s.context), max(1, s.context // SEGMENT)
    both, half = (s.batch, s.heads), torch.float16
    scale, restored = s.scale, cast(Callable[..., Any], restored_decode)

    def factors() -> tuple[Tensor, Tensor]:
        a = 0.2 * s.normal(*both, s.context, RANK, dtype=half)
        return a, s.normal(*both, segments, s.d, RANK, dtype=half)

    def places(high: int, *size: int) -> Tensor:
        """Two different ones, side by side on axis 3."""
        low = s.below(high // 2, *size, dtype=torch.uint8)
        return torch.stack([low, high // 2 + s.below(high // 2, *size, dtype=torch.uint8)], 3)

    def entries() -> dict[str, Tensor]:
        return {
            "k_error": s.normal(*both, s.context // page, 2, s.d, dtype=half),
            "k_place": places(page, *both, s.context // page, s.d),
            "v_error": s.normal(*both, s.context, 2, dtype=half),
            "v_place": places(s.d, *both, s.context),
        }

    def one(outliers: bool) -> tuple[Any, ...]:
        k, k_range, v, v_range = codes(s, BITS, s.context // segments)
        lists = {"length": s.lengths(s.context)} | (entries() if outliers else {})
        if segments > 1:
            ends = torch.arange(1, segments + 1, dtype=torch.int32, device=s.device) * (s.context // segments)
            lists["ends"] = ends.expand(s.batch, -1).contiguous()
        return (s.query(), k, k_range, *factors(), v, v_range, *factors()), lists

    def run(pieces: tuple[Tensor, ...], lists: dict[str, Tensor]) -> Any:
        return decode_gear(*pieces, scale, page=page, **lists)

    def off(given: tuple[Any, ...], found: Any) -> float:
        (q, *pieces), lists = s.like(*given[0]), {name: x[-1:] for name, x in given[1].items()}
        return pair_error(found, restored(q.float(), *pieces, scale, page=page, **lists))

    for variant, outliers in (("gear", 2), ("gear_l", 0)):
        moved = corrected(s, segments, outliers)

        def make(moved: int = moved, outliers: bool = outliers > 0) -> list[tuple[Any, ...]]:
            return [one(outliers) for _ in range(s.copies(moved))]

        yield Case("decode_gear", f"{variant}, {BITS} bits", make, run, off, 1e-2, moved)
