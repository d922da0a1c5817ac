"""What a head group holds, counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.indexed import Indexed
from kvlib.offload.account import allocated
from kvlib.offload.resident import Traffic
from kvlib.segment import Tiles

if TYPE_CHECKING:
    from kvlib.group import HeadGroup


def kept(group: HeadGroup) -> np.ndarray:
    """Tokens held, int64 [B, H]."""
    if group.tail is None:
        return np.zeros((0, 0), dtype=np.int64)
    counts = np.repeat(group.tail.lengths[:, None], group.tail.k.shape[1], 1)
    counts = counts if group.sink is None else counts + group.sink.counts
    if isinstance(group.body, Indexed):
        counts = counts + group.body.counts[:, None]
    elif group.body is not None:
        counts = counts + group.body.counts
    return counts


def attended(group: HeadGroup) -> np.ndarray:
    """Tokens the newest query attended or would have attended after the prompt, int64 [B, H]."""
    held = kept(group)
    if group.tail is None:
        return held
    if group.selector is not None:
        if group.whole or not group.selector.selects():
            return held
        budget = group.selector.tokens(group.tokens) if group.split is None else group.split.total
        within: np.ndarray = np.minimum(held, budget[:, None])
        return within
    window, sink = (None, 0) if group.evictor is None else group.evictor.band(prompt=False)
    if window is None:
        return held
    in_tail = sink if group.sink is None else np.where(group.sink.counts[:, 0] > 0, 0, sink)
    unseen = np.maximum(group.tail.lengths - window - in_tail, 0)
    seen: np.ndarray = held - unseen[:, None]
    return seen


def traffic(group: HeadGroup) -> Traffic:
    """What reading a body in host memory cost so far."""
    if isinstance(group.body, Indexed):
        return group.body.traffic()
    return Traffic(0, 0, 0 if group.home is None else group.home.moved)


def positions(group: HeadGroup) -> list[list[Tensor]]:
    """Positions of the tokens held, ascending, per batch row and head."""
    assert group.tail is not None
    first = group.tokens - group.tail.lengths
    rows: list[list[Tensor]] = []
    for r, head in np.ndindex(len(group.tokens), group.tail.k.shape[1]):
        held = []
        for tiles in (group.sink, group.body):
            if isinstance(tiles, Indexed):
                held.append(tiles.positions(r, head))
            elif tiles is not None:
                slots = tiles.slots()[r, head]
                held.append(tiles.positions.flatten()[slots[slots >= 0]])
        held.append(torch.arange(int(first[r]), int(group.tokens[r]), dtype=torch.int32))
        if head == 0:
            rows.append([])
        rows[r].append(torch.cat([x.cpu() for x in held]).sort().values)
    return rows


def parts(group: HeadGroup) -> dict[tuple[str, str], list[Tensor]]:
    """Every storage the group holds, by (tier, part)."""
    found: dict[tuple[str, str], list[Tensor]] = {}

    def add(part: str, tensors: Iterable[Tensor], tier: str = "device") -> None:
        found.setdefault((tier, part), []).extend(tensors)

    for name, tiles in (("sink", group.sink), ("body", group.body)):
        if isinstance(tiles, Tiles):
            add(name, tiles.tensors(), "device" if tiles.home is None else "host")
            add("statistics", tiles.bookkeeping())
    if isinstance(group.body, Indexed):
        for tier, part, x in group.body.storages():
            add(part, [x], tier)
    if group.tail is not None:
        add("tail", group.tail.tensors())
        add("statistics", group.tail.bookkeeping())
    add("statistics", [x for x in (group.queries, group.products) if x is not None])
    add("statistics", group.past.tensors())
    if group.draft is not None:
        add("staging", group.draft.tensors())
    return found


def nbytes(group: HeadGroup, used: bool, seen: set[int]) -> dict[tuple[str, str], int]:
    """Bytes by (tier, part): allocated, or with `used` those of the tokens held, slack left out."""
    sizes = {place: allocated(tensors, seen) for place, tensors in parts(group).items()}
    if not used or group.tail is None:
        return sizes
    vector = (group.tail.k.shape[3] + group.tail.v.shape[3]) * group.tail.k.element_size()
    held = int(group.tail.lengths.sum()) * group.tail.k.shape[1]
    sizes["device", "tail"] = held * vector
    statistics = 4 * held * len(group.tail.fields)
    for name, tiles in (("sink", group.sink), ("body", group.body)):
        if isinstance(tiles, Tiles):
            own = tiles.k.shape[-1] * tiles.k.element_size() + tiles.v.shape[-1] * tiles.v.element_size()
            sizes["device" if tiles.home is None else "host", name] = int(tiles.counts.sum()) * own
            statistics += int(tiles.counts.sum()) * 4 * (1 + len(tiles.fields))
    if isinstance(group.body, Indexed):
        sizes |= group.body.used()
    kept = [x for x in (group.queries, group.products, *group.past.tensors()) if x is not None]
    sizes["device", "statistics"] = statistics + sum(x.nbytes for x in kept)
    return sizes
