"""A selecting step from end to end: boxes of pages scored, pages ranked, their tokens listed, the last one cut, the tokens
attended; Quest, arXiv 2406.10774."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernels.bounds import boxes_moved
from bench.kernels.case import PAGE, Case, Shape, error, pair_error
from bench.kernels.rank import chosen_error
from kvlib.kernels.bounds import bounded, bounds
from kvlib.kernels.decode import decode, gathered_decode
from kvlib.kernels.selection import cut, list_runs, rank

_ELSEWHERE = 5  # tokens of the budget that a tail has taken: the last page does not fit whole


def cases(s: Shape) -> Iterator[Case]:
    """Quest's 2,048 of all tokens."""
    room = s.listed - _ELSEWHERE
    best = -(-room // PAGE)
    moved = boxes_moved(s) + s.read(room)
    held = s.dense + boxes_moved(s)

    def pool() -> tuple[Tensor, ...]:
        k, v = s.keys(), s.keys()
        pages = k.view(s.batch, s.heads, s.pages, PAGE, s.d)
        space = torch.full((s.batch, 1, 1), room, device=s.device)
        return k, v, pages.amax(3), pages.amin(3), space, s.lengths(room)

    def make() -> list[tuple[Tensor, ...]]:
        return [(s.query(), *pool()) for _ in range(s.copies(moved))]

    def run(
        q: Tensor, k: Tensor, v: Tensor, high: Tensor, low: Tensor, space: Tensor, length: Tensor
    ) -> tuple[Tensor, ...]:
        logits = bounds(q[:, :, 0], high, low, True, s.scale)
        order = rank(logits, best, s.heads)
        listing = list_runs(order, PAGE, space, room)
        ids = cut(q[:, :, 0], k, listing, s.scale, 0.0, room, PAGE)
        out, lse = decode(q, k, v, s.scale, length=length, ids=ids)
        return logits, order, ids, out, lse

    def off(given: tuple[Any, ...], found: tuple[Any, ...]) -> float:
        """Stage by stage, each by what the kernels before it gave: rounding may exchange two pages."""
        q, k, v, high, low, space, _ = s.like(*given)
        logits, order, ids, out, lse = (x[-1:] for x in found)
        listed, whole = list_runs(order, PAGE, space, room).ids, room // PAGE * PAGE
        last = (ids[..., whole:, None] == listed[..., None, whole:]).any(-1)
        right = torch.equal(ids[..., :whole], listed[..., :whole]) and bool(last.all())
        return max(
            error(logits, bounded(q[:, :, 0], high, low, True, s.scale)),
            chosen_error(logits, order, s.heads),
            0.0 if right else float("inf"),
            pair_error((out, lse), gathered_decode(q, k, v, s.scale, ids=ids)),
        )

    yield Case("selection", f"Quest, {s.listed} tokens in pages of {PAGE}", make, run, off, 1e-2, moved, held=held)
