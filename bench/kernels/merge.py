"""Partial results merged: those of the parts of a cache, and those of one list's chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case, Shape, pair_error
from kvlib.kernels.launch import power
from kvlib.kernels.merge import merge_parts, weighted

BY_CONTEXT = False
_LN2 = 0.6931471805599453


def cases(s: Shape) -> Iterator[Case]:
    """A step's parts, from two to eight, and the 128 chunks of 128k tokens."""
    row = s.batch * s.q_heads * (s.d + 1) * 4
    for parts in (2, 3, 4, 8):

        def make(parts: int = parts) -> list[tuple[Any, ...]]:
            return [_parts(s, parts) for _ in range(s.copies((parts + 1) * row))]

        def off(given: tuple[Any, ...], found: Any) -> float:
            outs, lses = ([x[-1:] for x in xs] for xs in given)
            return pair_error(found, weighted(outs, lses))

        yield Case("merge", f"{parts} parts", make, merge_parts, off, 1e-5, (parts + 1) * row)
    if s.device.type == "cuda":
        yield _chunks(s, 128)


def _parts(s: Shape, parts: int) -> tuple[list[Tensor], list[Tensor]]:
    outs = [s.normal(s.batch, s.q_heads, 1, s.d, dtype=torch.float32) for _ in range(parts)]
    return outs, [s.normal(s.batch, s.q_heads, 1, dtype=torch.float32) for _ in range(parts)]


def _chunks(s: Shape, chunks: int) -> Case:
    """The second launch of a decode step alone."""
    from kvlib.kernels.decode import merge_splits

    rows, group, size = s.batch * s.heads, s.q_heads // s.heads, 1024
    moved = (chunks + 1) * s.batch * s.q_heads * (s.d + 1) * 4

    def make() -> list[tuple[Any, ...]]:
        sets: list[tuple[Any, ...]] = []
        for _ in range(s.copies(moved)):
            part = s.normal(rows * chunks, group, s.d, dtype=torch.float32)
            part_lse = s.normal(rows * chunks, group, dtype=torch.float32)
            sets.append((part, part_lse, torch.full((rows,), chunks * size, dtype=torch.int32, device=s.device)))
        return sets

    def run(part: Tensor, part_lse: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = part.new_empty((rows, group, s.d)), part.new_empty((rows, group))
        sizes: dict[str, int] = {"DV": s.d, "CHUNK": size, "BLOCK_DV": power(s.d), "BLOCK_C": 16, "R_BLOCK": power(rows)}
        merge_splits[(rows, group)](part, part_lse, out, lse, length, rows, chunks * size, group, **sizes, num_warps=4)
        return out, lse

    def off(given: tuple[Tensor, ...], found: tuple[Tensor, Tensor]) -> float:
        part, part_lse = (x.view(rows, chunks, group, -1)[-1:].double() for x in given[:2])
        lse = part_lse[..., 0] * _LN2
        out = ((lse.softmax(1).unsqueeze(-1)) * part).sum(1)
        return pair_error(found, (out, lse.logsumexp(1)))

    return Case("merge", f"{chunks} chunks of a decode step", make, run, off, 1e-4, moved)
