"""What a head group does under a selector: tokens leave its tail for an indexed body, and a query reads some of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from math import lcm
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.candidates import Candidates
from kvlib.indexed import Indexed
from kvlib.kernels.attention import Partial
from kvlib.kernels.merge import merge
from kvlib.offload.transfer import sent
from kvlib.policies.base import Split
from kvlib.policies.encoding import DENSE
from kvlib.policies.selection import SEGMENT, Block, Everything
from kvlib.ranked import Query
from kvlib.segment import Spec, Tiles

if TYPE_CHECKING:
    from kvlib.group import HeadGroup


def split(group: HeadGroup) -> Split:
    """Shares of the budget at the end of the prompt: sizes by what seals, the rest of the budget by what selects."""
    assert group.selector is not None and group.sealing is not None
    found = group.sealing.split(group.tokens, group.sizes)
    if group.sealing is group.selector:
        return found
    taken = found.sink + found.recent + found.block
    return replace(found, body=np.maximum(group.selector.tokens(group.tokens) - taken, 0))


# ------------------------------------------------------------------------------------------------------------- reading
def attend(group: HeadGroup, q: Tensor, spec: Spec, new: np.ndarray | None, lse: bool) -> Partial:
    """Attention of q [B, Hq, n, d], each row over the sinks, the tail up to itself and what the selector reads for it; the
    queries are of the last new[r] tokens of row r (None: all)."""
    assert group.tail is not None and group.selector is not None
    body = group.body
    kept = group.sink is not None or body is not None
    tail = group.tail.attend(q, spec, lse=lse or kept or spec.sinks is not None)
    parts = [tail] if group.sink is None else [group.sink.attend(q, spec), tail]
    store = body.store.drafting() if group.cheap and isinstance(body, Indexed) else None
    if group.whole or not group.selector.selects():  # rows that read everything differ in nothing
        if group.draft is not None:
            group.draft.pasts.extend([group.past] * q.shape[2])
        return merge([*parts, body.attend(q, spec, store)] if isinstance(body, Indexed) else parts, spec.sinks)
    rest = None if body is None else lse_of(parts, spec)
    rows, n = [], q.shape[2]
    for j in range(n):  # more than one row only while drafts are verified: each selects as if it came alone
        later = n - 1 - j
        before, newest = group.past, partial(_id, group, later)
        scored, group.past = group.selector.prepare(q[:, :, j], group.past, newest, group.tokenizer)
        here = parts if n == 1 else [_row(part, j) for part in parts]
        if isinstance(body, Indexed):
            row_rest = None if rest is None else rest[:, :, j : j + 1]
            query = Query(q[:, :, j : j + 1], scored, row_rest, spec)
            found, group.past = body.read(query, room(group) + later, group.tokens - later, group.past, store)
            here = [*here, *found]
        if new is not None:
            group.past = group.past.where(new > later, before)
        if group.draft is not None:
            group.draft.pasts.append(group.past)
        rows.append(merge(here, spec.sinks))
    if n == 1:
        return rows[0]
    total = None if rows[0].lse is None else torch.cat([row.lse for row in rows if row.lse is not None], 2)
    return Partial(torch.cat([row.out for row in rows], 2), total)


def room(group: HeadGroup) -> np.ndarray:
    """How many tokens of the body the newest query of each row reads, [B]: what sinks and tail leave of the budget."""
    assert group.tail is not None and group.split is not None
    left: np.ndarray = group.split.total - group.tail.lengths - (0 if group.sink is None else group.sink.counts[:, 0])
    return left


def lse_of(parts: list[Partial], spec: Spec) -> Tensor:
    """Log-sum-exp [B, Hq, n] of several parts and a model's own sinks."""
    lses = [part.lse for part in parts if part.lse is not None]
    if spec.sinks is not None:
        lses.append(spec.sinks.float().view(1, -1, 1))
    return reduce(torch.logaddexp, lses)


def _row(part: Partial, j: int) -> Partial:
    return Partial(part.out[:, :, j : j + 1], None if part.lse is None else part.lse[:, :, j : j + 1])


def _id(group: HeadGroup, later: int) -> Tensor:
    """Ids [B] of the tokens that `later` others have followed."""
    assert group.token_ids is not None and group.tail is not None
    position = sent(group.tokens - 1 - later, group.tail.k.device).clamp_(min=0)
    return group.token_ids(position.view(-1, 1, 1)).view(-1)


