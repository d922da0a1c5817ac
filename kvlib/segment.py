"""Segments: disjoint sets of a sequence's tokens, each of which can answer `attend(q) -> (out, lse)`.

`Tail` is the growing dense buffer of the newest tokens; `Tiles` is an immutable, ragged store of kept tokens (the sink
and the body of a head group).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.kernels.attention import EVERYTHING, Partial, Visible, attention
from kvlib.kernels.column_mass import column_mass
from kvlib.kernels.decode import ROWS, decode, serves
from kvlib.kernels.merge import merge_segments
from kvlib.offload.transfer import on_large_pages, sent

if TYPE_CHECKING:
    from kvlib.coded import Coding
    from kvlib.home import Home

TILE = 32  # tokens per tile where heads hold different counts


_CAUSAL = Visible(causal=True)


@dataclass(frozen=True)
class Spec:
    """How the model attends: logits are softcap * tanh(scale * q.k / softcap); `sinks` [Hq] are its own attention sinks."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def of_heads(self, q_heads: Tensor) -> Spec:
        """The same for some of the query heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[q_heads])


def slack(tokens: int) -> int:
    """Spare slots a buffer of `tokens` may carry: 64, or 6 % where that is more."""
    return max(64, int(0.06 * tokens))


def empty(
    shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Storage that outlives the call: never an inference tensor, so that it can be written in any later mode."""
    with torch.inference_mode(False):
        return on_large_pages(torch.empty(shape, dtype=dtype or like.dtype, device=device or like.device))


def close_gaps(x: Tensor, gap: np.ndarray, new: np.ndarray) -> Tensor:
    """Shift each row of x [B, H, T, ...] so that the `gap` [B] dead slots before its newest `new` [B] slots vanish."""
    slot = torch.arange(x.shape[2], device=x.device)
    shift = sent(gap, x.device)[:, None]
    edge = sent(x.shape[2] - new, x.device)[:, None]
    source = (slot - torch.where(slot < edge, shift, 0)).clamp_(min=0)[:, None]
    return x.gather(2, (source if x.dim() == 3 else source.unsqueeze(-1)).expand_as(x))


