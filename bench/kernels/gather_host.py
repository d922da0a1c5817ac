"""Rows of page-locked host memory into device slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.kernels.case import PAGE, Case, Shape
from kvlib.kernels.gather_host import gather_host

BY_CONTEXT = False
_TOKENS = 8192  # of a list in host memory, of which 2,048 are wanted


def cases(s: Shape) -> Iterator[Case]:
    """2,048 keys of each head, by token and by page."""
    lists = s.batch * s.heads
    moved = lists * s.listed * s.d * s.dtype.itemsize
    for variant, run in (("tokens", 1), (f"pages of {PAGE}", PAGE)):
        rows, entries, width = max(_TOKENS, s.listed) // run, s.listed // run, run * s.d

        def make(rows: int = rows, entries: int = entries, width: int = width) -> list[tuple[Any, ...]]:
            on_gpu = s.device.type == "cuda"
            source = torch.empty(lists, rows, width, dtype=s.dtype, pin_memory=on_gpu)
            source.copy_(s.normal(lists, rows, width))
            target = s.normal(lists, entries, width)
            wanted = s.chosen(rows, entries).view(lists, entries)
            place = torch.arange(entries, device=s.device).expand(lists, -1).contiguous()
            return [(source, target, wanted, place)]

        def off(given: tuple[Any, ...], found: None) -> float:
            source, target, wanted, _ = (x[-1] for x in given)
            return float((source[wanted.cpu()] != target.cpu()).sum())

        yield Case("gather_host", variant, make, gather_host, off, 0.0, moved, held=2 * moved, bus=True)