# ------------------------------------------------------------------------------------------------------------- sealing
def seal(group: HeadGroup, closing: bool = False) -> None:
    """Move what is due from the tail to the sinks and the indexed body, and note when the next block will be; `closing`
    when the prompt has just ended."""
    assert group.tail is not None and group.sealing is not None
    split = group.split
    if split is None:  # sizes that do not depend on how much of the prompt has been seen
        split = group.sealing.split(np.full_like(group.tokens, SEGMENT), group.sizes)
    sinks, body = _due(group, split, closing)
    moved = body + sinks
    if moved.any():
        moved = sinks + _take_body(group, sinks, body, split, prompt=group.open or closing)
        _take_sinks(group, sinks)
        group.chosen = np.where(moved > 0, group.tokens, group.chosen if len(group.chosen) else 0)
        group.tail.drop(moved)
    sealed = group.tokens - group.tail.lengths
    first = np.where(sealed > 0, 0, split.sink)
    wait = sealed + first + split.recent + split.block
    wait = np.where(sealed > 0, wait, np.maximum(wait, _least(group, split)))
    group.until_seal = max(1, int((wait - group.tokens).min()))


def _least(group: HeadGroup, split: Split) -> np.ndarray:
    """Tokens a row must have before its first ones leave the tail, [B]."""
    least = np.zeros_like(group.tokens)
    if group.tier is None and group.sealing is group.selector:  # all of a smaller budget stays where it is
        least = split.total
    if group.codec is not None:  # and there must be enough to fit a codec to
        most = max(form.least for form in group.codec.forms())
        least = np.maximum(least, split.sink + split.recent + most)
    return least


def _due(group: HeadGroup, split: Split, closing: bool) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of each row leave the tail, for the sinks and for the body."""
    assert group.tail is not None and group.selector is not None
    held, none = group.tail.lengths, np.zeros_like(group.tokens)
    started = group.tokens > held
    sinks = np.where(started, 0, split.sink)
    free = np.maximum(held - split.recent - sinks, 0)
    if group.open:  # a prompt in the roomy tier leaves the device as it comes; elsewhere all of it is dense until it ends
        early = group.tier is not None and group.evictor is None and not group.needs.products
        early = early and (group.codec is None or all(form.exact for form in group.codec.forms()))  # prompts are exact
        piece = _segment(group)
        body = free // piece * piece if early else none
    else:
        later = started & group.selector.fitted & (not closing)
        coded = started & (group.codec is not None) & (not closing)
        whole = group.codec is not None and isinstance(group.sealing, Everything)
        by_block = later | coded | whole  # borders follow from the count of tokens alone
        step = np.where(by_block, split.block, _step(group))
        ready = (free >= split.block) | closing
        ready &= started | (group.tokens >= _least(group, split))
        body = np.where(ready, free // step * step, 0)
    return np.where(body > 0, sinks, 0), body


def _take_sinks(group: HeadGroup, sinks: np.ndarray) -> None:
    """Move each row's first sinks[r] tail tokens to the sinks."""
    assert group.tail is not None
    if not sinks.any():
        return
    device, heads = group.tail.k.device, group.tail.k.shape[1]
    step = torch.arange(int(sinks.max()), device=device)
    begin = sent(group.tail.starts, device)[:, None]
    slot = torch.where(step < sent(sinks, device)[:, None], begin + step, -1)[:, None].expand(-1, heads, -1)
    candidates = Candidates(group.sink, group.tail, slot, step.int().expand_as(slot))
    group.sink = candidates.gather(candidates.valid, fields=False)


def _take_body(group: HeadGroup, sinks: np.ndarray, due: np.ndarray, split: Split, prompt: bool) -> np.ndarray:
    """Move the due[r] tail tokens after each row's new sinks to the body, as whole units; returns how many went."""
    assert group.tail is not None and group.selector is not None
    tail, body = group.tail, _body(group, implicit=not group.selector.fitted)
    sealed = group.tokens - tail.lengths
    fresh = body.counts == 0
    body.base = np.where(fresh, sealed + sinks, body.base)
    went = np.zeros_like(due)
    for rows in _alike(np.stack([due, fresh, split.block], 1), group.selector.requirements().token_ids):
        first = tail.starts[rows] + sinks[rows]
        limit = int(split.block[rows[0]])
        block = _block(group, body, rows, first, int(due[rows[0]]), limit, fresh=bool(fresh[rows[0]]))
        whole = group.selector.whole(block)
        whole = whole // group.grain * group.grain if group.selector.fitted else whole // _step(group) * _step(group)
        if not whole:
            continue
        pieces = whole
        if not (prompt or fresh[rows[0]]):
            pieces = limit if group.selector.fitted or group.codec is not None else whole
        elif group.selector.fitted or body.store.lengths:  # a prompt is fitted to, and has segments, of bounded length
            pieces = _segment(group)
        body.store.fit(rows, block.keys, block.values, block.positions)
        for start in range(0, whole, pieces):
            stop = min(whole, start + pieces)
            part = _block(group, body, rows, first + start, stop - start, limit, fresh=block.fresh)
            units = group.selector.build(part)
            body.append(rows, part.keys, part.values, part.positions, units, part.fresh)
        went[rows] = whole
    if not body.counts.any():
        group.body = None
    return went


