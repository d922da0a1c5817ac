"""The body of a head group under a selector: every token kept, ordered by unit, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.home import FEW
from kvlib.kernels.attention import EVERYTHING, Partial, Visible, attend_listed, attention
from kvlib.kernels.merge import merge
from kvlib.kernels.selection import Listing, taken
from kvlib.offload.resident import Resident, Traffic
from kvlib.offload.transfer import sent, stream
from kvlib.policies.encoding import (
    DENSE,
    Form,
    Reading,
    Stored,
    attend,
    attend_in_place,
    attend_prepared,
    finished,
    prepared,
)
from kvlib.policies.selection import Past, Selector, Units
from kvlib.policies.tier.host import Host
from kvlib.ranked import DECODED, Query, Ranked
from kvlib.segment import Spec
from kvlib.store import Store

if TYPE_CHECKING:
    from kvlib.kernels.rotary import Rotary

PIECE = 4096  # tokens of a body in host memory that are on the device at once when all of it is read


@dataclass
class Meter:
    """Bytes of a body in host memory that were read whole: what happened stays counted when tokens are taken back."""

    moved: int = 0


class Indexed(Ranked):
    """A body of which a query reads the units its selector chooses, on `device` or in the tier's memory."""

    def __init__(
        self,
        selector: Selector,
        tier: Host | None,
        batch: int,
        heads: int,
        device: torch.device,
        base: np.ndarray,
        implicit: bool,
        fixed: dict[str, Tensor],
        forms: tuple[Form, Form] = (DENSE, DENSE),
        rotary: Rotary | None = None,
    ):
        self.tier, self.device = tier, device
        sides = "" if tier is None else "v" if selector.reads_keys else "kv"
        run = selector.run or 1
        store = Store(forms, batch, heads, device, sides, self.away, run, rotary)
        super().__init__(selector, store, base, implicit, fixed)
        moves = tier is not None and not tier.attend and selector.selects()
        self.resident = Resident(batch, heads, run, device) if moves else None
        self.streamed = Meter()

    # --------------------------------------------------------------------------------------------------- taking in
    def append(self, rows: np.ndarray, k: Tensor, v: Tensor, position: Tensor, units: Units, fresh: bool = True) -> None:
        """Add a block [R, H, m, d] at positions [R, H, m] to the rows given [R]; `fresh`: of their prompts."""
        first = self.counts[rows]
        m = k.shape[2]
        if units.order is not None:
            k, v, position = (_ordered(x, units.order) for x in (k, v, position))
        self.store.append(rows, k, v, position, fresh)
        if not self.implicit:
            self.places.append(rows, {"position": position.int()})
        index = dict(units.summary)
        if units.size is not None:
            start = sent(first, k.device).view(-1, 1, 1) + units.size.cumsum(-1) - units.size
            index |= {"size": units.size.int(), "start": start.int()}
            self.longest = max(self.longest, int(units.size.max()))
        if index:
            self.units.append(rows, index, per=max(1, m // next(iter(index.values())).shape[2]))
        if self.resident is not None:
            run = self.resident.run
            for row, begin in zip(rows.tolist(), first.tolist(), strict=True):
                self.resident.forget(row, begin // run, -(-(begin + m) // run))

    # ---------------------------------------------------------------------------------------------------- attending
    def attend(self, q: Tensor, spec: Spec, store: Store | None = None) -> Partial:
        """Attention of q [B, Hq, n, d] over everything; every query row sees all of it.  `store`: another view of it."""
        store = store or self.store
        there = self.away and q.shape[2] <= FEW
        if q.shape[2] <= FEW and (there or not store.host):
            length = None if (self.counts == self.counts[0]).all() else sent(self.counts, store.device)
            found = self._in_place(store, q, spec, None, length)
            if found is not None:
                return found
        device = store.device if there else q.device
        parts, read = [], q.to(device)
        last: tuple[Stored, Stored] | None = None
        for lo, hi, brought in self._pieces(store, device, moving=not there):
            k, v = (store.piece(side, lo, hi, self._position, brought).to(device) for side in "kv")
            read = prepared(store.forms, read, k) if last is None else read
            last = k, v
            visible = self._all(lo, hi, device)
            parts.append(attend_prepared(store.forms, read, last, spec.scale, visible, spec.softcap))
            if store.pages and self.tier is not None:
                self.streamed.moved += sum(
                    x.parts["x"].nbytes for x, side in zip(last, "kv", strict=True) if side in store.pages
                )
        assert last is not None
        return _moved(finished(store.forms, merge(parts), last[1]), q.device)

    @property
    def away(self) -> bool:
        """Whether the CPU attends the body, where it lives."""
        return self.tier is not None and self.tier.attend

    def _pieces(self, store: Store, device: torch.device, moving: bool) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Walk all slots: from, to, and copies on `device` of what lives in host memory, if it is `moving`.  At once where
        nothing is to be moved or decoded."""
        if not (moving and store.host) and not store.pages:
            most = int(self.counts.max()) if all(form.exact for form in store.forms) else DECODED[device.type == "cuda"]
            yield from ((lo, hi, {}) for lo, hi in self._ranges(most))
            return
        stop, step = int(self.counts.max()), max(1, PIECE // store.grain) * store.grain
        host = {name: store.own[name] for name in sorted(store.host) if name in store.own and moving}
        for lo, hi, brought in stream(host, stop, step, device):
            self.streamed.moved += sum(x.nbytes for x in brought.values())
            yield lo, hi, brought

    def _all(self, lo: int, hi: int, device: torch.device) -> Visible:
        """Every token of slots lo..hi that a row has."""
        if (self.counts >= hi).all():
            return EVERYTHING
        return Visible(length=sent(np.clip(self.counts - lo, 0, hi - lo), device))

    def read(
        self, query: Query, room: np.ndarray, tokens: np.ndarray, past: Past, store: Store | None = None
    ) -> tuple[list[Partial], Past]:
        """Attention of one query row over the `room` [B] best tokens of each head of rows that have seen `tokens` [B], in
        parts to be merged, and what to remember.  `store`: another view of the tokens."""
        store = store or self.store
        room = np.minimum(np.maximum(room, 0), self.counts)
        most = int(room.max(initial=0))
        whole = room >= self.counts
        if whole.all() and self.selector.scope != "query_head":
            return [self.attend(query.q, query.spec, store)], past.expired(whole)
        index = self._index()
        estimated = self.selector.estimation(index)
        if most == 0 and estimated is None:
            return [], past
        kept, past = past, self._choose(query, index, max(most, 1), tokens, past).expired(whole)
        assert past.order is not None
        same = bool((room == room[0]).all())
        space: Tensor | int = int(room[0]) if same else sent(room, self.device).view(-1, 1, 1)
        parts = []
        if most:
            listing = self._list(past.order, space, most)
            if self.resident is not None and store.host:
                parts = self._through_slots(store, query, listing, space, most)
            elif self.away:
                parts = [self._on_host(store, query, listing, space, most)]
            else:
                parts = [self._on_device(store, query, listing, space, most)]
        if estimated is not None:
            parts.append(self._estimate(query, *estimated, past.order, space))
        return parts, past if self.selector.remembers else kept

    def read_steadily(self, query: Query, allowed: Tensor, held: Tensor, units: Tensor, most: int) -> Partial:
        """`read` without the host: the `allowed` [B] best tokens, at most `most`, of rows that hold `held` [B] in `units`
        [B]."""
        index = self._index(slack=True)
        room = next(iter(index.summary.values())).shape[2]
        order = self._order(query, index, min(-(-most // self.selector.run), room) if self.selector.run else room, units)
        space = torch.minimum(allowed, held).view(-1, 1, 1)
        listing = self._list(order, space, most)
        return self._on_device(self.store, query, listing, space, most)

    def _on_device(self, store: Store, query: Query, listing: Listing, room: Tensor | int, most: int) -> Partial:
        """Attention over the chosen tokens where all tokens are."""
        chosen = self._in_body(store, query, listing, room, most)
        visible = EVERYTHING if isinstance(room, int) else Visible(length=room.flatten())
        return self._over(store, query, chosen, visible)

    def _on_host(self, store: Store, query: Query, listing: Listing, room: Tensor | int, most: int) -> Partial:
        """The same in host memory: the query goes there, the result comes back."""
        there = Query(query.q.cpu(), query.scored, None, query.spec)
        ids, before, length = (x.cpu() if isinstance(x, Tensor) else x for x in listing)
        assert isinstance(ids, Tensor)
        space = room.cpu() if isinstance(room, Tensor) else room
        return _moved(self._on_device(store, there, Listing(ids, before, length), space, most), self.device)

    def _through_slots(self, store: Store, query: Query, listing: Listing, room: Tensor | int, most: int) -> list[Partial]:
        """Attention over the chosen tokens by way of the device's slots: over those that are resident while the others are
        copied, then over the others."""
        assert self.resident is not None and self.tier is not None
        resident, run = self.resident, self.resident.run
        ids = listing.ids.expand(-1, self.heads, -1)
        valid = listing.valid()
        host = {name: store.own[name] for name in sorted(store.host)}
        runs = (ids[..., ::run] // run).contiguous()
        body = -(-int(self.counts.max()) // run)
        resident.reserve(max(runs.shape[-1], min(body, int(self.tier.slots * most) // run)), host)
        there = None if valid is None else valid[..., ::run].expand(-1, self.heads, -1)
        fetch = resident.fetch(host, runs, there)
        place, offset = torch.arange(ids.shape[-1], device=self.device), ids % run
        where = fetch.slots.repeat_interleave(run, -1) * run + offset
        early = fetch.hit.repeat_interleave(run, -1) & (place < listing.before)
        early, listing = early[..., :most], Listing(ids, listing.before, listing.length)
        first = early.int().argsort(dim=-1, descending=True, stable=True)
        hits = ids[..., :most].gather(-1, first), Visible(length=early.sum(-1)), where[..., :most].gather(-1, first)
        parts = [self._over(store, query, *hits)]
        fetch.wait()
        resident.settle()
        where = fetch.slots.repeat_interleave(run, -1) * run + offset
        uncut = not self._cuts(listing, room)
        if uncut and fetch.most_missing == 0:
            return parts
        late = ~early & (place[:most] < room)
        if not uncut:

            def keys_at(columns: Tensor) -> Stored:
                return store.take(
                    "k", ids.gather(-1, columns), self._position, self._brought(where.gather(-1, columns), "k")
                )

            columns = self._cut(store, query, listing, keys_at, room, most)
            ids, where = ids.gather(-1, columns), where.gather(-1, columns)
        width = min(most, fetch.most_missing * run + (0 if uncut else self.longest))
        first = late.int().argsort(dim=-1, descending=True, stable=True)[..., :width]
        where, ids = where[..., :most].gather(-1, first), ids[..., :most].gather(-1, first)
        parts.append(self._over(store, query, ids, Visible(length=late.sum(-1)), where))
        return parts

    def _brought(self, where: Tensor, sides: str) -> dict[str, Tensor]:
        """What the host keeps of some sides, from the places `where` in the slots."""
        assert self.resident is not None
        return {name: self.resident.take(name, where) for name in sorted(self.store.host) if name[0] in sides}

    def _over(self, store: Store, query: Query, ids: Tensor, visible: Visible, where: Tensor | None = None) -> Partial:
        """Attention over the tokens `ids` of the body, of which those the host keeps stand at `where` in the slots;
        `visible` may have a length for each head, [B, H]."""
        pools = self._pools(store, slots=where is not None)
        if pools is not None:
            spec, at = query.spec, ids if where is None else where
            return attend_listed(query.q, *pools, at, spec.scale, visible, spec.softcap)
        found = self._in_place(store, query.q, query.spec, ids, visible.length, where)
        if found is not None:
            return found
        brought = None if where is None else self._brought(where, "kv")
        k, v = (store.take(side, ids, self._position, brought) for side in "kv")
        return attend(store.forms, query.q, (k, v), query.spec.scale, visible, query.spec.softcap)

    def _in_place(
        self,
        store: Store,
        q: Tensor,
        spec: Spec,
        ids: Tensor | None,
        length: Tensor | None,
        where: Tensor | None = None,
    ) -> Partial | None:
        """Attention over codes where they lie, of all tokens or of `ids`, of which those the host keeps stand at `where` in
        the slots; None where no kernel reads them so."""
        if store.pages or all(form.exact for form in store.forms):
            return None
        device = store.device
        stored = store.whole("k", self._position), store.whole("v", self._position)
        if where is not None:
            if self.resident is None or store.host != {"v.x"}:
                return None
            stored[1].parts = {"x": self.resident.buffer("v.x")}
        ids, length = (None if x is None else x.to(device) for x in (ids, length))
        reading = Reading(ids, length, spec.scale, spec.softcap, where)
        found = attend_in_place(store.forms, q.to(device), stored, reading)
        return None if found is None else _moved(found, q.device)

    def _pools(self, store: Store, slots: bool) -> tuple[Tensor, Tensor] | None:
        """Where keys and values lie as vectors, under the same ids, the `slots` or the body; None: they do not."""
        if store.pages or not all(form.exact for form in store.forms):
            return None
        if not slots:
            return store.own["k.x"], store.own["v.x"]
        if self.resident is None or not {"k.x", "v.x"} <= store.host:
            return None
        return self.resident.buffer("k.x"), self.resident.buffer("v.x")

    def _estimate(self, query: Query, keys: Tensor, values: Tensor, order: Tensor, room: Tensor | int) -> Partial:
        """Attention over the units' means, each for as many tokens as are not read of it."""
        size = self.units.live("size")
        left = size - taken(order, size, room)
        units = sent(self.units.counts, self.device).view(-1, 1, 1)
        absent = torch.arange(left.shape[-1], device=self.device) >= units
        bias = left.masked_fill(absent, 0).float().log()
        spec = query.spec
        return attention(query.q, keys, values, spec.scale, Visible(mask=bias.unsqueeze(2)), spec.softcap)

    # ---------------------------------------------------------------------------------------------------- the rest
    def positions(self, row: int, head: int) -> Tensor:
        """Positions of the tokens of one head of a row, in the order of their slots."""
        count = int(self.counts[row])
        if self.implicit:
            first = int(self.base[row])
            return torch.arange(first, first + count, dtype=torch.int32)
        return self.places.parts["position"][row, head, :count]

    def traffic(self) -> Traffic:
        """What reading cost between host and device so far."""
        hits, misses, moved = (0, 0, 0) if self.resident is None else self.resident.counts()
        return Traffic(hits, misses, moved + self.streamed.moved)

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows [B']."""
        for held in (self.store, self.places, self.units):
            held.reorder(rows)
        self.base = self.base[rows.cpu().numpy()]
        self.fixed = {name: x.index_select(0, rows) for name, x in self.fixed.items()}
        if self.resident is not None:
            self.resident.reorder(rows)

    def snapshot(self) -> Indexed:
        """The present state, which later appends do not disturb; residency and the count of bytes are shared."""
        twin = object.__new__(Indexed)
        held = {name: getattr(self, name).snapshot() for name in ("store", "places", "units")}
        twin.__dict__.update(self.__dict__, **held)
        return twin

    def copy(self) -> Indexed:
        """An independent body with the same tokens."""
        twin = self.snapshot()
        twin.store, twin.places, twin.units = self.store.copy(), self.places.copy(), self.units.copy()
        twin.fixed = {name: x.clone() for name, x in self.fixed.items()}
        twin.resident = None if self.resident is None else self.resident.copy()
        twin.streamed = replace(self.streamed)
        return twin

    def storages(self) -> Iterator[tuple[str, str, Tensor]]:
        """Every storage: (tier, part, tensor)."""
        for tier, x in self.store.storages():
            yield tier, "body", x
        for x in (*self.places.tensors(), *self.store.shared()):
            yield "host" if self.away else "device", "index", x
        for x in (*self.units.tensors(), *self.fixed.values()):
            yield "device", "index", x
        for x in [] if self.resident is None else self.resident.tensors():
            yield "device", "slots", x

    def used(self) -> dict[tuple[str, str], int]:
        """Bytes by (tier, part) of the tokens held and of their index, slack left out."""
        sizes = {(tier, "body"): size for tier, size in self.store.used().items()}
        places = ("host" if self.away else "device", "index")
        sizes["device", "index"] = sum(self.units.used(name) for name in self.units.parts)
        sizes["device", "index"] += sum(x.nbytes for x in self.fixed.values())
        sizes[places] = sizes.get(places, 0) + self.places.used("position") + sum(x.nbytes for x in self.store.shared())
        return sizes


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """x [R, H, m, ...] in the order [R, H, m]."""
    return x.gather(2, order if x.dim() == 3 else order.unsqueeze(-1).expand_as(x))


def _moved(part: Partial, device: torch.device) -> Partial:
    return Partial(part.out.to(device), None if part.lse is None else part.lse.to(device))
