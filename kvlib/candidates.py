"""The tokens an evictor chooses from when a block is sealed, and the move of the chosen into new tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvlib.coded import Coding
from kvlib.offload.transfer import sent
from kvlib.segment import Layout, Tail, Tiles


class Candidates:
    """Tokens of the body and of the tail side by side, [B, H, M]: the body's first `from_body`, then the tail's."""

    def __init__(self, body: Tiles | None, tail: Tail, slot: Tensor, position: Tensor):
        self.body, self.tail = body, tail
        self.tail_slot = slot
        self.body_slot = slot[..., :0] if body is None else body.slots()
        self.from_body = self.body_slot.shape[-1]
        self.valid = torch.cat([self.body_slot, slot], -1) >= 0
        self.positions = self._join(None if body is None else body.positions, position)

    def _join(self, body: Tensor | None, tail: Tensor) -> Tensor:
        """Body values x [G, P, ...] picked by slot, before tail values [B, H, T, ...]."""
        if body is None:
            return tail
        picked = body.flatten(0, 1)[self.body_slot.clamp(min=0)]
        return torch.cat([picked, tail], 2)

    def take_tail(self, x: Tensor) -> Tensor:
        """Values x [B, H, slots] of the tail's candidates."""
        return x.gather(2, self.tail_slot.clamp(min=0))

    def field(self, name: str) -> Tensor:
        """A per-token statistic of all candidates, [B, H, M]."""
        return self._join(None if self.body is None else self.body.fields[name], self.take_tail(self.tail.fields[name]))

    def vectors(self, which: str) -> Tensor:
        """Keys ("k") or values ("v") of all candidates, [B, H, M, d]."""
        x: Tensor = getattr(self.tail, which)
        index = self.tail_slot.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        return self._join(None if self.body is None else self.body.vectors(which), x.gather(2, index))

    def gather(self, keep: Tensor, fields: bool = True, coding: Coding | None = None) -> Tiles | None:
        """The candidates marked in keep [B, H, M], as tiles, None where there is none; `coding` encodes those of the tail,
        as it did those of the body."""
        counts = keep.sum(-1).cpu().numpy()
        if not counts.any():
            return None
        layout = Layout.of(counts)
        target = layout.destinations(keep)
        from_tail = torch.arange(keep.shape[-1], device=keep.device).expand_as(keep)[keep] >= self.from_body
        row = torch.arange(counts.size, device=keep.device).view(*counts.shape, 1) * self.tail.k.shape[2]
        source = torch.cat([self.body_slot, row + self.tail_slot], -1)[keep]

        def build(tail: Tensor, body: Tensor | None, which: str) -> Tensor:
            """Rows of the flat tail and the flat body, put where they belong."""
            fresh = tail[source if body is None else source[from_tail]]
            if coding is not None and which:
                fresh = coding.write(which, fresh)
            flat = fresh.new_zeros((layout.tiles * layout.width, *fresh.shape[1:]))
            if body is None:
                flat[target] = fresh
            else:
                flat[target[from_tail]] = fresh
                flat[target[~from_tail]] = body[source[~from_tail]]
            return flat.view(layout.tiles, layout.width, *fresh.shape[1:])

        def both(part: Callable[[Tail | Tiles], Tensor], which: str = "") -> Tensor:
            body = None if self.body is None else part(self.body).flatten(0, 1)
            return build(part(self.tail).flatten(0, 2), body, which)

        k, v = both(lambda held: held.k, "k"), both(lambda held: held.v, "v")
        names = list(self.tail.fields) if fields else []
        statistics = {x: both(partial(_field, x)) for x in names}
        positions = torch.zeros(layout.tiles * layout.width, dtype=torch.int32, device=keep.device)
        positions[target] = self.positions[keep].int()
        segment = None if layout.segment is None else sent(layout.segment, keep.device)
        fill = None if layout.fill is None else sent(layout.fill, keep.device)
        placed = positions.view(layout.tiles, layout.width)
        return Tiles(k, v, counts, placed, statistics, segment, fill, coding=coding)


def _field(name: str, held: Tail | Tiles) -> Tensor:
    return held.fields[name]
