"""Tokens in units, and the choice among them: what a selector ranks, and which tokens a query reads for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvlib.kernels.bounds import products
from kvlib.kernels.selection import Listing, cut, list_runs, list_units, rank, top, vote
from kvlib.kernels.take import take
from kvlib.offload.transfer import sent
from kvlib.policies.encoding import Stored
from kvlib.policies.selection import Index, Past, Selector
from kvlib.rows import Rows
from kvlib.segment import Spec
from kvlib.store import Store

_KeysAt = Callable[[Tensor], Stored]  # columns [B, H', m] of a listing -> the keys there
DECODED = (1024, 16384)  # tokens decoded at once: few enough for a core's cache, on a GPU enough to fill it


@dataclass(frozen=True)
class Query:
    """One query row: q [B, Hq, 1, d] as the model gives it and `scored` [B, Hq, d] as the selector scores it; `rest`
    [B, Hq, 1] is the log-sum-exp of what it reads besides the body."""

    q: Tensor
    scored: Tensor
    rest: Tensor | None
    spec: Spec


class Ranked:
    """Tokens in a store, those of a unit side by side, and an index of the units beside them.

    Row r holds `counts[r]` tokens per head, the first from position base[r] on where positions follow the slots
    (`implicit`).
    """

    device: torch.device  # where units are ranked

    def __init__(self, selector: Selector, store: Store, base: np.ndarray, implicit: bool, fixed: dict[str, Tensor]):
        """Nothing yet, of as many rows as base [B] has; `fixed` is what the selector was calibrated to."""
        self.selector, self.store, self.heads = selector, store, store.heads
        self.places = Rows(len(base), store.device)  # positions, where they do not follow the slots
        self.units = Rows(len(base), self.device)
        self.base, self.implicit, self.fixed = base, implicit, fixed
        self.longest = selector.run  # size of the largest unit

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each row, per head."""
        return self.store.counts

    def _ranges(self, most: int) -> Iterator[tuple[int, int]]:
        """All slots in ranges of at most `most`, or a grain, whole grains each."""
        grain, stop = self.store.grain, int(self.counts.max())
        step = max(1, most // grain) * grain
        yield from ((lo, min(stop, lo + step)) for lo in range(0, stop, step))

    def _position(self, slots: Tensor) -> Tensor:
        """Positions of the tokens in slots [1 or B, 1 or H, m], broadcastable to [B, H, m]."""
        if self.implicit:
            return slots + sent(self.base, slots.device).view(-1, 1, 1)
        batch = len(self.counts)
        return take(self.places.parts["position"], slots.expand(batch, -1, -1), self.heads)

    def _choose(self, query: Query, index: Index, most: int, tokens: np.ndarray, past: Past) -> Past:
        """The order of units, fresh where the last one does not serve."""
        k = self._first(most)
        valid = past.order is not None and len(past.sealed) == len(tokens)
        kept = self.selector.reuse(query.scored, past, tokens) if valid else None
        if kept is None:
            return Past(self._order(query, index, k), tokens, self.counts, query.scored, past.own)
        unchanged = past.sealed == self.counts
        if isinstance(kept, np.ndarray):
            host = kept & unchanged
            keep = sent(host, self.device)
        else:
            keep = kept & sent(unchanged, self.device)
            host = keep.cpu().numpy()  # one wait per layer, to spare a scan of all keys
        if host.all():
            return past
        assert past.order is not None and past.query is not None
        order = self._order(query, index, k)
        if host.any():
            last = torch.nn.functional.pad(past.order[..., :k], (0, max(0, k - past.order.shape[-1])))
            order = torch.where(keep.view(-1, 1, 1), last, order)
        scored = torch.where(keep.view(-1, 1, 1), past.query, query.scored)
        return Past(order, np.where(host, past.tokens, tokens), self.counts, scored, past.own)

    def _first(self, most: int) -> int:
        """How many of the best units can be needed for `most` tokens."""
        run = self.selector.run
        if run:
            return -(-most // run)
        return int(self.units.counts.max())

    def unit_counts(self) -> np.ndarray:
        """Units of each row, per head, [B]."""
        run = self.selector.run
        return self.counts // run if run else self.units.counts

    def _index(self, slack: bool = False) -> Index:
        """What units are found by, of those there are, or with `slack` of all there is room for."""
        held = {name: x if slack else self.units.live(name) for name, x in self.units.parts.items()}
        summary = {name: x for name, x in held.items() if name not in ("size", "start")}
        size = held.get("size")
        return Index(summary, size, self.fixed, self._products if self.selector.reads_keys else None)

    def _products(self, q: Tensor) -> Tensor:
        """Products [B, Hq, T] fp32 of a query [B, Hq, d] with all keys."""
        stop = int(self.counts.max())
        pieces = self._ranges(stop if self.store.forms[0].exact else DECODED[q.is_cuda])
        found = [self._product(self.store, q, self.store.piece("k", lo, hi, self._position)) for lo, hi in pieces]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _product(self, store: Store, q: Tensor, k: Stored) -> Tensor:
        """Products [B, Hq, m] fp32 of a query [B, Hq, d] with stored keys."""
        form = store.forms[0]
        if form.exact:
            return products(q, form.decode(k))
        return form.scores(form.prologue(q.float().unsqueeze(2), k), k)[:, :, 0]

    def _order(self, query: Query, index: Index, k: int, count: Tensor | None = None) -> Tensor:
        """The k best units, [B, H', k]; H' is 1, the KV heads or the query heads, by the selector's scope.  `count` [B] are
        the units of each row where the host may not say so."""
        s = self.selector.logits(query.scored, index)
        scaled, spec = self.selector.scaled, query.spec
        scale, softcap = (spec.scale, spec.softcap or 0.0) if scaled else (1.0, 0.0)
        rest = query.rest[:, :, 0] if query.rest is not None and scaled else None
        if count is None and (self.unit_counts() < s.shape[-1]).any():
            count = sent(self.unit_counts(), s.device)
        heads = {"query_head": 0, "layer": 1}.get(self.selector.scope, self.heads)
        always = self.selector.always(index)
        return rank(s, k, heads, scale, softcap, self.selector.loudest, rest, count, index.size, always)

    def _scaled(self, s: Tensor, spec: Spec) -> Tensor:
        """Scores as the model's attention has them."""
        s = s.mul_(spec.scale)
        return s if spec.softcap is None else s.div_(spec.softcap).tanh_().mul_(spec.softcap)

    def _list(self, order: Tensor, room: Tensor | int, most: int) -> Listing:
        """The tokens of the best units."""
        run = self.selector.run
        if run:
            return list_runs(order, run, room, most)
        start, size = self._sizes(order)
        return list_units(order, start, size, room, most, self.longest)

    def _sizes(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Start and size of every unit, for each list of `order`."""
        start, size = self.units.parts["start"], self.units.parts["size"]
        if order.shape[1] < start.shape[1]:  # one list for the layer: its heads have the same units
            return start[:, :1], size[:, :1]
        if order.shape[1] > start.shape[1]:
            group = order.shape[1] // start.shape[1]
            return start.repeat_interleave(group, 1), size.repeat_interleave(group, 1)
        return start, size

    def _cuts(self, listing: Listing, room: Tensor | int) -> bool:
        """Whether a unit may have to be cut to fill the room; single tokens never are."""
        return self.selector.run != 1 and not (isinstance(listing.length, int) and listing.length == room)

    def _cut(self, store: Store, query: Query, listing: Listing, keys_at: _KeysAt, room: Tensor | int, most: int) -> Tensor:
        """Columns [B, H', most] of the listing that are read: units that fit, then the best of the unit that is cut, by
        their true scores.  H' are the lists, or the heads where a shared list is written out for each."""
        before, width = listing.before, listing.ids.shape[-1]
        place = torch.arange(self.longest, device=listing.ids.device) + before
        place = place.expand(*listing.ids.shape[:2], -1)
        inside = place < listing.length
        cut = place.clamp(max=width - 1)
        s = self._scaled(self._product(store, query.q[:, :, 0], keys_at(cut)), query.spec)
        heads = cut.shape[1]
        lists = 1 if self.selector.scope == "layer" else heads
        s = s.masked_fill(~inside.repeat_interleave(s.shape[1] // heads, 1), float("-inf"))
        score = s if lists == s.shape[1] else vote(s, lists)
        ranked = top(score.masked_fill(~inside[:, :lists], float("-inf")), self.longest)
        best = cut.gather(-1, ranked.expand(-1, heads, -1))
        j = torch.arange(most, device=cut.device).expand(*cut.shape[:2], -1)
        chosen = best.gather(-1, (j - before).clamp(0, self.longest - 1))
        return torch.where(j < before, j, chosen)

    def chosen(self, query: Query, room: int, past: Past) -> Tensor:
        """Slots [B, H', room] that a query reads of a body with at least `room` tokens in every row; for those who ask what
        was chosen, not needed to attend it."""
        past = self._choose(query, self._index(), room, self.counts, past)
        assert past.order is not None
        return self._in_body(self.store, query, self._list(past.order, room, room), room, room)

    def _in_body(self, store: Store, query: Query, listing: Listing, room: Tensor | int, most: int) -> Tensor:
        """Slots of the chosen tokens, [B, H', most]."""
        ids = listing.ids
        if not self._cuts(listing, room):
            return ids[..., :most]
        keys, spec = store.own.get("k.x"), query.spec
        if keys is not None and keys.device == query.q.device:  # vectors, and not in pages
            return cut(query.q[:, :, 0], keys, listing, spec.scale, spec.softcap or 0.0, most, self.longest)

        def keys_at(columns: Tensor) -> Stored:
            return store.take("k", ids.gather(-1, columns), self._position)

        return ids.gather(-1, self._cut(store, query, listing, keys_at, room, most))
