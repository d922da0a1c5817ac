"""What keys collect of the probability of queries: H2O's at every step, SnapKV's at the end of a prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.kernels.case import Case, Shape, error
from kvlib.kernels.attention import Visible
from kvlib.kernels.column_mass import column_mass, walked_mass


def cases(s: Shape) -> Iterator[Case]:
    """One query, and the newest 32."""
    moved = s.batch * s.heads * s.context * (s.d * s.dtype.itemsize + 4)
    for n in (1, 32):

        def make(n: int = n) -> list[tuple[Tensor, ...]]:
            def lse() -> Tensor:
                return torch.full((s.batch, s.q_heads, n), math.log(s.context) + 0.5, device=s.device)

            return [(s.query(n), s.keys(), lse()) for _ in range(s.copies(moved))]

        def run(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
            return column_mass(q, k, lse, s.scale, Visible(causal=True))

        def off(given: tuple[Tensor, ...], found: Tensor) -> float:
            q, k, lse = s.like(*given)
            return error(found[-1:], walked_mass(q, k, lse, s.scale, causal=True))

        flops = 2 * s.batch * s.q_heads * n * s.context * s.d
        variant = "one query" if n == 1 else f"{n} queries"
        yield Case("column_mass", variant, make, run, off, 1e-2, moved, flops=flops)
