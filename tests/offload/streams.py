"""Streams played on the CPU, so that races between them show without a GPU."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvlib.offload.transfer import Lane

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HOST, MAIN, LANE = range(3)
STOPPING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


@dataclass(frozen=True)
class Stream:
    """What the lane uses of a torch.cuda.Stream; an Event is a clock that stands still."""

    play: "Streams"
    index: int

    def wait_stream(self, other):
        self.play.order(self.index, self.play.clock[other.index])

    def record_event(self):
        return Event(self.play, self.play.clock[self.index].copy())

    def wait_event(self, event):
        self.play.order(self.index, event.clock)

    def synchronize(self):
        self.play.order(HOST, self.play.clock[self.index])


@dataclass(frozen=True)
class Event:
    play: "Streams"
    clock: np.ndarray


class Streams(TorchDispatchMode):
    """CPU tensors played as a GPU's: an operation belongs to the host or to a stream, each with a vector clock; two that
    touch the same bytes, one of them writing, must be ordered by events.  Memory used by a stream that did not allocate it
    must be recorded, and the host must not read the device.  All is really done at once, in the order of the calls."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.clock = np.zeros((3, 3), dtype=np.int64)  # what each knows of the others
        self.current, self.pinned, self.alive, self.may_stop = MAIN, set(), [], False
        self.home, self.users, self.recorded = {}, defaultdict(set), defaultdict(set)
        self.read, self.written = {}, {}  # per storage: when each last did so, for every 2 bytes
        lane = Lane(torch.device("cpu"))
        lane.stream = Stream(self, LANE)
        monkeypatch.setitem(Lane._of, lane.device, lane)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, self.current))
        monkeypatch.setattr(torch.cuda, "stream", self._inside)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: self.recorded[self._key(x)].add(s.index))

    @contextmanager
    def _inside(self, stream):
        before, self.current = self.current, stream.index
        yield
        self.current = before

    def order(self, who, clock):
        self.clock[who] = np.maximum(self.clock[who], clock)

    def pin(self, x):
        """Name a tensor, not yet used, the host's."""
        key = self._key(x)
        self.pinned.add(key)
        for records in (self.home, self.users, self.read, self.written):
            records.pop(key, None)
        return x

    def _key(self, x):
        self.alive.append(x)  # so that no address comes back
        return x.untyped_storage()._cdata

    def _touch(self, who, x, write, rows=None):
        key = self._key(x)
        units = slice(None)
        step = x.stride(-2) * x.itemsize if x.dim() > 1 else x.itemsize
        if rows is not None and step % 2 == 0:
            units = (rows.numpy()[:, None] * (step // 2) + np.arange(step // 2)).ravel()
        for records in (self.read, self.written):
            records.setdefault(key, np.zeros((3, -(-x.untyped_storage().nbytes() // 2)), dtype=np.int64))
        for other in range(3):
            seen = self.clock[who, other]
            assert (self.written[key][other, units] <= seen).all(), f"{who} races with what {other} wrote"
            assert not write or (self.read[key][other, units] <= seen).all(), f"{who} overwrites what {other} reads"
        (self.written if write else self.read)[key][who, units] = self.clock[who, who]
        if key not in self.pinned:
            self.home.setdefault(key, who)
            self.users[key].add(who)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema, name = func._schema, func._schema.name.removeprefix("aten::")
        given = {a.name: args[i] if i < len(args) else (kwargs or {}).get(a.name) for i, a in enumerate(schema.arguments)}
        wrote = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return out  # a view
        tensors = [(n, x) for n, value in given.items() for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
        on_host = bool(tensors) and all(self._key(x) in self.pinned for _, x in tensors)
        who = HOST if on_host else self.current
        if not on_host:
            masked = name in ("index", "index_put_") and any(
                x.dtype == torch.bool for x in given["indices"] if x is not None
            )
            assert self.may_stop or not (masked or name in STOPPING), f"{name} stops the host"
            self.order(who, self.clock[HOST])
        self.clock[who, who] += 1
        for n, x in tensors:
            self._touch(who, x, n in wrote, _rows(name, n, given))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not wrote:
                if on_host:
                    self.pin(x)
                self._touch(who, x, True)
        return out

    def check_memory(self):
        """Whoever uses memory of the other stream has recorded that."""
        for key, users in self.users.items():
            assert users <= {self.home[key]} | self.recorded[key]


def _rows(name, argument, given):
    """Which rows of an argument an operation touches, None: all."""
    if name in ("index_select", "index_copy_") and argument == "self":
        return given["index"]
    if name == "kvlib::gather_host" and argument in ("source", "target"):
        own, entry = (given["wanted"] >= 0).nonzero(as_tuple=True)
        each = given["wanted" if argument == "source" else "place"]
        return own * given[argument].shape[1] + each[own, entry]
    return None