class Tail:
    """The newest tokens, dense: k [B, H, capacity, d], v [B, H, capacity, dv], and named per-token fields.

    Row r's tokens are the slots starts[r]..end; all rows end together, so one step appends with one slice copy.
    """

    def __init__(self, k: Tensor, v: Tensor, fields: tuple[str, ...] = ()):
        """Buffers for keys and values shaped like one chunk k [B, H, n, d], v [B, H, n, dv]; nothing is stored yet."""
        batch, heads, n, _ = k.shape
        room = n + slack(n)
        self.k = empty((batch, heads, room, k.shape[3]), k)
        self.v = empty((batch, heads, room, v.shape[3]), v)
        self.fields = {name: empty((batch, heads, room), k, torch.float32) for name in fields}
        self.end = 0
        self.starts = np.zeros(batch, dtype=np.int64)
        self.begin = 0  # the first live slot of any row
        self.shared = False  # whether a snapshot reads the same buffers, so that live slots must not be overwritten
        self.repacked = False  # whether a row's slots no longer match the columns of the model's padding mask
        self._index: Tensor | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.end - self.starts

    def append(self, k: Tensor, v: Tensor, new: np.ndarray | None) -> None:
        """Add a chunk [B, H, n, d] of which the last new[r] tokens of row r are real; None: all."""
        n = k.shape[2]
        held = self.lengths if new is not None else None
        self.reserve(n)
        self.k[:, :, self.end : self.end + n].copy_(k)
        self.v[:, :, self.end : self.end + n].copy_(v)
        for field in self.fields.values():
            field[:, :, self.end : self.end + n] = 0
        self.end += n
        if new is not None and held is not None and (new < n).any():
            if held.any():
                self._close_gaps(n - new, new)
            self._move(self.end - held - new)

    def retract(self, hidden: np.ndarray) -> None:
        """Forget each row's newest hidden[r] tokens; the others move up, so that all rows end together."""
        held = self.lengths
        self._close_gaps(hidden, np.zeros_like(hidden))
        self._move(self.end - held + hidden)

    def _close_gaps(self, gap: np.ndarray, new: np.ndarray) -> None:
        """Shift each row's older tokens right over the `gap` padding slots that precede its new tokens."""
        if self.shared:
            self._rebuild(self.k.shape[2])
        for buffer in (self.k, self.v, *self.fields.values()):
            live = buffer[:, :, : self.end]
            live.copy_(close_gaps(live, gap, new))
        self.repacked = True

    def take_back(self, n: int) -> None:
        """Forget the newest n tokens of every row."""
        if self.shared and n:
            self._rebuild(self.k.shape[2])  # a snapshot still reads the slots that come free
        self.end -= n

    def drop(self, oldest: np.ndarray) -> None:
        """Forget the `oldest[r]` first tokens of each row and give back what is then more than slack."""
        self._move(self.starts + oldest)
        self._give_back()

    def _give_back(self) -> None:
        """Shrink to what is used and its slack."""
        used = self.end - self.begin
        if self.k.shape[2] - used > slack(used):
            self._rebuild(used + slack(used))

    def _move(self, starts: np.ndarray) -> None:
        self.starts, self.begin = starts, int(starts.min())
        even = (starts == starts[0]).all()
        self._index = None if even else sent(starts, self.k.device)

    def reserve(self, n: int) -> None:
        """Let n more tokens fit."""
        room, begin = self.k.shape[2], self.begin
        if self.end + n <= room:
            return
        used = self.end - begin
        if begin and used + n <= room and not self.shared:
            for buffer in (self.k, self.v, *self.fields.values()):
                live = buffer[:, :, begin : self.end]
                buffer[:, :, :used].copy_(live if begin >= used else live.clone())
            self._rebase(begin)
        else:
            self._rebuild(used + n + slack(used + n))

    def _rebuild(self, room: int) -> None:
        """Move to fresh buffers of `room` slots, without the free slots in front."""
        begin = self.begin
        used = self.end - begin
        moved = []
        for buffer in (self.k, self.v, *self.fields.values()):
            fresh = empty((*buffer.shape[:2], room, *buffer.shape[3:]), buffer)
            fresh[:, :, :used].copy_(buffer[:, :, begin : self.end])
            moved.append(fresh)
        self.k, self.v, *rest = moved
        self.fields = dict(zip(self.fields, rest, strict=True))
        self.shared = False
        self._rebase(begin)

    def _rebase(self, begin: int) -> None:
        self.repacked |= begin > 0
        self.end -= begin
        self._move(self.starts - begin)

    def _visible(self, window: int | None, sink: int | Tensor) -> tuple[int, Visible]:
        """First slot worth reading, and the visibility of the slots from there on."""
        if self._index is None and window is None:
            return self.begin, _CAUSAL
        start = None if self._index is None else self._index - self.begin
        return self.begin, Visible(True, start=start, window=window, sink=sink)

    def attend(
        self,
        q: Tensor,
        spec: Spec,
        window: int | None = None,
        sink: int | Tensor = 0,
        lse: bool = True,
        probabilities: bool = False,
    ) -> Partial:
        """Causal attention of q [B, Hq, n, d], the queries of the newest n slots; see `Visible` for window and sink.
        Probabilities start at the first live slot of any row."""
        begin, visible = self._visible(window, sink)
        k, v = self.k[:, :, begin : self.end], self.v[:, :, begin : self.end]
        return attention(q, k, v, spec.scale, visible, spec.softcap, lse, probabilities)

    def column_mass(self, q: Tensor, lse: Tensor, spec: Spec, window: int | None = None, sink: int | Tensor = 0) -> Tensor:
        """Probability collected by each slot from the first live one of any row, [B, H, end - begin]."""
        begin, visible = self._visible(window, sink)
        return column_mass(q, self.k[:, :, begin : self.end], lse, spec.scale, visible, spec.softcap)

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows; `rows` [B'] may repeat some and leave others out."""
        with torch.inference_mode(False):
            self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)
            self.fields = {name: field.index_select(0, rows) for name, field in self.fields.items()}
        if self._index is not None or len(rows) != len(self.starts):
            self._move(self.starts[rows.cpu().numpy()])
            self._give_back()

    def snapshot(self) -> Tail:
        """The present state, which later appends and drops do not disturb."""
        self.shared = True
        copy = object.__new__(Tail)
        with torch.inference_mode(False):
            fields = {name: field.clone() for name, field in self.fields.items()}
        copy.__dict__.update(self.__dict__, fields=fields)
        return copy

    def copy(self) -> Tail:
        """An independent tail with the same tokens."""
        shared, twin = self.shared, self.snapshot()
        with torch.inference_mode(False):
            twin.k, twin.v = self.k.clone(), self.v.clone()
        self.shared, twin.shared = shared, False
        return twin

    def take_heads(self, heads: Tensor | None, fields: tuple[str, ...]) -> Tail:
        """An independent tail of some KV heads [H'] (None: all) with only the `fields` named."""

        def taken(x: Tensor) -> Tensor:
            fresh = empty((x.shape[0], x.shape[1] if heads is None else len(heads), *x.shape[2:]), x)
            live = x[:, :, self.begin : self.end]
            fresh[:, :, self.begin : self.end] = live if heads is None else live[:, heads]
            return fresh

        twin = object.__new__(Tail)
        chosen = {name: taken(self.fields[name]) for name in fields}
        twin.__dict__.update(self.__dict__, k=taken(self.k), v=taken(self.v), fields=chosen, shared=False)
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """The storages of keys and values."""
        yield from (self.k, self.v)

    def bookkeeping(self) -> Iterator[Tensor]:
        """Statistics and the first slots of uneven rows."""
        yield from self.fields.values()
        if self._index is not None:
            yield self._index


