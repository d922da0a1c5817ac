"""What a head group does under an evictor: blocks leave its tail, the best of them and of the body stay, the others go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.candidates import Candidates
from kvlib.coded import Coding
from kvlib.indexed import Indexed
from kvlib.kernels.merge import merge
from kvlib.offload.transfer import sent
from kvlib.policies.base import Split, View
from kvlib.segment import Tiles

if TYPE_CHECKING:
    from kvlib.group import HeadGroup


def seal(group: HeadGroup) -> None:
    """Move what is due out of the tail: whole blocks, counted from each row's first token."""
    assert group.evictor is not None and group.tail is not None
    split = group.split or group.evictor.split(group.tokens, group.sizes)
    sealed = group.tokens - group.tail.lengths
    due = np.maximum(split.total, sealed + split.recent + split.block)
    target = (group.tokens - split.recent) // split.block * split.block
    oldest = np.where(group.tokens >= due, np.maximum(target - sealed, 0), 0)
    _compress(group, oldest, split)
    sealed += oldest
    group.until_seal = int((np.maximum(split.total, sealed + split.recent + split.block) - group.tokens).min())


def choose_once(group: HeadGroup) -> None:
    """Evict what a one-shot method does not keep of the prompt."""
    assert group.tail is not None and group.split is not None
    split = group.split
    over = group.tokens > split.total
    group.chosen = np.where(over, group.tokens, 0)
    _compress(group, np.where(over, group.tokens - split.recent, 0), split)
    group.queries = None
    group.tail.fields = {}
    group.body = group.body.with_fields() if isinstance(group.body, Tiles) else None


def _compress(group: HeadGroup, oldest: np.ndarray, split: Split) -> None:
    """Rank the body and the `oldest[r]` first tail tokens of each row together; keep the best as the new body."""
    assert group.evictor is not None and group.tail is not None
    if not oldest.any():
        return
    device, heads = group.tail.k.device, group.tail.k.shape[1]
    m = int(oldest.max())
    steps = torch.arange(m, device=device)
    sealed = sent(group.tokens - group.tail.lengths, device)[:, None]
    count = sent(oldest, device)[:, None]
    begin = sent(group.tail.starts, device)[:, None]
    position = (sealed + steps).int()
    slot = torch.where(steps < count, begin + steps, -1)[:, None].expand(-1, heads, -1)
    is_sink = (position < sent(split.sink, device)[:, None]) & (slot[:, 0] >= 0)

    assert not isinstance(group.body, Indexed)
    held = group.body.home.bring(group.body) if group.body is not None and group.body.home is not None else group.body
    candidates = Candidates(held, group.tail, slot, position[:, None].expand_as(slot))
    rankable = candidates.valid.clone()
    rankable[..., candidates.from_body :] &= ~is_sink[:, None]
    view = View(
        candidates.positions,
        candidates.valid,
        candidates.field("mass") if group.needs.mass else None,
        _votes(group, candidates, split) if group.needs.votes else None,
        _fetch(group, candidates),
        sent(np.arange(heads) if group.heads is None else group.heads, device),
        group.tokenizer,
    )
    keep = group.evictor.keep(view, rankable, sent(split.body, device)) & rankable
    first_ones = is_sink[:, None].expand_as(slot)
    if group.grain > 1:  # what does not fill a group of the codec stays dense, beside the sinks
        spare = keep & (keep.cumsum(-1) <= keep.sum(-1, keepdim=True) % group.grain)
        keep, first_ones = keep & ~spare, first_ones | spare[..., candidates.from_body :]
    body = candidates.gather(keep, coding=_coding(group))
    if body is not None and group.home is not None:
        body = group.home.settle(body)
    if first_ones.any():
        first = Candidates(group.sink, group.tail, slot, position[:, None].expand_as(slot))
        chosen = first.valid.clone()
        chosen[..., first.from_body :] &= first_ones
        group.sink = first.gather(chosen, fields=False)
    group.body = body
    group.tail.drop(oldest)


def _coding(group: HeadGroup) -> Coding | None:
    """How the body's tokens become bytes, if they do here: where a selector or one evictor's choice comes first, they are
    encoded when they enter the indexed body."""
    if group.codec is None or group.selector is not None:
        return None
    assert group.tail is not None
    k, v = group.tail.k, group.tail.v
    return Coding(group.codec.forms(), k.shape[3], v.shape[3], k.dtype)


def _votes(group: HeadGroup, candidates: Candidates, split: Split) -> Tensor:
    """Probability the candidates got from the newest prompt queries, at most `recent`, averaged over each group's
    query heads."""
    assert group.tail is not None and group.queries is not None
    spec = group.spec
    shared = group.queries.shape[1] // group.tail.k.shape[1]
    lse = merge([group.tail.attend(group.queries, spec)], spec.sinks).lse
    assert lse is not None
    n = lse.shape[2]
    silent = sent(n - np.minimum(split.recent, n), lse.device)[:, None]
    lse = lse.masked_fill((torch.arange(n, device=lse.device) < silent)[:, None], float("inf"))
    mass = group.tail.column_mass(group.queries, lse, spec) / shared
    return candidates.take_tail(torch.nn.functional.pad(mass, (group.tail.begin, 0))).masked_fill(~candidates.valid, 0)


def _fetch(group: HeadGroup, candidates: Candidates) -> Callable[[str], Tensor]:
    def fetch(what: str) -> Tensor:
        if what != "token_ids":
            return candidates.vectors(what)
        if group.token_ids is None:
            raise ValueError("token ids were not asked for: declare needs = Needs(token_ids=True)")
        return group.token_ids(candidates.positions)

    return fetch
