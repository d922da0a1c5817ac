"""ShadowKV's attention: keys of 2,048 listed tokens rebuilt from their coefficients, turned, attended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case, Shape, pair_error
from kvlib.kernels.decode_lowrank import decode_lowrank, gathered_lowrank


def cases(s: Shape) -> Iterator[Case]:
    """Llama-3's rotary embedding, values on the device."""
    size = s.dtype.itemsize
    moved = s.batch * s.heads * s.listed * (s.rank + s.d) * size
    held = s.batch * s.context * (s.rank + s.heads * s.d) * size
    freq = 500000.0 ** (-torch.arange(0, s.d, 2, device=s.device) / s.d)

    def pool() -> tuple[Tensor, Tensor]:
        return s.normal(s.batch, 1, s.context, s.rank), s.keys()

    def make() -> list[tuple[Any, ...]]:
        pools = [pool() for _ in range(s.copies(held))]
        sets = []
        for i in range(s.copies(moved)):
            u, v = pools[i % len(pools)]
            basis = s.normal(s.batch, s.heads, s.rank, s.d) * s.rank**-0.5
            ids = s.chosen(s.context, s.listed)
            sets.append((s.query(), u, basis, v, ids, s.lengths(s.listed)))
        return sets

    def run(q: Tensor, u: Tensor, basis: Tensor, v: Tensor, ids: Tensor, length: Tensor) -> Any:
        return decode_lowrank(q, u, basis, v, freq, s.scale, length=length, ids=ids)

    def off(given: tuple[Any, ...], found: Any) -> float:
        q, u, basis, v, ids, length = (x[-1:] for x in given)
        return pair_error(found, gathered_lowrank(q, u, basis, v, freq, s.scale, length=length, ids=ids))

    yield Case("decode_lowrank", f"{s.listed} tokens, rank {s.rank}", make, run, off, 2e-2, moved, held=held)