@dataclass(frozen=True)
class Tiles:
    """Kept tokens, ragged: k [G, P, d], v [G, P, dv], tile g holding tokens of one (batch row, KV head).

    counts [B, H] are host integers.  Where every (row, head) fits one tile of equal size G = B * H and `segment` is None;
    else tiles of `TILE` tokens are handed out in order and `segment` [G] names the flat (row, head) of each.  `fill` [G]
    is the number of valid slots per tile, None where all are.  Tokens of a head are in order of position.
    """

    k: Tensor
    v: Tensor
    counts: np.ndarray
    positions: Tensor  # [G, P] int32
    fields: dict[str, Tensor]  # [G, P] fp32 each
    segment: Tensor | None
    fill: Tensor | None
    home: Home | None = None  # where k and v live, None: with the rest
    coding: Coding | None = None  # how k and v are bytes, None: they are vectors

    def _tiled(self, x: Tensor) -> Tensor:
        """Rows of x [B, H * g, ...] as one group per tile: [G, g, ...]."""
        x = x.reshape(self.counts.size, -1, *x.shape[2:])
        return x if self.segment is None else x[self.segment]

    def _visible(self) -> Visible:
        return EVERYTHING if self.fill is None else Visible(length=self.fill)

    def attend(self, q: Tensor, spec: Spec, probabilities: bool = False) -> Partial:
        """Attention of q [B, Hq, n, d] over all kept tokens; every query row sees all of them.  Probabilities are
        [G, g, P], normalised over the kept tokens of their head."""
        if self.home is not None:
            return self.home.attend(self, q, spec, probabilities)
        few = q.shape[2] * (q.shape[1] // self.counts.shape[1]) <= ROWS
        if q.is_cuda and not probabilities and (few or self.segment is not None or self.fill is not None):
            found = self.attend_ranges(q, spec)
            if found is not None:
                return found
        q_in, visible = self._tiled(q), self._visible()
        if self.coding is not None:
            tiles = self.coding.attend_tiles(q_in, self.k, self.v, spec, visible, probabilities)
        else:
            k, v = self.k[:, None], self.v[:, None]
            tiles = attention(q_in, k, v, spec.scale, visible, spec.softcap, probabilities=probabilities)
        out, lse, p = tiles
        assert lse is not None
        if self.segment is not None:
            out, total, _ = merge_segments(out, lse, self.segment, self.counts.size)
            assert total is not None
            if p is not None:
                p = p * (lse - total[self.segment]).exp()
            lse = total
        return Partial(out.view(*q.shape[:3], out.shape[-1]), lse.view(q.shape[:3]), p)

    def attend_ranges(self, q: Tensor, spec: Spec) -> Partial | None:
        """`attend` by one kernel, each head's tokens as one range of slots; None where there is none for such vectors."""
        if self.coding is not None:
            found = self.coding.attend(q, self.k, self.v, *self._listed, spec)
            if found is not None:
                return found
        k, v = (self._pool(self.vectors(side)) for side in "kv")
        if not serves(q, k, v):
            return None
        start, length = self._ranges_on_device
        most = int(self.counts.max(initial=0))
        return Partial(*decode(q, k, v, spec.scale, spec.softcap or 0.0, most=most, length=length, start=start))

    @cached_property
    def _ranges_on_device(self) -> tuple[Tensor, Tensor]:
        device = self.k.device
        return sent(self.ranges()[2], device), sent(self.counts.astype(np.int32), device)

    @cached_property
    def _listed(self) -> tuple[Tensor, Tensor]:
        """The slots [1, B * H, most] of each head's tokens, past whose number, [1, B * H], they mean nothing."""
        start, length = (x.view(1, -1) for x in self._ranges_on_device)
        place = torch.arange(int(self.counts.max(initial=0)), device=start.device)
        return start.unsqueeze(-1) + place, length

    def column_mass(self, q: Tensor, lse: Tensor, spec: Spec) -> Tensor:
        """Probability collected by each slot, [G, P]."""
        if self.home is not None:
            return self.home.bring(self).column_mass(q, lse, spec)
        k, lse, q = self.k[:, None], self._tiled(lse), self._tiled(q)
        if self.coding is not None:
            q, k = self.coding.keys(q, self.k)
        return column_mass(q, k, lse, spec.scale, self._visible(), spec.softcap)[:, 0]

    def vectors(self, which: str) -> Tensor:
        """Keys ("k") or values ("v") [G, P, d]."""
        held: Tensor = getattr(self, which)
        return held if self.coding is None else self.coding.vectors(which, held)

    def ranges(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """All tiles as one pool k [B, H, G * P, d] and v, and the first slot [B, H] of each head; its tokens follow it."""
        if self.segment is None:
            first = np.arange(self.counts.size) * self.k.shape[1]
        else:
            first = _tile_offsets(self.counts)[:-1] * TILE
        return self._pool(self.k), self._pool(self.v), first.reshape(self.counts.shape)

    def _pool(self, x: Tensor) -> Tensor:
        """What tiles hold, x [G, P, d], as [B, H, G * P, d] that all heads share."""
        return x.flatten(0, 1).expand(*self.counts.shape, -1, -1)

    def slots(self) -> Tensor:
        """Flat slot of each kept token, [B, H, max count], -1 past a head's count."""
        place = np.arange(int(self.counts.max(initial=0)))
        first = self.ranges()[2]
        flat = np.where(place < self.counts[..., None], first[..., None] + place, -1)
        return sent(flat, self.k.device)

    def reorder(self, rows: Tensor) -> Tiles:
        """Select batch rows, as `Tail.reorder`."""
        if self.segment is None:
            heads = self.counts.shape[1]
            uniform = self.fill is None and len(rows) == len(self.counts)
            counts = self.counts if uniform else self.counts[rows.cpu().numpy()]
            tiles = (rows[:, None] * heads + torch.arange(heads, device=rows.device)).flatten()
            return self._select(tiles, counts, None)
        chosen = rows.cpu().numpy()
        offsets = _tile_offsets(self.counts)[:: self.counts.shape[1]]
        counts = self.counts[chosen]
        picked = np.concatenate([np.arange(offsets[r], offsets[r + 1]) for r in chosen])
        return self._select(sent(picked, rows.device), counts, _tile_segments(counts))

    def _select(self, tiles: Tensor, counts: np.ndarray, segment: np.ndarray | None) -> Tiles:
        fill = None if self.fill is None else self.fill.index_select(0, tiles)
        fields = {name: field.index_select(0, tiles) for name, field in self.fields.items()}
        owner = None if segment is None else sent(segment, tiles.device)
        k, v, positions = (x.index_select(0, tiles.to(x.device)) for x in (self.k, self.v, self.positions))
        picked = Tiles(k, v, counts, positions, fields, owner, fill, coding=self.coding)
        return picked if self.home is None else self.home.settle(picked)

    def mass_of(self, p: Tensor, share: Tensor) -> Tensor:
        """Mass [G, P] of one query row: its probabilities p from `attend`, of which this segment has `share` [B, Hq, 1]."""
        return (p * self._tiled(share)).sum(1)

    def with_fields(self, **fields: Tensor) -> Tiles:
        """The same tokens with other statistics."""
        twin = replace(self, fields=fields)
        for name in ("_ranges_on_device", "_listed"):  # where they lie is the same, and need not go to the device again
            if name in self.__dict__:
                twin.__dict__[name] = self.__dict__[name]
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """The storages of keys and values."""
        yield from (self.k, self.v)

    def bookkeeping(self) -> Iterator[Tensor]:
        """Positions, statistics and the tile index."""
        yield self.positions
        yield from self.fields.values()
        yield from (x for x in (self.segment, self.fill) if x is not None)


def _tile_offsets(counts: np.ndarray) -> np.ndarray:
    tiles = -(-counts.ravel() // TILE)
    return np.concatenate([[0], tiles.cumsum()])


def _tile_segments(counts: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(counts.size), -(-counts.ravel() // TILE))


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each (row, head) go: the shape of a new `Tiles` and the destination slot of every token."""

    counts: np.ndarray
    tiles: int
    width: int
    segment: np.ndarray | None
    fill: np.ndarray | None

    @classmethod
    def of(cls, counts: np.ndarray) -> Layout:
        """One tile per (row, head) where the counts are alike, else tiles of TILE tokens."""
        most, least = int(counts.max()), int(counts.min())
        if most - least <= TILE:
            fill = None if most == least else counts.ravel()
            return cls(counts, counts.size, most, None, fill)
        segment = _tile_segments(counts)
        within = np.arange(len(segment)) - _tile_offsets(counts)[:-1][segment]
        fill = np.minimum(TILE, counts.ravel()[segment] - within * TILE)
        return cls(counts, len(segment), TILE, segment, fill)

    def destinations(self, keep: Tensor) -> Tensor:
        """Flat slot of every token marked in keep [B, H, M], in the order of `keep.nonzero()`."""
        rank = keep.cumsum(-1) - 1
        per_head = self.width * np.arange(self.counts.size) if self.segment is None else None
        first = per_head if per_head is not None else _tile_offsets(self.counts)[:-1] * TILE
        first_slot = sent(first, keep.device).view(*self.counts.shape, 1)
        return (first_slot + rank)[keep]
