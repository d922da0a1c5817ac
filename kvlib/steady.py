"""A decode step between two seals whose every changing number is on the device, so that a CUDA graph can replay it.

Between two seals tokens only enter the tail.  What a step does then depends on the host for nothing but sizes that are
bounds: where the token goes, how much of the tail a query sees and how much of the body it may read are counters on the
device, which all rise or fall by one per token.  Sealing stays on the host, outside of what is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvlib.group import HeadGroup
from kvlib.indexed import Indexed
from kvlib.kernels.attention import Partial
from kvlib.kernels.decode import decode
from kvlib.kernels.merge import merge
from kvlib.kernels.ran import Noting
from kvlib.layer import Layer
from kvlib.ranked import Query
from kvlib.recall import lse_of, room
from kvlib.segment import Spec, Tail, Tiles

AHEAD = 256  # tokens for which a tail is given room at once
_Kind = tuple[int, torch.dtype, tuple[int, ...]]  # step, type and shape of a counter


class Clock:
    """Counters on a device, shared by all that count alike, and set anew in place: their addresses stay."""

    def __init__(self, device: torch.device):
        self.device = device
        self._counters: dict[tuple[_Kind, int], Tensor] = {}
        self._known: dict[tuple[_Kind, bytes], Tensor] = {}
        self._taken: dict[_Kind, int] = {}

    def begin(self) -> None:
        """Hand out the counters anew, in the same order."""
        self._known, self._taken = {}, {}

    def counter(self, values: np.ndarray, step: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """A counter with these values now, which changes by `step` (-1, 0 or 1) with each token."""
        host = torch.from_numpy(np.array(values)).to(dtype)
        kind = (step, dtype, tuple(host.shape))
        content = (kind, host.numpy().tobytes())
        if content not in self._known:
            place = self._taken.get(kind, 0)
            self._taken[kind] = place + 1
            if (kind, place) not in self._counters:
                with torch.inference_mode(False):
                    self._counters[kind, place] = torch.empty(host.shape, dtype=dtype, device=self.device)
            self._known[content] = self._counters[kind, place].copy_(host)
        return self._known[content]

    def tick(self) -> None:
        """One token more."""
        for step in (-1, 1):
            moving = [x for ((own, _, _), _), x in self._counters.items() if own == step]
            if moving:
                torch._foreach_add_(moving, step)


@dataclass(frozen=True)
class Range:
    """A run of tokens per (row, KV head): k [B, H, T, d], v [B, H, T, dv], of which `length` [B * H] from `start` on are
    read, at most `most`."""

    k: Tensor
    v: Tensor
    most: int
    length: Tensor
    start: Tensor | None

    def attend(self, q: Tensor, spec: Spec) -> Partial:
        """Attention of q [B, Hq, 1, d]."""
        softcap = spec.softcap or 0.0
        return Partial(
            *decode(q, self.k, self.v, spec.scale, softcap, most=self.most, length=self.length, start=self.start)
        )

    def addresses(self) -> Iterator[int]:
        """What a recorded step refers to."""
        yield from (self.k.data_ptr(), self.v.data_ptr(), self.k.shape[2], self.most, self.length.data_ptr())
        yield 0 if self.start is None else self.start.data_ptr()


def refusal(group: HeadGroup) -> str | None:
    """Why a group's decode step cannot be recorded, None where it can."""
    selector, evictor = group.selector, group.evictor
    if group.tier is not None:
        return f"{group.tier.name} moves bytes at every step"
    if group.codec is not None:
        return f"{group.codec.name} is read by kernels that take sizes from the host"
    if group.needs.mass and group.online and evictor is not None:
        return f"{evictor.name} counts attention at every step"
    if selector is not None and (selector.remembers or selector.reads_keys or selector.scope == "query_head"):
        return f"{selector.name} chooses by what the host remembers: use quest(every=1), or another scope"
    if getattr(selector, "estimate", False):
        return "estimates take sizes from the host: leave estimate out"
    return None


