"""Device slots that keep the most recently read runs of a body in host memory, apart for each (batch row, KV head)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kvlib.kernels.gather_host import gather_host
from kvlib.offload.transfer import Fetch, Lane, as_rows


class Traffic(NamedTuple):
    """What a `Resident` was asked for: runs that had a slot, runs that were copied, and the bytes of the latter."""

    hits: int
    misses: int
    moved: int


class Resident:
    """Slots for runs of `run` consecutive tokens, for each (batch row, KV head); the least recently fetched ones give way.

    Run r covers tokens r * run .. (r + 1) * run - 1 of host tensors [B, H, cap, ...], contiguous and with `cap` a multiple
    of `run`, that are passed in at each call.  Slot 0 of each head is blank and stays so: it is the slot of what is
    nowhere, which leaves the bookkeeping without branches and makes reads through it harmless.
    """

    def __init__(self, batch: int, heads: int, run: int, device: torch.device | str):
        """Without room: see `reserve`."""
        self.run, self.device = run, Lane.of(device).device
        self._store: dict[str, Tensor] = {}  # [B, H, (1 + room) * run, ...]
        self._clock = 0  # fetches so far
        self._pending: Fetch | None = None
        # Runs count from 1 here, so that 0 is none: the slot of each run, the run in each slot, and the slot's place in
        # the order of eviction: last fetch << 32 | slot.
        self._slot_of = self._zeros(batch, heads, 1, dtype=torch.int32)
        self._run_in = self._zeros(batch, heads, 1)
        self._used = self._zeros(batch, heads, 1)
        self.hits, self.misses = self._zeros(), self._zeros()  # int64 scalars, right once the last fetch was waited for

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Device storage that outlives the call, as `host_empty`, and that the lane may write."""
        with torch.inference_mode(False):
            fresh = torch.zeros(shape, dtype=dtype, device=self.device)
        Lane.of(self.device).share(fresh)
        return fresh

    def _resized(self, x: Tensor, length: int) -> Tensor:
        """x [B, H, n, ...] with `length` slots, the new ones blank."""
        fresh = self._zeros(*x.shape[:2], length, *x.shape[3:], dtype=x.dtype)
        kept = min(length, x.shape[2])
        fresh[:, :, :kept] = x[:, :, :kept]
        return fresh

    @property
    def room(self) -> int:
        """Runs that each head has slots for."""
        return self._run_in.shape[2] - 1

    def reserve(self, runs: int, parts: Mapping[str, Tensor]) -> None:
        """Make room for at least `runs` runs per head of tensors like `parts`; what is resident stays."""
        if self._store and runs <= self.room:
            return
        self.settle()
        held, slots = 1 + self.room, 1 + max(runs, self.room)
        for name, x in parts.items():
            blank = x.new_empty((*self._run_in.shape[:2], 0, *x.shape[3:]), device=self.device)
            self._store[name] = self._resized(self._store.get(name, blank), slots * self.run)
        self._run_in, self._used = self._resized(self._run_in, slots), self._resized(self._used, slots)
        self._used[:, :, held:] = torch.arange(held, slots, device=self.device)

    def fetch(self, parts: Mapping[str, Tensor], runs: Tensor, valid: Tensor | None = None) -> Fetch:
        """Give slots to runs [B, H, a] int64, where valid [B, H, a]; those of one (row, head) are distinct.

        Raises ValueError where `a` is more than `room`, or `parts` are not like those that room was made for.
        """
        lane, asked = Lane.of(self.device), runs.shape[-1]
        if asked > self.room:
            raise ValueError(f"{asked} runs asked for, but there is room for {self.room}")
        moves = self._moves(parts)
        self.settle()
        self._fit(min(x.shape[2] for x in parts.values()) // self.run)
        runs = runs + 1 if valid is None else torch.where(valid, runs + 1, 0)
        hits = self._slot_of.gather(-1, runs).long()
        with lane.work():
            wanted, place, most = self._admit(runs, hits)
            complete = hits + place
            if most:
                missing, slots = (x.flatten(0, 1) for x in (wanted - 1, place))
                # No hit is a victim of its own fetch: what reads hits meanwhile is not waited for.
                for source, target in moves:
                    gather_host(source, target, missing, slots)
        lane.share(runs, hits)
        self._pending = Fetch(hits, complete, most, lane)
        return self._pending

    def _moves(self, parts: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Host and device tensors as rows of one run each, [B * H, ., words]."""
        if parts.keys() != self._store.keys():
            raise ValueError(f"room was made for {[*self._store]}, not for {[*parts]}")
        for name, x in parts.items():
            store = self._store[name]
            shape = (*store.shape[:2], x.shape[2], *store.shape[3:])
            if x.shape != shape or x.dtype != store.dtype or x.shape[2] % self.run or not x.is_contiguous():
                raise ValueError(f"{name}: expected {store.dtype} {shape}, contiguous, whole runs of {self.run} tokens")
        with torch.inference_mode(False):  # else the views were inference tensors, which only that mode may write
            return [(as_rows(x, self.run), as_rows(self._store[name], self.run)) for name, x in parts.items()]

    def _admit(self, runs: Tensor, hits: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mark the hits as used and hand slots to the misses: the runs that miss and their slots, both 0 elsewhere, and
        what no (row, head) misses more than."""
        self._clock += 1
        now = self._clock << 32
        miss = (runs > 0) ^ (hits > 0)
        rank = miss.cumsum(-1).mul_(miss)
        # How many slots are needed cannot be asked of a GPU without stopping the host.
        most = int(miss.count_nonzero(-1).max()) if Lane.of(self.device).stream is None else runs.shape[-1]
        self._used.scatter_(-1, hits, hits + now)
        self._used[..., 0].zero_()  # slot 0 comes first, for what is no miss
        place = self._used.topk(1 + most, largest=False).indices.gather(-1, rank)
        wanted = runs * miss
        self._slot_of.scatter_(-1, self._run_in.gather(-1, place), 0)
        self._slot_of.scatter_(-1, wanted, place.int())
        self._run_in.scatter_(-1, place, wanted)
        self._used.scatter_(-1, place, place + now)
        self.hits += (hits > 0).sum()
        self.misses += miss.sum()
        return wanted, place, most

    def settle(self) -> None:
        """Let go of the last fetch.  Its misses count as resident already, so it is finished first if nobody waited."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def _fit(self, runs: int) -> None:
        """Follow the body's capacity with the table of runs, which so has no slack but the body's."""
        if 1 + runs != self._slot_of.shape[2]:
            self._drop(self._run_in > runs)
            self._slot_of = self._resized(self._slot_of, 1 + runs)

    def take(self, name: str, slots: Tensor) -> Tensor:
        """Tokens [B, H, m, ...] of a part in token slots [B, H, m] int64: slot of the run * `run` + place within."""
        store = self._store[name]
        head = torch.arange(store.shape[0] * store.shape[1], device=slots.device).view(*store.shape[:2], 1)
        index = torch.add(slots, head, alpha=store.shape[2])
        return store.flatten(0, 2).index_select(0, index.flatten()).view(*slots.shape, *store.shape[3:])

    def buffer(self, name: str) -> Tensor:
        """A part's token slots [B, H, slots, ...]."""
        return self._store[name]

    def _drop(self, gone: Tensor) -> None:
        """Empty the slots marked in gone [B, H, 1 + room]; they are the first to be filled again."""
        self._slot_of.scatter_(-1, self._run_in * gone, 0)
        self._run_in.masked_fill_(gone, 0)
        self._used.copy_(torch.where(gone, torch.arange(gone.shape[2], device=self.device), self._used))

    def forget(self, row: int, first: int, last: int) -> None:
        """Runs first .. last - 1 of a batch row were rewritten on the host and are no longer resident."""
        self.settle()
        gone = torch.zeros_like(self._run_in, dtype=torch.bool)
        gone[row] = (self._run_in[row] > first) & (self._run_in[row] <= last)
        self._drop(gone)

    def forget_from(self, counts: Tensor) -> None:
        """Only the first counts [B] runs of each batch row are still resident, if they were."""
        self.settle()
        self._drop(self._run_in > counts.view(-1, 1, 1))

    def clear(self) -> None:
        """Forget all runs and counts; the room stays."""
        self.settle()
        self._drop(self._run_in > 0)
        self.hits.zero_()
        self.misses.zero_()

    def _with(self, change: Callable[[Tensor], Tensor]) -> Resident:
        self.settle()
        twin = object.__new__(Resident)
        with torch.inference_mode(False):
            store = {name: change(x) for name, x in self._store.items()}
            tables = {name: change(getattr(self, name)) for name in ("_slot_of", "_run_in", "_used")}
            counts = {"hits": self.hits.clone(), "misses": self.misses.clone()}
        twin.__dict__.update(self.__dict__, _store=store, **tables, **counts)
        Lane.of(self.device).share(*twin.tensors())
        return twin

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows; `rows` [B'] may repeat some and leave others out."""
        self.__dict__.update(self._with(lambda x: x.index_select(0, rows)).__dict__)

    def copy(self) -> Resident:
        """An independent twin: the same runs in slots of its own, the same counts."""
        return self._with(Tensor.clone)

    def counts(self) -> Traffic:
        """Hits, misses and bytes moved so far, for which the host waits."""
        self.settle()
        misses = int(self.misses)
        per_run = sum(x[:1, :1, : self.run].nbytes for x in self._store.values())
        return Traffic(int(self.hits), misses, misses * per_run)

    def tensors(self) -> Iterator[Tensor]:
        """All device storages."""
        yield from (*self._store.values(), self._slot_of, self._run_in, self._used, self.hits, self.misses)