def _step(group: HeadGroup) -> int:
    """Tokens that make whole units and can be encoded."""
    assert group.selector is not None
    return lcm(max(group.selector.run, 1), group.grain)


def _segment(group: HeadGroup) -> int:
    """Most prompt tokens that are taken into the body at once."""
    return max(1, SEGMENT // _step(group)) * _step(group)


def _alike(kinds: np.ndarray, alone: bool) -> Iterator[np.ndarray]:
    """Rows with something due that can be taken together: of equal kinds [B, ...], or each for itself."""
    rows = np.flatnonzero(kinds[:, 0])
    if alone:
        yield from (rows[i : i + 1] for i in range(len(rows)))
        return
    for kind in np.unique(kinds[rows], axis=0):
        yield rows[(kinds[rows] == kind).all(1)]


def _block(
    group: HeadGroup, body: Indexed, rows: np.ndarray, first: np.ndarray, m: int, limit: int, *, fresh: bool
) -> Block:
    """The m tail tokens from slot first[i] on of rows[i]; `fresh`: of prompts of which the body has had nothing."""
    assert group.tail is not None
    tail = group.tail
    if len(rows) == len(tail.starts) and (first == first[0]).all():
        k, v = (x[:, :, first[0] : first[0] + m] for x in (tail.k, tail.v))
    else:
        k, v = (torch.stack([x[r, :, at : at + m] for r, at in zip(rows, first, strict=True)]) for x in (tail.k, tail.v))
    at = group.tokens[rows] - tail.lengths[rows] + first - tail.starts[rows]
    begin = sent(at, tail.k.device).view(-1, 1, 1)
    positions = (begin + torch.arange(m, device=tail.k.device)).expand(-1, k.shape[1], -1)
    return _describe(group, body, rows, (k, v, positions), at, limit, fresh)


def _describe(
    group: HeadGroup,
    body: Indexed,
    rows: np.ndarray,
    part: tuple[Tensor, Tensor, Tensor],
    first: np.ndarray,
    limit: int,
    fresh: bool,
) -> Block:
    """A block of keys, values and positions [R, H, m, ...] of the rows given, in spans from positions first [R] on."""
    k, v, positions = part
    whole = len(rows) == len(group.tokens)
    index = None if whole else sent(rows, k.device)
    fixed = {name: x if index is None else x[index] for name, x in body.fixed.items()}
    heads = np.arange(k.shape[1]) if group.heads is None else group.heads

    def ids(start: int, stop: int) -> Tensor:
        assert group.token_ids is not None
        span = torch.arange(start, stop, device=k.device).expand(len(group.tokens), 1, -1)
        found = group.token_ids(span)[:, 0]
        return found if index is None else found[index]

    return Block(k, v, positions, first, heads, limit, fixed, ids, group.tokenizer, fresh)


def _body(group: HeadGroup, implicit: bool) -> Indexed:
    """The group's indexed body, made where there is none."""
    assert group.tail is not None and group.selector is not None
    if not isinstance(group.body, Indexed):
        tail, selector = group.tail, group.selector
        batch, heads = tail.k.shape[:2]
        places = np.arange(heads) if group.heads is None else group.heads
        fixed = selector.calibrate(group.products, places, tail.k)
        base = np.zeros(batch, dtype=np.int64)
        forms = (DENSE, DENSE) if group.codec is None else group.codec.forms()
        device, rotary = tail.k.device, group.rotary
        group.body = Indexed(selector, group.tier, batch, heads, device, base, implicit, fixed, forms, rotary)
    return group.body


def index_kept(group: HeadGroup) -> None:
    """Index what an evictor has kept of the prompt: `Tiles` whose heads hold equally many tokens become the body."""
    tiles, group.body = group.body, None
    assert isinstance(tiles, Tiles) and group.selector is not None and group.split is not None
    body = _body(group, implicit=False)
    slots = tiles.slots()
    for row in np.flatnonzero(tiles.counts[:, 0]):
        index = slots[row, :, : int(tiles.counts[row, 0])]
        k, v, positions = (x.flatten(0, 1)[index][None] for x in (tiles.k, tiles.v, tiles.positions))
        rows = np.array([row])
        begin = 0 if group.sink is None else int(group.sink.counts[row, 0])
        part = (k, v, positions.long())
        block = _describe(group, body, rows, part, np.array([begin]), int(group.split.block[row]), fresh=True)
        body.append(rows, *part, group.selector.build(block), fresh=True)
