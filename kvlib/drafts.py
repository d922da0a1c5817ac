"""Provisional tokens: what assisted decoding attends before it knows whether they stay.

A draft remembers enough to be undone.  While the prompt is open nothing has been observed or sealed for its newest tokens;
afterwards the state before them is kept, and a crop goes back to it and replays what was accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.indexed import Indexed
from kvlib.policies.selection import Past
from kvlib.segment import Spec, Tail, Tiles

if TYPE_CHECKING:
    from kvlib.group import HeadGroup
    from kvlib.kernels.attention import Partial

LONGEST = 128  # most tokens that can be taken back, unless the draft was announced to be longer


@dataclass
class Chunk:
    """Attended tokens: q [B, Hq, n, d], k, v [B, H, n, d], new [B] real ones at the end of each row, lse [B, Hq, n]."""

    q: Tensor
    k: Tensor
    v: Tensor
    new: np.ndarray
    lse: Tensor

    def part(self, start: int, stop: int) -> Chunk:
        """Columns start..stop."""
        cut = slice(start, stop)
        new = np.clip(self.new - (self.q.shape[2] - stop), 0, stop - start)
        return Chunk(self.q[:, :, cut], self.k[:, :, cut], self.v[:, :, cut], new, self.lse[:, :, cut])


@dataclass(frozen=True)
class State:
    """What a group goes back to."""

    tail: Tail
    sink: Tiles | None
    body: Tiles | Indexed | None
    tokens: np.ndarray
    until_seal: int
    chosen: np.ndarray
    past: Past

    @classmethod
    def of(cls, group: HeadGroup) -> State:
        """The present state, which later tokens do not disturb."""
        assert group.tail is not None
        body = group.body.snapshot() if isinstance(group.body, Indexed) else group.body
        return cls(group.tail.snapshot(), group.sink, body, group.tokens, group.until_seal, group.chosen, group.past)

    def restore(self, group: HeadGroup) -> None:
        """Make it the state of the group."""
        group.tail, group.sink, group.body, group.past = self.tail, self.sink, self.body, self.past
        group.tokens, group.until_seal, group.chosen = self.tokens, self.until_seal, self.chosen

    def tensors(self) -> list[Tensor]:
        """Every storage held."""
        found = [x for kept in (self.tail, self.sink) if kept is not None for x in (*kept.tensors(), *kept.bookkeeping())]
        if isinstance(self.body, Indexed):
            found += [x for _, _, x in self.body.storages()]
        elif self.body is not None:
            found += [*self.body.tensors(), *self.body.bookkeeping()]
        return found + self.past.tensors()


@dataclass
class Draft:
    """The provisional chunks of a group, its state before them, or None for a chunk that came while the prompt was open,
    and what its selector remembered after each column."""

    chunks: list[Chunk]
    spec: Spec
    before: State | None
    pasts: list[Past] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Columns that may be taken back."""
        return sum(chunk.q.shape[2] for chunk in self.chunks)

    def check(self, n: int) -> None:
        """Raise ValueError where n tokens are more than there are."""
        if n > self.tokens:
            raise ValueError(f"cannot take back {n} tokens: only the newest {self.tokens} are provisional")

    def settle(self, group: HeadGroup, n: int) -> None:
        """Take back the newest n tokens; the others count from now on."""
        stay = self.tokens - n
        if self.before is None:
            (chunk,) = self.chunks
            group.forget(n)
            if stay:
                part = chunk.part(0, stay)
                group.observe(part.q, part.lse, part.new, self.spec, prompt=True)
        elif n:
            self.before.restore(group)
            past = self.pasts[stay - 1] if stay and self.pasts else self.before.past
            for chunk in self.chunks:
                columns = min(stay, chunk.q.shape[2])
                stay -= columns
                if columns:
                    replay(group, chunk.part(0, columns), self.spec)
            group.past = past

    def tensors(self) -> list[Tensor]:
        """Every storage held for the way back."""
        found = [x for chunk in self.chunks for x in (chunk.q, chunk.k, chunk.v, chunk.lse)]
        found += [x for past in self.pasts for x in past.tensors()]
        return found if self.before is None else found + self.before.tensors()


def draft_of_prompt(group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, new: np.ndarray, spec: Spec) -> Tensor:
    """Attend a prompt chunk of which an unknown number of tokens, at most LONGEST, may be taken back."""
    final = max(0, q.shape[2] - LONGEST)
    group.take_in(k, v, new)
    out, lse, _ = group.attend(q, spec, new, prompt=True, lse=True)[0]
    assert lse is not None
    if final:
        early = lse.clone()
        early[:, :, final:] = float("inf")  # queries that may yet be taken back do not vote
        group.spec = spec
        group.remember(q[:, :, :final], np.maximum(new - LONGEST, 0), later=q.shape[2] - final)
        if group.needs.mass:
            group.add(*group.mass(q, early, new, prompt=True))
    rest, nothing = slice(final, None), k[:, :, :0].clone()  # keys stay in the tail: there is nothing to replay
    chunk = Chunk(q[:, :, rest].clone(), nothing, nothing, np.minimum(new, LONGEST), lse[:, :, rest].clone())
    group.draft = Draft([chunk], spec, None)
    return out


def draft_of_steps(group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, new: np.ndarray, spec: Spec, limit: int) -> Tensor:
    """Attend tokens after the prompt as if they came one by one, adding to what is provisional already; of more than
    `limit` the older ones are final."""
    final, outs = max(0, q.shape[2] - limit), []
    if final:
        head = np.maximum(new - limit, 0)
        outs.append(group.step(q[:, :, :final], k[:, :, :final], v[:, :, :final], head, spec, prompt=True).out)
        q, k, v, new = q[:, :, final:], k[:, :, final:], v[:, :, final:], new - head
    if group.draft is None:
        group.draft = Draft([], spec, State.of(group))
    runs: list[Partial] = []
    for i, j in _runs(group, q.shape[2]):
        count = np.clip(new - (q.shape[2] - j), 0, j - i)
        runs.append(group.step(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], count, spec, prompt=False, keep_lse=True))
    lse = torch.cat([run.lse for run in runs if run.lse is not None], 2)
    group.draft.chunks.append(Chunk(q, k, v, new, lse))
    return torch.cat([*outs, *(run.out for run in runs)], 2)


def replay(group: HeadGroup, chunk: Chunk, spec: Spec) -> None:
    """Take in tokens once more whose attention is known."""
    for i, j in _runs(group, chunk.q.shape[2]):
        run = chunk.part(i, j)
        group.take_in(run.k, run.v, run.new)
        group.account(run.q, run.lse, run.new, spec, prompt=False)


def _runs(group: HeadGroup, n: int) -> Iterator[tuple[int, int]]:
    """Split n columns where a block becomes due, so that every token finds what it would find alone."""
    i = 0
    while i < n:
        j = min(n, i + max(1, group.until_seal))
        yield i, j
        i = j


def prompt_then_drafts(
    group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, new: np.ndarray | None, spec: Spec, drafts: int
) -> Tensor:
    """Split a chunk that ends the prompt and goes on with drafts, so that the drafts find what a step would find."""
    cut = q.shape[2] - drafts
    before = None if new is None else np.maximum(new - drafts, 0)
    after = None if new is None else np.minimum(new, drafts)
    out = group.forward(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], before, spec, recording=False)
    group.finish_prefill()
    follow = group.forward(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], after, spec, recording=True, drafts=drafts)
    return torch.cat([out, follow], 2)
