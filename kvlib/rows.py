"""Growing buffers of ragged batch rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from kvlib.offload.transfer import host_empty
from kvlib.segment import empty, slack


class Rows:
    """Named buffers [B, H, capacity, ...], of which row r holds the first counts[r] entries.

    The parts named in `host` live in host memory, the others on `device`.  Entries are only ever appended, so a snapshot is
    a copy of the counts.  Capacities are multiples of `step`.
    """

    def __init__(self, batch: int, device: torch.device, host: Iterable[str] = (), step: int = 1):
        self.parts: dict[str, Tensor] = {}
        self.counts = np.zeros(batch, dtype=np.int64)
        self.host = frozenset(host)
        self._device, self._step = device, step

    def append(self, rows: np.ndarray, parts: Mapping[str, Tensor], per: int = 1) -> None:
        """Add entries [R, H, m, ...] to the rows given [R], which must be distinct; every part, the same m.  An entry
        stands for about `per` tokens, which bounds the slack."""
        m = next(iter(parts.values())).shape[2] if parts else 0
        need = int(self.counts[rows].max(initial=0)) + m
        together = len(rows) == len(self.counts) and bool((self.counts == self.counts[0]).all())
        for name, x in parts.items():
            buffer = self._reserve(name, x, need, per)
            if x.is_cuda and not buffer.is_cuda:  # contiguous pieces: others are staged in pageable memory
                for row, new in zip(rows.tolist(), x, strict=True):
                    first = int(self.counts[row])
                    for head, piece in enumerate(new.contiguous()):
                        buffer[row, head, first : first + m].copy_(piece)
                continue
            if together and (np.diff(rows) == 1).all():
                first = int(self.counts[0])
                buffer[:, :, first : first + m] = x
                continue
            for row, new in zip(rows.tolist(), x, strict=True):
                first = int(self.counts[row])
                buffer[row, :, first : first + m] = new
        self.counts = self.counts.copy()
        self.counts[rows] += m

    def _reserve(self, name: str, like: Tensor, need: int, per: int) -> Tensor:
        buffer = self.parts.get(name)
        if buffer is not None and need <= buffer.shape[2]:
            return buffer
        room = max(need, (need + slack(need * per) // per) // self._step * self._step)
        shape = (len(self.counts), like.shape[1], -(-room // self._step) * self._step, *like.shape[3:])
        fresh = (
            host_empty(shape, like.dtype, self._device) if name in self.host else empty(shape, like, device=self._device)
        )
        fresh.zero_()  # what lies past a row's count is read under a weight of zero, so it must be finite
        if buffer is not None:
            used = int(self.counts.max())
            fresh[:, :, :used] = buffer[:, :, :used]
        self.parts = {**self.parts, name: fresh}
        return fresh

    def rewrite(self, row: int, first: int, name: str, x: Tensor, fresh: set[str]) -> None:
        """Replace a row's entries from `first` on by x [H, m, ...], in a buffer that is `fresh`, or becomes so: a snapshot
        may read the old one."""
        if name in fresh:
            self.parts[name][row, :, first : first + x.shape[1]] = x
            return
        with torch.inference_mode(False):
            old = self.parts[name]
            copy = host_empty(tuple(old.shape), old.dtype, self._device) if name in self.host else torch.empty_like(old)
            copy.copy_(old)
            copy[row, :, first : first + x.shape[1]] = x
        self.parts = {**self.parts, name: copy}
        fresh.add(name)

    def shorten(self, row: int, n: int) -> None:
        """Forget a row's newest n entries."""
        self.counts = self.counts.copy()
        self.counts[row] -= n

    def live(self, name: str) -> Tensor:
        """A part [B, H, most entries of any row, ...]; what lies past a row's count means nothing."""
        return self.parts[name][:, :, : int(self.counts.max(initial=0))]

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows [B']; some may repeat, some may go."""
        chosen = rows.cpu().numpy()
        with torch.inference_mode(False):
            moved = {}
            for name, x in self.parts.items():
                if name in self.host:
                    moved[name] = host_empty((len(chosen), *x.shape[1:]), x.dtype, self._device)
                    moved[name].copy_(x.index_select(0, rows.cpu()))
                else:
                    moved[name] = x.index_select(0, rows.to(x.device))
        self.parts, self.counts = moved, self.counts[chosen]

    def snapshot(self) -> Rows:
        """The present entries, which later appends do not disturb; it shares the buffers."""
        twin = object.__new__(Rows)
        twin.__dict__.update(self.__dict__, counts=self.counts.copy())
        return twin

    def copy(self) -> Rows:
        """Independent buffers with the same entries."""
        twin = self.snapshot()
        twin.reorder(torch.arange(len(self.counts), device=self._device))
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """Every storage."""
        yield from self.parts.values()

    def used(self, name: str) -> int:
        """Bytes of a part's entries, slack left out."""
        x = self.parts.get(name)
        if x is None or not x.shape[0] or not x.shape[2]:
            return 0
        return int(self.counts.sum()) * (x[0, :, 0].numel() * x.element_size())
