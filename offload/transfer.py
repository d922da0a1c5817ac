"""Bytes on their way between host memory and a device: where they wait, and the stream on which they travel."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

_LARGE_PAGE = 1 << 21
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
if _MADVISE is not None:
    _MADVISE.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Host storage for a layer that lives on `device`, page-locked where that is a GPU, so that copies overlap with
    computing and kernels of the lane can read it; never an inference tensor, so that any later mode can write it."""
    with torch.inference_mode(False):
        host = torch.empty(shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda")
    Lane.of(device).share_host(host)
    return on_large_pages(host)


def on_large_pages(x: Tensor) -> Tensor:
    """Freshly allocated x, for which Linux is asked for large pages if it is large and in ordinary memory: rows far apart
    are then read without a walk through page tables for each.  A wish: where it is not granted, nothing changes."""
    begin = -(-x.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    size = (x.data_ptr() + x.nbytes) // _LARGE_PAGE * _LARGE_PAGE - begin
    if size > 0 and _MADVISE is not None and x.is_cpu and not x.is_pinned():
        _MADVISE(begin, size, mmap.MADV_HUGEPAGE)
    return x


def sent(x: np.ndarray, device: torch.device) -> Tensor:
    """What the host knows, on `device`, without waiting for what the device is still doing."""
    return torch.from_numpy(x).to(device, non_blocking=True)


class Lane:
    """The side stream of a device, shared by all that move bytes to it; on the CPU there is none and work is done at once.

    Two streams see each other's results only through events, and the allocator gives a freed block back to the stream it
    came from without asking the other one.  Hence three rules: work on the lane starts after what the current stream was
    given before (`work`), the current stream reads the lane's results only after `join`, and a tensor that both streams
    touch is named to `share`.  Page-locked memory needs no such care: its allocator remembers the copies it is part of and,
    of memory from `host_empty`, the lane, whose kernels read it too.
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

    def share_host(self, x: Tensor) -> None:
        """Keep page-locked memory from being reused, once it is freed, before the lane is done with what it was given till
        then: its allocator waits for the streams of copies, of which this makes one, but knows nothing of kernels."""
        if self.stream is not None and x.numel():
            with self.work(ordered=False):
                x.view(-1)[:1].to(self.device, non_blocking=True)


def as_rows(x: Tensor, run: int) -> Tensor:
    """Contiguous x [B, H, cap, ...] as rows of `run` tokens [B * H, cap / run, words], in words of 16 bytes where a row is
    made of such: the CPU copies rows word by word, so fp32 goes three times faster and bf16 more."""
    rows = x.view(x.shape[0] * x.shape[1], x.shape[2] // run, run * prod(x.shape[3:]))
    return rows.view(torch.complex128) if rows.shape[2] * x.itemsize % 16 == 0 else rows


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
    hit [B, H, a] bool.
    most_missing: no (row, head) misses more runs.  On the CPU the largest number that one does miss; on a GPU all that were
        asked for, since the host never waits to learn what missed.

    Until `wait` no other slots may be read.  The host's buffers may be written by what the current stream is given after
    `wait`, and by the host itself once it has waited for that.
    """

    def __init__(self, hits: Tensor, complete: Tensor, most_missing: int, lane: Lane):
        """Slots of the hits, and those of all runs, which are filled once the lane has come this far."""
        self.slots, self.hit, self.most_missing = hits, hits > 0, most_missing
        self._complete, self._lane, self._mark = complete, lane, lane.mark()

    def wait(self) -> None:
        """Let the current stream wait for the copies, so that `slots` are right for misses too; the host does not wait."""
        self._lane.join(self._mark)
        self._lane.share(self._complete)
        self.slots = self._complete
