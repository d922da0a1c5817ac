"""What a head group holds, counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.offload.account import allocated

if TYPE_CHECKING:
    from kvlib.group import HeadGroup


def kept(group: HeadGroup) -> np.ndarray:
    """Tokens held, int64 [B, H]."""
    if group.tail is None:
        return np.zeros((0, 0), dtype=np.int64)
    counts = np.repeat(group.tail.lengths[:, None], group.tail.k.shape[1], 1)
    for tiles in (group.sink, group.body):
        counts = counts if tiles is None else counts + tiles.counts
    return counts


def attended(group: HeadGroup) -> np.ndarray:
    """Tokens the newest query attended or would have attended after the prompt, int64 [B, H]."""
    held = kept(group)
    if group.tail is None:
        return held
    if group.selector is not None:
        budget = group.selector.tokens(group.tokens) if group.reads is None else group.reads
        within: np.ndarray = np.minimum(held, budget[:, None])
        return within
    window, sink = (None, 0) if group.evictor is None else group.evictor.band(prompt=False)
    if window is None:
        return held
    in_tail = sink if group.sink is None else np.where(group.sink.counts[:, 0] > 0, 0, sink)
    unseen = np.maximum(group.tail.lengths - window - in_tail, 0)
    seen: np.ndarray = held - unseen[:, None]
    return seen


def positions(group: HeadGroup) -> list[list[Tensor]]:
    """Positions of the tokens held, ascending, per batch row and head."""
    assert group.tail is not None
    first = group.tokens - group.tail.lengths
    rows: list[list[Tensor]] = []
    for r, head in np.ndindex(len(group.tokens), group.tail.k.shape[1]):
        held = []
        for tiles in (group.sink, group.body):
            if tiles is not None:
                slots = tiles.slots()[r, head]
                held.append(tiles.positions.flatten()[slots[slots >= 0]])
        held.append(torch.arange(int(first[r]), int(group.tokens[r]), dtype=torch.int32))
        if head == 0:
            rows.append([])
        rows[r].append(torch.cat([x.cpu() for x in held]).sort().values)
    return rows


def parts(group: HeadGroup) -> dict[str, list[Tensor]]:
    """Every storage the group holds, by part."""
    found: dict[str, list[Tensor]] = {"sink": [], "body": [], "tail": [], "statistics": [], "staging": []}
    for name, tiles in (("sink", group.sink), ("body", group.body)):
        if tiles is not None:
            found[name] += tiles.tensors()
            found["statistics"] += tiles.bookkeeping()
    if group.tail is not None:
        found["tail"] += group.tail.tensors()
        found["statistics"] += group.tail.bookkeeping()
    if group.queries is not None:
        found["statistics"].append(group.queries)
    if group.draft is not None:
        found["staging"] += group.draft.tensors()
    return found


def nbytes(group: HeadGroup, used: bool, seen: set[int]) -> dict[str, int]:
    """Bytes by part: allocated, or with `used` those of the tokens held, slack left out."""
    sizes = {name: allocated(tensors, seen) for name, tensors in parts(group).items()}
    if used and group.tail is not None:
        vector = (group.tail.k.shape[3] + group.tail.v.shape[3]) * group.tail.k.element_size()
        held = int(group.tail.lengths.sum()) * group.tail.k.shape[1]
        sizes["tail"] = held * vector
        statistics = 4 * held * len(group.tail.fields)
        for name, tiles in (("sink", group.sink), ("body", group.body)):
            if tiles is not None:
                sizes[name] = int(tiles.counts.sum()) * vector
                statistics += int(tiles.counts.sum()) * 4 * (1 + len(tiles.fields))
        queries = 0 if group.queries is None else group.queries.nbytes
        sizes["statistics"] = statistics + queries
    return sizes
