"""Keys and values of a body in the forms they are kept in: what many tokens share lies beside what is a token's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import lcm
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.kernels.take import take
from kvlib.offload.transfer import sent
from kvlib.policies.encoding import MERGED, SEGMENT, Form, Stored, Tokens
from kvlib.policies.selection import SEGMENT as LONGEST  # merging makes no segment longer than a prompt's
from kvlib.rows import Rows

if TYPE_CHECKING:
    from kvlib.kernels.rotary import Rotary

ALIKE = 8  # merged segments of equal length that become one
_Position = Callable[[Tensor], Tensor]  # slots -> positions


class Store:
    """Row r holds `counts[r]` tokens per head, keys in forms[0] and values in forms[1].

    Parts are named by side and part, "k.codes"; those with the same span, tokens to an entry, lie in one `Rows`.  Parts
    named in `host` live in host memory.
    """

    def __init__(
        self,
        forms: tuple[Form, Form],
        batch: int,
        heads: int,
        device: torch.device,
        sides: str = "",
        away: bool = False,
        run: int = 1,
        rotary: Rotary | None = None,
    ):
        """On `device`, the moving parts of the `sides` in host memory; or all of it there, and read there, if `away`."""
        self.forms, self.heads, self.rotary = forms, heads, rotary
        self.device = torch.device("cpu") if away else device
        self.grain = lcm(*(form.grain for form in forms))
        names = [(side, name) for side, form in self._sides() for name in (form.spans if away else form.moving)]
        self.host = frozenset(f"{side}.{name}" for side, name in names if away or side in sides)
        self.counts = np.zeros(batch, dtype=np.int64)  # tokens of each row, per head
        spans = {span for form in forms for span in form.spans.values()}
        self.rows = {span: Rows(batch, device, self.host, max(1, run // max(span, 1))) for span in spans | {1}}
        #: Pages of sides that are kept as bytes, one after the other, and how long each is, per row.
        self.pages = {side: Rows(batch, device, ("page",)) for side, form in self._sides() if form.paged}
        self.sizes: dict[str, list[tuple[int, ...]]] = {side: [()] * batch for side in self.pages}
        self.fixed: dict[str, Tensor] = {}
        self._fitted = np.zeros(batch, dtype=bool)
        #: Lengths of each row's segments, and where they end, [B, S] on the device.
        self.lengths: dict[int, list[tuple[int, ...]]] = {span: [()] * batch for span in spans & {SEGMENT, MERGED}}
        self.ends: dict[int, Tensor] = {}
        self.borders: dict[int, np.ndarray] = {}  # the same on the host

    def _sides(self) -> Iterator[tuple[str, Form]]:
        yield from zip("kv", self.forms, strict=True)

    @property
    def own(self) -> Mapping[str, Tensor]:
        """The buffers [B, H, capacity, ...] of what belongs to single tokens."""
        return self.rows[1].parts

    # --------------------------------------------------------------------------------------------------- taking in
    def fit(self, rows: np.ndarray, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Let the first tokens [R, H, m, d] of the rows given [R] decide what later ones rely on; once per row."""
        new = ~self._fitted[rows]
        if not new.any():
            return
        if not new.all():
            k, v, position = (x[sent(new, x.device)] for x in (k, v, position))
            rows = rows[new]
        self._fitted = self._fitted.copy()
        self._fitted[rows] = True
        index, first = sent(rows, self.device), sent(self.counts[rows], k.device)
        for (side, form), x in zip(self._sides(), (k, v), strict=True):
            for part, found in form.fit(Tokens(x, position, self.rotary, {}, first)).items():
                name, found = f"{side}.{part}", found.to(self.device)
                old = self.fixed.get(name)
                with torch.inference_mode(False):  # a copy: a snapshot may still read the old one
                    fresh = found.new_zeros((len(self.counts), *found.shape[1:])) if old is None else old.clone()
                    fresh[index] = found
                self.fixed = {**self.fixed, name: fresh}

    def append(self, rows: np.ndarray, k: Tensor, v: Tensor, position: Tensor, fresh: bool = True) -> None:
        """Add a block [R, H, m, d], whole grains, at positions [R, H, m] to the rows given [R]; `fresh`: of prompts."""
        m = k.shape[2]
        self.fit(rows, k, v, position)
        first = sent(self.counts[rows], k.device)
        index = sent(rows, self.device)
        by_span: dict[int, dict[str, Tensor]] = {span: {} for span in self.rows}
        for (side, form), x in zip(self._sides(), (k, v), strict=True):
            fixed = {name: found.index_select(0, index).to(x.device) for name, found in self._of(side, self.fixed).items()}
            for name, part in form.encode(Tokens(x, position, self.rotary, fixed, first, fresh)).items():
                by_span[form.spans[name]][f"{side}.{name}"] = part
            if side in self.pages:
                self._write(side, form, rows, x)
        for span, parts in by_span.items():
            self.rows[span].append(rows, parts, per=m if span in self.lengths else max(span, 1))
        self.counts = self.counts.copy()
        self.counts[rows] += m
        for span in self.lengths:
            self.lengths[span] = [*self.lengths[span]]
            own: set[str] = set()
            for row in rows.tolist():
                self.lengths[span][row] += (m,)
                if span == MERGED:
                    self._merge(row, own)
            self._mark_ends(span)

    def _write(self, side: str, form: Form, rows: np.ndarray, x: Tensor) -> None:
        """Add x [R, H, m, d] to the rows' pages."""
        self.sizes[side] = [*self.sizes[side]]
        for row, own in zip(rows.tolist(), x, strict=True):
            written = [form.to_bytes(page) for page in own.split(form.grain, 1)]
            self.sizes[side][row] += tuple(len(page) for page in written)
            self.pages[side].append(np.array([row]), {"page": torch.cat(written).view(1, 1, -1)})

    def _read(self, side: str, form: Form, lo: int, hi: int, only: int | None = None) -> Tensor:
        """Slots lo .. hi - 1 of what is kept in pages, [B, H, hi - lo, d] in host memory, or of one row only; zeros past a
        row's end."""
        found = []
        for row in range(len(self.counts)) if only is None else (only,):
            sizes = self.sizes[side][row]
            ends = np.cumsum((0, *sizes))
            own = self.pages[side].parts["page"][row, 0]
            span = range(lo // form.grain, min(hi // form.grain, len(sizes)))
            found.append([form.from_bytes(own[ends[i] : ends[i + 1]]) for i in span])
        like = next(page for pages in found for page in pages)
        x = like.new_zeros((len(found), like.shape[0], hi - lo, like.shape[2]))
        for own, pages in zip(x, found, strict=True):
            for i, page in enumerate(pages):
                own[:, i * form.grain : (i + 1) * form.grain] = page
        return x

    def _read_at(self, side: str, form: Form, ids: Tensor) -> Tensor:
        """Slots ids [B, H', m] of what is kept in pages, [B, H, m, d] in host memory; anything where a row has no such."""
        found = []
        for row, own in enumerate(ids.cpu()):
            last = max(0, len(self.sizes[side][row]) - 1)
            page = (own // form.grain).clamp(max=last)
            wanted = page.unique()
            cuts = [self._read(side, form, lo, lo + form.grain, row) for lo in (wanted * form.grain).tolist()]
            x = torch.stack(cuts, 2).flatten(2, 3)[0]  # [H, pages * grain, d]
            at = torch.searchsorted(wanted, page) * form.grain + own % form.grain
            found.append(x.gather(1, at.expand(len(x), -1).unsqueeze(-1).expand(-1, -1, x.shape[2])))
        return torch.stack(found)

    def _merge(self, row: int, fresh: set[str]) -> None:
        """Make one segment of a row's newest `ALIKE` that are equally long, as often as there are; no snapshot reads the
        buffers that are `fresh`."""
        lengths = self.lengths[MERGED][row]
        while len(lengths) >= ALIKE and len({*lengths[-ALIKE:]}) == 1 and ALIKE * lengths[-1] <= LONGEST:
            for side, form in self._sides():
                if MERGED in form.spans.values():
                    self._join(side, form, row, fresh)
            self.rows[MERGED].shorten(row, ALIKE - 1)
            lengths = (*lengths[:-ALIKE], ALIKE * lengths[-1])
            self.lengths[MERGED][row] = lengths

    def _join(self, side: str, form: Form, row: int, fresh: set[str]) -> None:
        """Rewrite the keys or values of a row's newest `ALIKE` segments as one."""
        segments, stop = len(self.lengths[MERGED][row]), int(self.counts[row])
        start = stop - ALIKE * self.lengths[MERGED][row][-1]
        cuts = {name: (start // span, stop // span) for name, span in form.spans.items() if span > 0}
        cuts |= {name: (segments - ALIKE, segments) for name, span in form.spans.items() if span == MERGED}
        parts = {
            name: self.rows[form.spans[name]].parts[f"{side}.{name}"][row : row + 1, :, first:last]
            for name, (first, last) in cuts.items()
        }
        for name, part in form.merge(parts).items():
            self.rows[form.spans[name]].rewrite(row, cuts[name][0], f"{side}.{name}", part[0], fresh)

    def _mark_ends(self, span: int) -> None:
        """Note on the device where segments end; those that a row does not have end nowhere."""
        most = max(len(lengths) for lengths in self.lengths[span])
        ends = np.full((len(self.lengths[span]), most), np.iinfo(np.int32).max, dtype=np.int32)
        for row, lengths in enumerate(self.lengths[span]):
            ends[row, : len(lengths)] = np.cumsum(lengths)
        self.borders = {**self.borders, span: ends}
        with torch.inference_mode(False):
            self.ends = {**self.ends, span: sent(ends, self.device)}

    # ----------------------------------------------------------------------------------------------------- reading
    def piece(
        self, side: str, lo: int, hi: int, position: _Position, brought: Mapping[str, Tensor] | None = None
    ) -> Stored:
        """Keys ("k") or values ("v") in slots lo .. hi - 1, both whole grains; `brought` are device copies of parts that
        live in the host.

        Without them, parts that live in the host are read there.
        """
        slots = torch.arange(lo, hi, device=self.device)
        if side in self.pages:
            x = self._read(side, self.forms["kv".index(side)], lo, hi)
            return Stored(self.heads, {"x": x.to(self.device)}, {}, slots, lambda span: slots, lambda: slots, None)

        def cut(name: str, span: int) -> Tensor:
            if brought is not None and name in brought:
                return brought[name]
            x = self.rows[span].parts[name]
            if span > 0:
                return x[:, :, lo // span : hi // span]
            only = self._only(span, lo, hi)
            return x[:, :, : self._segments(span)] if only is None else x[:, :, only : only + 1]

        found = self._stored(side, cut, self.heads, slots, slots.view(1, 1, -1), position)
        found.ends = {span: ends - lo for span, ends in self.ends.items()}
        return found

    def whole(self, side: str, position: _Position) -> Stored:
        """Keys ("k") or values ("v") of the longest row's slots, the parts as they lie."""
        most = int(self.counts.max())
        slots = torch.arange(most, device=self.device)
        parts = {
            name: self.rows[span].parts[f"{side}.{name}"][:, :, : most // span if span > 0 else self._segments(span)]
            for name, span in self.forms["kv".index(side)].spans.items()
        }
        segment, where = partial(self._segment_of, slots.view(1, 1, -1)), partial(position, slots.view(1, 1, -1))
        found = Stored(self.heads, parts, self._of(side, self.fixed), slots, segment, where, self.rotary)
        found.ends = self.ends
        return found

    def _only(self, span: int, lo: int, hi: int) -> int | None:
        """The one segment in which slots lo .. hi - 1 lie in all rows that have them, None if there is none."""
        if span not in self.borders:
            return None
        ends, counts = self.borders[span], self.counts
        first = (ends <= lo).sum(1)[counts > lo]
        last = (ends < np.minimum(hi, counts)[:, None]).sum(1)[counts > lo]
        return int(first[0]) if len(first) and (first == first[0]).all() and (last == first[0]).all() else None

    def take(self, side: str, ids: Tensor, position: _Position, brought: Mapping[str, Tensor] | None = None) -> Stored:
        """Keys ("k") or values ("v") in the slots ids [B, H', m]: one list may serve all heads (H' = 1), and the query
        heads of a KV head may have lists of their own; `brought` as for `piece`, [B, H, m, ...]."""
        wide = max(ids.shape[1], self.heads)
        if side in self.pages:
            x = self._read_at(side, self.forms["kv".index(side)], ids)
            return Stored(wide, {"x": x.to(self.device)}, {}, ids, lambda span: ids, lambda: ids, None)

        def cut(name: str, span: int) -> Tensor:
            if brought is not None and name in brought:
                return brought[name]
            x = self.rows[span].parts[name]
            if span <= 0:
                return _widened(x[:, :, : self._segments(span)], wide)
            return take(x, ids if span == 1 else ids // span, self.heads)

        return self._stored(side, cut, wide, ids, ids, position)

    def _segments(self, span: int) -> int:
        return int(self.rows[span].counts.max(initial=0))

    def _stored(
        self, side: str, cut: Callable[[str, int], Tensor], heads: int, slots: Tensor, places: Tensor, position: _Position
    ) -> Stored:
        form = self.forms["kv".index(side)]
        parts = {name: cut(f"{side}.{name}", span) for name, span in form.spans.items()}
        fixed = {name: _widened(x, heads) for name, x in self._of(side, self.fixed).items()}
        segment, where = partial(self._segment_of, places), partial(position, places)
        return Stored(heads, parts, fixed, slots, segment, where, self.rotary)

    def _segment_of(self, places: Tensor, span: int) -> Tensor:
        """The segment of each slot [B or 1, H', m]."""
        ends = self.ends[span]
        if ends.shape[1] == 1:
            return torch.zeros_like(places)
        wide = places.expand(len(ends), -1, -1).int().contiguous()
        found = torch.searchsorted(ends.unsqueeze(1).expand(-1, wide.shape[1], -1).contiguous(), wide, right=True)
        return found.clamp_(max=ends.shape[1] - 1)  # past a row's end: any segment will do

    def _of(self, side: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name[2:]: x for name, x in found.items() if name.startswith(side + ".")}

    def drafting(self) -> Store:
        """The same tokens, read with fewer bytes."""
        twin = object.__new__(Store)
        k, v = (form.draft() for form in self.forms)
        read = {f"{side}.{name}" for side, form in (("k", k), ("v", v)) for name in form.spans}
        twin.__dict__.update(self.__dict__, forms=(k, v), host=self.host & read)
        return twin

    # ---------------------------------------------------------------------------------------------------- the rest
    def reorder(self, rows: Tensor) -> None:
        """Select batch rows [B']."""
        chosen = rows.cpu().numpy()
        for held in self._all_rows():
            held.reorder(rows)
        self.counts = self.counts[chosen]
        self.sizes = {side: [sizes[row] for row in chosen] for side, sizes in self.sizes.items()}
        with torch.inference_mode(False):
            there = rows.to(self.device)
            self.fixed = {name: x.index_select(0, there) for name, x in self.fixed.items()}
            self.ends = {span: x.index_select(0, there) for span, x in self.ends.items()}
        self.borders = {span: ends[chosen] for span, ends in self.borders.items()}
        self.lengths = {span: [lengths[row] for row in chosen] for span, lengths in self.lengths.items()}
        self._fitted = self._fitted[chosen]

    def snapshot(self) -> Store:
        """The present tokens, which later appends do not disturb; it shares the buffers."""
        twin = object.__new__(Store)
        rows = {span: held.snapshot() for span, held in self.rows.items()}
        pages = {side: held.snapshot() for side, held in self.pages.items()}
        twin.__dict__.update(self.__dict__, rows=rows, pages=pages, lengths=dict(self.lengths), sizes=dict(self.sizes))
        return twin

    def _all_rows(self) -> Iterator[Rows]:
        yield from (*self.rows.values(), *self.pages.values())

    def copy(self) -> Store:
        """Independent buffers with the same tokens."""
        twin = self.snapshot()
        twin.reorder(torch.arange(len(self.counts), device=self.device))
        return twin

    def storages(self) -> Iterator[tuple[str, Tensor]]:
        """Every storage: (tier, tensor)."""
        for held in self._all_rows():
            for name, x in held.parts.items():
                yield "host" if name in held.host else "device", x

    def shared(self) -> Iterator[Tensor]:
        """What a row has once: what was fitted to it, where its segments end."""
        yield from (*self.fixed.values(), *self.ends.values())

    def used(self) -> dict[str, int]:
        """Bytes by tier of the tokens held, slack left out."""
        sizes: dict[str, int] = {}
        for held in self._all_rows():
            for name in held.parts:
                tier = "host" if name in held.host else "device"
                sizes[tier] = sizes.get(tier, 0) + held.used(name)
        return sizes


def _widened(x: Tensor, heads: int) -> Tensor:
    """x [B, H, ...] for each of `heads` lists; what heads share [B, 1, ...] stays so."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)
