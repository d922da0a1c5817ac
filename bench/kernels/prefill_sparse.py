"""Prompts: all of the past, its first and newest tokens, and a quarter of its blocks, beside torch's dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case, Shape, pair_error
from bench.kernels.peers import prefill
from kvlib.kernels.prefill_sparse import gathered_prefill, prefill_sparse

_MOST = 1.5e14  # operations of a call: a quarter of a second


def cases(s: Shape) -> Iterator[Case]:
    """Whole prompts; blocks are chosen at random, each query head's own."""
    n, block = s.context, min(128, s.context // 2)
    pair = 4 * s.batch * s.q_heads * s.d  # operations per query and key
    dense, sink, window = pair * n * n // 2, min(128, n // 4), min(1024, n // 2)
    read = sum(-(-(i + 1) // 4) for i in range(n // block)) * block * block
    # Queries and keys in, outputs in fp32 out.
    moved = s.dense + s.batch * s.q_heads * n * (s.d * (s.dtype.itemsize + 4) + 4)

    def skip(flops: int) -> str:
        return "it would take more than a quarter of a second" if flops > _MOST else ""

    def make(listed: bool) -> list[tuple[Any, ...]]:
        lists = _quarter(s, n // block) if listed else (None, None)
        return [(s.query(n), s.keys(), s.keys(), *lists)]

    def case(variant: str, flops: int, **span: Any) -> Case:
        def run(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, count: Tensor | None) -> Any:
            return prefill_sparse(q, k, v, s.scale, block, blocks=blocks, count=count, **span)

        def off(given: tuple[Any, ...], found: Any) -> float:
            """Of the last block of queries."""
            q, k, v = s.like(*given[:3])
            last = [None if x is None else x[-1:, :, -1:] for x in given[3:]]
            wanted = gathered_prefill(q[:, :, -block:], k, v, s.scale, block, blocks=last[0], count=last[1], **span)
            return pair_error(tuple(x[:, :, -block:] for x in found), wanted)

        held = moved + s.batch * s.q_heads * (n // block) ** 2 * 4
        return Case(
            "prefill_sparse", variant, partial(make, not span), run, off, 1e-2, moved, held, flops, skip=skip(flops)
        )

    yield case("dense", dense, window=n)
    yield case("sinks and window", pair * n * (sink + window), window=window, sink=sink)
    yield case("a quarter of the blocks", pair * read)
    yield prefill(s, dense, moved, skip(dense))


def _quarter(s: Shape, rows: int) -> tuple[Tensor, Tensor]:
    """A quarter of each block row's past, its own among it: blocks [B, Hq, rows, m] and count [B, Hq, rows], int32."""
    place = torch.arange(rows, device=s.device)
    past = place <= place.unsqueeze(1)
    score = s.uniform(1, s.q_heads, rows, rows).masked_fill_(~past, -1.0)
    score = score.masked_fill_(place == place.unsqueeze(1), 2.0)
    blocks = score.topk(-(-rows // 4)).indices.int()
    count = (place // 4 + 1).int()
    lists = (s.batch, s.q_heads)
    return blocks.expand(*lists, -1, -1), count.expand(*lists, -1)
