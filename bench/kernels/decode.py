"""Decode attention in bf16: over whole sequences, beside others' kernels for that, and over lists of tokens and pages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from bench.kernels.case import PAGE, Case, Shape, pair_error
from bench.kernels.peers import decoders
from kvlib.kernels.decode import decode, gathered_decode


def cases(s: Shape) -> Iterator[Case]:
    """The range, its peers, and 2,048 tokens of it by token and by page."""

    def pools(count: int) -> list[tuple[Tensor, Tensor]]:
        return [(s.keys(), s.keys()) for _ in range(count)]

    def ranges() -> list[tuple[Any, ...]]:
        return [(s.query(), k, v, None, s.lengths(s.context)) for k, v in pools(s.copies(s.dense))]

    def lists(page: int) -> list[tuple[Any, ...]]:
        held, entries = pools(s.copies(s.dense)), s.listed // page
        sets = range(s.copies(s.read(s.listed)))
        ids = [s.chosen(s.context // page, entries) for _ in sets]
        return [(s.query(), *held[i % len(held)], ids[i], s.lengths(s.listed)) for i in sets]

    for variant, page in (("range", 0), (f"{s.listed} tokens", 1), (f"{s.listed} tokens in pages of {PAGE}", PAGE)):

        def run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, length: Tensor, page: int = page) -> Any:
            return decode(q, k, v, s.scale, page=max(page, 1), length=length, ids=ids)

        def off(given: tuple[Any, ...], found: Any, page: int = page) -> float:
            q, k, v, length = s.like(*given[:3], given[4])
            ids = None if given[3] is None else given[3][-1:]
            return pair_error(found, gathered_decode(q, k, v, s.scale, page=max(page, 1), length=length, ids=ids))

        make = partial(lists, page) if page else ranges
        moved = s.read(s.listed) if page else s.dense
        yield Case("decode", variant, make, run, off, 1e-2, moved, held=s.dense)
    yield from decoders(s)
