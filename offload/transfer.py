"""Bytes on their way between host memory and a device: where they wait, and the stream on which they travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import ClassVar

import torch
from torch import Tensor


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Host storage for a layer that lives on `device`, page-locked where that is a GPU, so that copies overlap with
    computing; never an inference tensor, so that it can be written in any later mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda")


class Lane:
    """The side stream of a device, shared by all that move bytes to it; on the CPU there is none and work is done at once.

    Two streams see each other's results only through events, and the allocator gives a freed block back to the stream it
    came from without asking the other one.  Hence three rules: work on the lane starts after what the current stream was
    given before (`work`), the current stream reads the lane's results only after `join`, and a tensor that both streams
    touch is named to `share`.  Page-locked memory needs no such care: its allocator remembers the copies it is part of.
    """

    _of: ClassVar[dict[torch.device, Lane]] = {}

    def __init__(self, device: torch.device):
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, device: torch.device | str) -> Lane:
        """The one lane of `device`, made at first use."""
        device = torch.device(device)
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in cls._of:
            cls._of[device] = cls(device)
        return cls._of[device]

    @contextmanager
    def work(self, ordered: bool = True) -> Iterator[None]:
        """Give what is issued inside to the lane, to be done after what the current stream was given so far; with
        `ordered` False after what the lane was given so far, whatever the current stream does meanwhile."""
        if self.stream is None:
            yield
            return
        if ordered:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """The point which the lane will have reached when all that it was given so far is done."""
        return None if self.stream is None else self.stream.record_event()

    def reach(self, mark: torch.cuda.Event | None) -> None:
        """Let the host wait for the lane to reach `mark`."""
        if mark is not None:
            mark.synchronize()

    def join(self, mark: torch.cuda.Event | None) -> None:
        """Let the current stream wait for the lane to reach `mark`; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def share(self, *tensors: Tensor) -> None:
        """Keep the memory of `tensors` from being reused, once they are freed, before both streams are done with them."""
        if self.stream is not None:
            for tensor in tensors:
                tensor.record_stream(self.stream)
                tensor.record_stream(torch.cuda.current_stream(self.device))

    def to_host(self, x: Tensor) -> Tensor:
        """x in host memory, to be called inside `work`; to be read once the host has seen the lane `reach` a later mark."""
        if self.stream is None:
            return x
        host = host_empty(tuple(x.shape), x.dtype, self.device)
        return host.copy_(x, non_blocking=True)

    def to_device(self, x: Tensor) -> Tensor:
        """x, storage from `host_empty`, on the device, to be called inside `work`."""
        return x.to(self.device, non_blocking=True)


def as_rows(x: Tensor, run: int) -> Tensor:
    """Contiguous x [B, H, cap, ...] as rows of `run` tokens, in words of 16 bytes where a row is made of such: the CPU
    copies rows word by word, so fp32 goes three times faster and bf16 more."""
    rows = x.view(-1, run * prod(x.shape[3:]))
    return rows.view(torch.complex128) if rows.shape[1] * x.itemsize % 16 == 0 else rows