class SteadyGroup:
    """One head group between two seals."""

    def __init__(self, group: HeadGroup, clock: Clock):
        assert group.tail is not None
        self.group, self._clock = group, clock
        self.tail = group.tail
        self.slot = clock.counter(np.array([self.tail.end]), 1, torch.int64)
        self.ranges = [*self._kept(), self._newest()]
        self.body = group.body if isinstance(group.body, Indexed) else None
        self.reads: tuple[Tensor, Tensor, Tensor, int] | None = None  # as of `Indexed.read_steadily`
        self.spare: int | None = None  # tokens that may come before a body that is read whole is not any more
        if self.body is not None:
            self._read_body(self.body)

    def _wide(self, values: np.ndarray) -> np.ndarray:
        """Values of rows [B] or of each head [B, H], flat for each head."""
        rows = values[:, None] if values.ndim == 1 else values
        return np.broadcast_to(rows, (len(rows), self.tail.k.shape[1])).ravel()

    def _newest(self) -> Range:
        """The tail, or its newest part under a window."""
        tail, (window, _) = self.tail, self.group.band(prompt=False)
        length, step, starts, moving = tail.lengths + 1, 1, tail.starts, 0
        if window is not None and (tail.lengths >= window).all():
            starts, moving = np.full_like(starts, tail.end + 1 - window), 1
            length, step = np.full_like(length, window), 0
        counter = self._clock.counter
        first = counter(self._wide(starts), moving, torch.int64)
        return Range(tail.k, tail.v, tail.k.shape[2], counter(self._wide(length), step), first)

    def _kept(self) -> Iterator[Range]:
        """What no step changes and every query reads: the sinks, and what an evictor kept."""
        for tiles in (self.group.sink, self.group.body):
            if isinstance(tiles, Tiles):
                k, v, first = tiles.ranges()
                most, counter = int(tiles.counts.max()), self._clock.counter
                yield Range(k, v, most, counter(tiles.counts.ravel(), 0), counter(first.ravel(), 0, torch.int64))

    def _read_body(self, body: Indexed) -> None:
        counter = self._clock.counter
        left = np.maximum(room(self.group) - 1, 0)  # the coming token takes a place in the tail
        if not body.selector.selects() or (left >= body.counts).all():
            k, v = body.store.own["k.x"], body.store.own["v.x"]
            length = counter(self._wide(body.counts), 0)
            self.spare = 1 + int((left - body.counts).min()) if body.selector.selects() else None
            self.ranges.append(Range(k, v, k.shape[2], length, None))
            self.body = None
        elif left.any():
            most = int(left.max())
            most = min(-(-most // 64) * 64, body.store.own["k.x"].shape[2])
            self.reads = counter(left, -1), counter(body.counts, 0), counter(body.unit_counts(), 0), most
        else:
            self.body = None

    @property
    def steps(self) -> int:
        """Tokens that may come before the host has to look again."""
        left = self.tail.k.shape[2] - self.tail.end
        if self.group.seals:
            left = min(left, self.group.until_seal)
        window, sink = self.group.band(prompt=False)
        if window is not None and (not isinstance(sink, int) or sink or not (self.tail.lengths >= window).all()):
            left = min(left, window - int(self.tail.lengths.max()))
        if self.reads is not None:
            left = min(left, int(room(self.group).min()))
        elif self.spare is not None:
            left = min(left, self.spare)
        return max(0, left)

    def addresses(self) -> tuple[int, ...]:
        """All that a recorded step takes from the host: while these stay, it can be replayed."""
        found = [self.slot.data_ptr(), *(x for span in self.ranges for x in span.addresses())]
        if self.body is not None and self.reads is not None:
            *counters, most = self.reads
            found += [most, self.body.longest, *(x.data_ptr() for x in counters)]
            found += [x.data_ptr() for _, _, x in self.body.storages()]
        return tuple(found)

    def step(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
        """Take in one token k [B, H, 1, d], v [B, H, 1, dv] and attend its query q [B, Hq, 1, d]; [B, Hq, 1, dv] fp32."""
        self.tail.k.index_copy_(2, self.slot, k)
        self.tail.v.index_copy_(2, self.slot, v)
        parts = [span.attend(q, spec) for span in self.ranges]
        if self.body is not None and self.reads is not None:
            query = Query(q, q[:, :, 0], lse_of(parts, spec), spec)
            parts.append(self.body.read_steadily(query, *self.reads))
        return merge(parts, spec.sinks).out

    def advance(self) -> None:
        """Tell the host that a step was taken, and seal what has become due."""
        self.tail.end += 1
        self.group.tokens = self.group.tokens + 1
        self.group.until_seal -= 1
        if self.group.seals and self.group.until_seal <= 0:
            self.group.seal()


class Steady:
    """One layer between two seals.  Raises ValueError where its recipe's steps cannot be recorded."""

    def __init__(self, layer: Layer, clock: Clock, per_kv: int):
        for group in layer.groups:
            reason = refusal(group)
            if reason is not None:
                raise ValueError(f"this step cannot be recorded: {reason}")
            group.settle()
            group.finish_prefill()
            assert group.tail is not None
            if not group.seals or group.tail.end + group.until_seal > group.tail.k.shape[2]:
                _make_room(group.tail, AHEAD if not group.seals else group.until_seal)
        self.layer = layer
        self.groups = [SteadyGroup(group, clock) for group in layer.groups]
        self._places = layer.places(per_kv, clock.device) if len(layer.groups) > 1 else None

    @property
    def steps(self) -> int:
        """Tokens that may come before the host has to look again."""
        return min(group.steps for group in self.groups)

    def addresses(self) -> tuple[int, ...]:
        """See `SteadyGroup.addresses`."""
        return tuple(x for group in self.groups for x in group.addresses())

    def step(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
        """One token of each row: q [B, Hq, 1, d], k [B, H, 1, d], v [B, H, 1, dv]; returns [B, Hq, 1, dv] in q's dtype."""
        with Noting(self.layer.ran):
            return self._step(q, k, v, spec).to(q.dtype)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
        if self._places is None:
            return self.groups[0].step(q, k, v, spec)
        outs = [
            group.step(q[:, q_heads], k[:, kv_heads], v[:, kv_heads], spec.of_heads(q_heads))
            for group, (kv_heads, q_heads) in zip(self.groups, self._places, strict=True)
        ]
        assert self.layer.inverse is not None
        return torch.cat(outs, 1).index_select(1, self.layer.inverse)

    def advance(self) -> None:
        """Tell the host that a step was taken, and seal what has become due."""
        for group in self.groups:
            group.advance()


def _make_room(tail: Tail, tokens: int) -> None:
    """Let a tail take `tokens` more without moving."""
    if tail.k.shape[2] - tail.end < tokens:
        tail.reserve(tokens)
