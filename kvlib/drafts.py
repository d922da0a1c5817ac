"""Provisional tokens: what assisted decoding attends before it knows whether they stay.

A draft remembers enough to be undone.  While the prompt is open nothing has been observed or sealed for its newest tokens;
afterwards the state before them is kept, and a crop goes back to it and replays what was accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.kernels.attention import Partial
from kvlib.segment import Spec, Tail, Tiles

if TYPE_CHECKING:
    from kvlib.group import HeadGroup

LONGEST = 128  # most tokens that can be taken back


@dataclass
class Draft:
    """The newest provisional tokens of a group: q [B, Hq, n, d], k, v [B, H, n, d], lse [B, Hq, n], and the state before
    them (tail, sink, body, tokens, until_seal), None while the prompt was open."""

    q: Tensor
    k: Tensor
    v: Tensor
    new: np.ndarray
    lse: Tensor
    spec: Spec
    before: tuple[Tail, Tiles | None, Tiles | None, np.ndarray, int] | None

    def check(self, n: int) -> None:
        """Raise ValueError where n tokens are more than there are."""
        if n > self.q.shape[2]:
            raise ValueError(f"cannot take back {n} tokens: only the newest {self.q.shape[2]} are provisional")

    def settle(self, group: HeadGroup, n: int) -> None:
        """Take back the newest n tokens; the others count from now on."""
        stay = self.q.shape[2] - n
        new = np.clip(self.new - n, 0, stay)
        if self.before is None:
            group.forget(n)
            if stay:
                group.observe(self.q[:, :, :stay], self.lse[:, :, :stay], new, self.spec, prompt=True)
        elif n:
            group.tail, group.sink, group.body, group.tokens, group.until_seal = self.before
            q, k, v, lse = (x[:, :, :stay] for x in (self.q, self.k, self.v, self.lse))
            for _ in one_by_one(group, q, k, v, new, self.spec, lse):
                pass

    def tensors(self) -> list[Tensor]:
        """Every storage held for the way back."""
        found = [self.q, self.k, self.v, self.lse]
        if self.before is not None:
            tail, sink, body, *_ = self.before
            for kept in (tail, sink, body):
                found += [] if kept is None else [*kept.tensors(), *kept.bookkeeping()]
        return found


def draft_of_prompt(group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, new: np.ndarray, spec: Spec) -> tuple[Draft, Tensor]:
    """Attend a prompt chunk of which an unknown number of tokens, at most LONGEST, may be taken back."""
    assert group.tail is not None
    final = max(0, q.shape[2] - LONGEST)
    group.tail.append(k, v, new)
    group.tokens = group.tokens + new
    out, lse, _ = group.attend(q, spec, prompt=True, lse=True)[0]
    assert lse is not None
    if final:
        early = lse.clone()
        early[:, :, final:] = float("inf")  # queries that may yet be taken back do not vote
        group.spec = spec
        if group.needs.votes:
            group.remember(q[:, :, :final], np.maximum(new - LONGEST, 0))
        if group.needs.mass:
            group.add(*group.mass(q, early, new, prompt=True))
    rest = slice(final, None)
    q, k, v = (x[:, :, rest].clone() for x in (q, k[:, :, :0], v[:, :, :0]))
    return Draft(q, k, v, np.minimum(new, LONGEST), lse[:, :, rest].clone(), spec, None), out


def draft_of_steps(group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, new: np.ndarray, spec: Spec) -> tuple[Draft, Tensor]:
    """Attend tokens after the prompt as if they came one by one; of more than LONGEST the older ones are final."""
    final, outs = max(0, q.shape[2] - LONGEST), []
    if final:
        head = np.maximum(new - LONGEST, 0)
        first = [x[:, :, :final] for x in (q, k, v)]
        outs.append(group.advance(first[0], first[1], first[2], head, spec, prompt=True).out)
        q, k, v, new = q[:, :, final:], k[:, :, final:], v[:, :, final:], new - head
    assert group.tail is not None
    before = (group.tail.snapshot(), group.sink, group.body, group.tokens, group.until_seal)
    runs = list(one_by_one(group, q, k, v, new, spec, None))
    lse = torch.cat([run.lse for run in runs if run.lse is not None], 2)
    return Draft(q, k, v, new, lse, spec, before), torch.cat([*outs, *(run.out for run in runs)], 2)


def one_by_one(
    group: HeadGroup, q: Tensor, k: Tensor, v: Tensor, new: np.ndarray, spec: Spec, lse: Tensor | None
) -> Iterator[Partial]:
    """Decode several tokens as if they came alone: in runs that end where a block is due."""
    i, n = 0, q.shape[2]
    while i < n:
        j = min(n, i + max(1, group.until_seal))
        run = slice(i, j)
        count = np.clip(new - (n - j), 0, j - i)
        known = None if lse is None else lse[:, :, run]
        yield group.advance(q[:, :, run], k[:, :, run], v[:, :, run], count, spec, False, known, keep_lse=True)
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
    follow = group.forward(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], after, spec, recording=True)
    return torch.cat([out, follow], 2)