def stream(
    parts: Mapping[str, Tensor], stop: int, piece: int, device: torch.device | str
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Walk tokens 0..stop of host tensors [B, H, cap, ...] as tensors on `device`, at most `piece` tokens at a time.

    Yields (first, last, {name: [B, H, last - first, ...]}).  The next piece is copied while the caller computes with the
    present one, whose tensors hold their values until the next is asked for; the host's tensors must not be written
    meanwhile.  On the CPU the pieces are views of them.  Raises ValueError where there are fewer than `stop` tokens.
    """
    room = min((x.shape[2] for x in parts.values()), default=stop)
    if piece < 1 or not 0 <= stop <= room:
        raise ValueError(f"cannot walk {stop} of {room} tokens in pieces of {piece}")
    spans = [(first, min(first + piece, stop)) for first in range(0, stop, piece)]
    lane = Lane.of(device)
    if lane.stream is None:
        return ((first, last, {name: x[:, :, first:last] for name, x in parts.items()}) for first, last in spans)
    return _copied(dict(parts), spans, lane)


def _copied(
    parts: dict[str, Tensor], spans: list[tuple[int, int]], lane: Lane
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    width = max((last - first for first, last in spans), default=0)
    # Two buffers for the whole walk: fresh ones for each piece would pile up while the host runs ahead of the device.
    buffers: list[dict[str, Tensor]] = []
    for _ in spans[:2]:
        with torch.inference_mode(False):
            shapes = {name: (*x.shape[:2], width, *x.shape[3:]) for name, x in parts.items()}
            buffers.append({n: torch.empty(s, dtype=parts[n].dtype, device=lane.device) for n, s in shapes.items()})
        lane.share(*buffers[-1].values())

    def load(i: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        first, last = spans[i]
        piece = {name: x[:, :, : last - first] for name, x in buffers[i % 2].items()}
        with lane.work():  # after the computing with piece i - 2, which was in this buffer
            for name, x in parts.items():
                # Row by row, because a copy that is not contiguous on both sides goes through pageable memory and blocks.
                rows = piece[name].flatten(0, 1).unbind()
                for row, source in zip(rows, x[:, :, first:last].flatten(0, 1).unbind(), strict=True):
                    row.copy_(source, non_blocking=True)
        return piece, lane.mark()

    coming = load(0) if spans else None
    for i, (first, last) in enumerate(spans):
        assert coming is not None
        piece, mark = coming
        coming = load(i + 1) if i + 1 < len(spans) else None
        lane.join(mark)
        yield first, last, piece


class Fetch:
    """Runs on their way to the device: the hits can be read at once, all of them after `wait`.

    slots [B, H, a] int64 holds the slot of each run: 0, a blank run, where it is not valid or, before `wait`, not a hit.
    hit [B, H, a] bool.  Until `wait` the host's buffers must not be written and no other slots be read.
    """

    def __init__(self, hits: Tensor, complete: Tensor, orders: Tensor, moves: list[tuple[Tensor, Tensor]], lane: Lane):
        """Slots of the hits and of all runs; `orders` [2, B, H, a], on the host once the lane has come this far: each
        missing run, counted from 1, and its slot, both 0 elsewhere; `moves`: from these rows to those, a row a run."""
        self.slots, self.hit, self._complete = hits, hits > 0, complete
        self._orders, self._moves = orders, moves
        self._lane, self._mark = lane, lane.mark()
        self._most: int | None = None

    @property
    def most_missing(self) -> int:
        """The largest number of misses in one (row, head).  The host waits for the ids that a GPU sends it, so ask when
        the work on the hits has been issued."""
        if self._most is None:
            self._lane.reach(self._mark)
            self._most = int(self._orders[0].count_nonzero(-1).max())
            if self._most:
                self._copy()
            self._moves = []
        return self._most

    def wait(self) -> None:
        """Let the current stream wait for the copies, so that `slots` are right for misses too.  The host waits for the
        ids, as in `most_missing`, but never for a copy."""
        if self.most_missing:
            self._lane.join(self._mark)
        self._lane.share(self._complete)
        self.slots = self._complete

    def _copy(self) -> None:
        """Gather the missing runs on the host, send them, and put them into their slots."""
        _, batch, heads, asked = self._orders.shape
        wanted, place = self._orders.flatten(1)
        missing = wanted.nonzero().flatten()
        head, run, slot = missing // asked, wanted[missing] - 1, place[missing]
        # Not after the current stream, which reads hits meanwhile: no hit is a victim of its own fetch.
        lane = self._lane
        with lane.work(ordered=False):
            places = host_empty(slot.shape, slot.dtype, lane.device)
            torch.add(slot, head, alpha=len(self._moves[0][1]) // (batch * heads), out=places)
            places = lane.to_device(places)
            for source, target in self._moves:
                rows = torch.add(run, head, alpha=len(source) // (batch * heads))
                staged = host_empty((len(rows), source.shape[1]), source.dtype, lane.device)
                torch.index_select(source, 0, rows, out=staged)
                target.index_copy_(0, places, lane.to_device(staged))
        self._mark = lane.mark()
