"""One head group of one layer: sink | body | tail, and the moments at which tokens move between them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvlib import evict, recall
from kvlib.drafts import LONGEST, Draft, draft_of_prompt, draft_of_steps, prompt_then_drafts
from kvlib.home import Home
from kvlib.indexed import Indexed
from kvlib.kernels.attention import Partial
from kvlib.kernels.merge import merge
from kvlib.offload.transfer import sent
from kvlib.policies.base import Evictor, Needs, Sizes, Split
from kvlib.policies.encoding import Codec
from kvlib.policies.select.channels import channel_weight
from kvlib.policies.selection import Everything, Past, Selector
from kvlib.policies.tier.host import Host
from kvlib.segment import Spec, Tail, Tiles, close_gaps

if TYPE_CHECKING:
    from kvlib.kernels.rotary import Rotary

_Masses = tuple[Tensor, Tensor | None]  # attention got by the tail's live slots and by the body's
TokenIds = Callable[[Tensor], Tensor]  # positions [B, H, M] -> ids [B, H, M]


class HeadGroup:
    """Keys and values of some KV heads of a layer, under one evictor, one selector, one codec and one tier.

    heads [H]: the KV heads' places in the model, layer * kv_heads + head, for methods that tell heads apart.

    New tokens enter the tail, are attended, and leave it for the sink and the body (or for good) when the split of the
    budget says so.  The body is `Tiles` under an evictor, of which all is read, and `Indexed` under a selector or a codec,
    or where everything is kept outside the device.  Everything is counted per batch row from the row's first real token.
    """

    def __init__(
        self,
        evictor: Evictor | None = None,
        sizes: Sizes = Sizes(),  # noqa: B008  (frozen)
        token_ids: TokenIds | None = None,
        tokenizer: Any = None,
        selector: Selector | None = None,
        heads: np.ndarray | None = None,
        tier: Host | None = None,
        codec: Codec | None = None,
        rotary: Rotary | None = None,
    ):
        self.evictor = evictor if evictor is not None and evictor.evicts() else None
        self.selector = selector if selector is not None and selector.selects() else None
        self.online = self.evictor is not None and self.evictor.when == "online"
        if self.selector is None and not self.online and (codec or (self.evictor is None and tier)):
            self.selector = Everything() if codec is None else Everything(recent=codec.recent)
        self.heads, self.tier, self.codec, self.rotary = heads, tier, codec, rotary
        self.grain = 1 if codec is None else codec.grain
        self.sealing = self.selector  # by whose sizes tokens leave the tail: another's where the selector only drafts
        self.plain = self.evictor is None and self.selector is None  # whether all is kept in the tail and read
        self.seals = self.online or self.selector is not None  # whether tokens leave the tail after the prompt
        self.needs = Needs() if self.evictor is None else self.evictor.requirements()
        self.needs |= Needs() if self.selector is None else self.selector.requirements()
        self.sizes, self.token_ids, self.tokenizer = replace(sizes, grain=self.grain), token_ids, tokenizer
        self.clear()

    def clear(self) -> None:
        """Forget every token."""
        self.tail: Tail | None = None
        self.sink: Tiles | None = None
        self.body: Tiles | Indexed | None = None
        self.tokens = np.zeros(0, dtype=np.int64)  # seen by each row, padding left out
        self.open = True  # whether the prompt may still grow
        self.split: Split | None = None  # frozen when the prompt ends
        self.past = Past()  # what the selector remembers of earlier queries
        self.products: Tensor | None = None  # sum of |q.k| per key channel of the prompt, for selectors that calibrate
        self.chosen = np.zeros(0, dtype=np.int64)  # tokens of each row from which a one-shot method chose
        self.until_seal = 0  # tokens until the next block is due
        self.queries: Tensor | None = None  # newest prompt queries, for votes
        self.draft: Draft | None = None
        self.spec = Spec(1.0)  # how the model attends, from the last chunk
        self.whole, self.cheap = False, False  # whether queries read all whatever is selected, and from fewer bytes
        self.home: Home | None = None  # host memory behind tiles, made with the tail

    # ------------------------------------------------------------------------------------------------ one chunk
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: np.ndarray | None,
        spec: Spec,
        recording: bool,
        drafts: int | None = None,
    ) -> Tensor:
        """Take in a chunk k [B, H, n, d], v [B, H, n, dv] whose last new[r] tokens of row r are real (None: all), and
        attend its queries q [B, Hq, n, d] to all that is held.  While `recording` the newest tokens stay provisional until
        `crop`; `drafts` is how many of the chunk's newest are drafts, None where nobody said.
        Returns fp32 [B, Hq, n, dv]."""
        n = q.shape[2]
        if drafts and self.open and not self.plain:
            return prompt_then_drafts(self, q, k, v, new, spec, drafts)
        grows = recording and self.draft is not None and self.draft.before is not None
        if self.draft is not None and not (grows and self.draft.tokens + n <= LONGEST):
            self.settle()
        if self.tail is None:
            self._begin(Tail(k, v, ("mass",) if self.needs.mass else ()), np.zeros(len(k), dtype=np.int64))
        elif n == 1:
            self.finish_prefill()
        prompt = self.open or (n > 1 and not recording)
        final = not recording or self.plain or self.reversible or (self.open and drafts == 0)
        if final:
            return self.step(q, k, v, new, spec, prompt).out
        if new is None:
            new = np.full(len(k), n, dtype=np.int64)
        if self.open:
            return draft_of_prompt(self, q, k, v, new, spec)
        return draft_of_steps(self, q, k, v, new, spec, max(LONGEST, (drafts or 0) + 1))

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: np.ndarray | None,
        spec: Spec,
        prompt: bool,
        keep_lse: bool = False,
    ) -> Partial:
        """Take in -> attend -> account."""
        self.take_in(k, v, new)
        part, masses = self.attend(q, spec, new, prompt, lse=self.needs.mass or keep_lse)
        self.account(q, part.lse, new, spec, prompt, masses)
        return part

    def _begin(self, tail: Tail, tokens: np.ndarray) -> None:
        """Start with a tail of rows that have seen `tokens` [B]."""
        self.tail, self.tokens = tail, tokens
        if self.tier is not None and self.selector is None:
            self.home = Home(tail.k.device, self.tier.attend)

    def take_in(self, k: Tensor, v: Tensor, new: np.ndarray | None) -> None:
        """Append a chunk to the tail."""
        if self.tail is None:
            self._begin(Tail(k, v), np.zeros(len(k), dtype=np.int64))
        assert self.tail is not None
        self.tail.append(k, v, new)
        self.tokens = self.tokens + (k.shape[2] if new is None else new)

    def account(
        self,
        q: Tensor,
        lse: Tensor | None,
        new: np.ndarray | None,
        spec: Spec,
        prompt: bool,
        masses: _Masses | None = None,
    ) -> None:
        """Observe what the newest tokens' queries q, of log-sum-exp lse, attended to, and seal what has become due."""
        if self.plain:
            return
        self.observe(q, lse, new, spec, prompt, masses)
        self.until_seal -= q.shape[2]
        if self.seals and (prompt or self.until_seal <= 0):
            self.seal()

    def attend(
        self, q: Tensor, spec: Spec, new: np.ndarray | None, prompt: bool, lse: bool
    ) -> tuple[Partial, _Masses | None]:
        """Merged attention over sink, body and tail; for a single query row of a method that accumulates attention also
        what the body and the tail got of it, which spares a second pass over the keys."""
        assert self.tail is not None
        if self.selector is not None and not prompt:
            return recall.attend(self, q, spec, new, lse), None
        if new is None:
            self.past = Past()  # a prompt's queries do not continue what was generated before it
        else:
            self.past = Past().where(new > 0, self.past)
        # On a GPU a second pass over the keys is cheaper than attention without a kernel of one pass, but not their second
        # way there from the host.
        near = q.is_cuda and self.home is None
        observed = self.needs.mass and self.online and q.shape[2] == 1 and not near
        kept = self.sink is not None or self.body is not None
        parts = [] if self.sink is None else [self.sink.attend(q, spec)]
        body = None
        if isinstance(self.body, Tiles):
            body = self.body.attend(q, spec, probabilities=observed)
        elif self.body is not None:
            body = self.body.attend(q, spec)
        if body is not None:
            parts.append(body)
        tail = self.tail.attend(
            q, spec, *self.band(prompt), lse=lse or kept or spec.sinks is not None, probabilities=observed
        )
        merged = merge([*parts, tail], spec.sinks)
        if not observed:
            return merged, None
        assert tail.p is not None and tail.lse is not None and merged.lse is not None
        tail_p = tail.p * (tail.lse - merged.lse).exp()
        tail_mass = tail_p.view(len(q), self.tail.k.shape[1], -1, tail_p.shape[-1]).sum(2)
        if not isinstance(self.body, Tiles) or body is None:
            return merged, (tail_mass, None)
        assert body.p is not None and body.lse is not None
        return merged, (tail_mass, self.body.mass_of(body.p, (body.lse - merged.lse).exp()))

    def band(self, prompt: bool) -> tuple[int | None, int | Tensor]:
        """What a query sees of the tail; rows whose sink has left it have none there."""
        window, sink = (None, 0) if self.evictor is None else self.evictor.band(prompt)
        if window is None or self.sink is None:
            return window, sink
        gone = self.sink.counts[:, 0]
        if gone.all():
            return window, 0
        return window, sent(np.where(gone > 0, 0, sink), self.sink.k.device)

    def observe(
        self,
        q: Tensor,
        lse: Tensor | None,
        new: np.ndarray | None,
        spec: Spec,
        prompt: bool,
        masses: _Masses | None = None,
    ) -> None:
        """Keep what the evictor asked for; queries of padding count for nothing."""
        self.spec = spec
        if self.open:
            self.remember(q, new)
        if self.needs.mass and (self.open or self.online):
            if masses is None or (new is not None and (new < q.shape[2]).any()):
                assert lse is not None
                masses = self.mass(q, lse, new, prompt)
            self.add(*masses)

    def remember(self, q: Tensor, new: np.ndarray | None, later: int = 0) -> None:
        """Carry the newest prompt queries for the votes at its end, and add up what calibrations ask for; `later` tokens
        have followed these."""
        n = q.shape[2]
        if self.needs.products:
            assert self.tail is not None
            k = self.tail.k[:, :, self.tail.end - later - n : self.tail.end - later]
            real = None if new is None else torch.arange(n, device=q.device) >= sent(n - new, q.device)[:, None]
            found = channel_weight(q, k, real)
            self.products = found if self.products is None else self.products + found
        if not self.needs.votes:
            return
        held = q if self.queries is None else torch.cat([self.queries, q], 2)
        if self.queries is not None and new is not None and (new < n).any():
            held = close_gaps(held, n - new, new)
        self.queries = held[:, :, -self.needs.votes :].clone()

    def mass(self, q: Tensor, lse: Tensor, new: np.ndarray | None, prompt: bool) -> _Masses:
        """The attention that the tail's and the body's tokens get from the real queries of q."""
        assert self.tail is not None
        n = q.shape[2]
        if new is not None and (new < n).any():
            row = torch.arange(n, device=q.device)
            padding = row < sent(n - new, q.device)[:, None]
            lse = lse.masked_fill(padding[:, None], float("inf"))
        tail = self.tail.column_mass(q, lse, self.spec, *self.band(prompt))
        return tail, self.body.column_mass(q, lse, self.spec) if isinstance(self.body, Tiles) else None

    def add(self, tail: Tensor, body: Tensor | None) -> None:
        """Add attention got by the tail's live slots [B, H, live] and the body's [G, P] to their mass."""
        assert self.tail is not None
        self.tail.fields["mass"][:, :, self.tail.begin : self.tail.end] += tail
        if isinstance(self.body, Tiles) and body is not None:
            self.body = self.body.with_fields(mass=self.body.fields["mass"] + body)

    # ------------------------------------------------------------------------------------------- moving tokens on
    def finish_prefill(self) -> None:
        """The prompt is complete: freeze fractional budgets and let one-shot methods evict.  Idempotent."""
        if not self.open or self.tail is None or not self.tokens.any():
            return
        self.settle()
        if self.evictor is not None:
            self.split = self.evictor.split(self.tokens, self.sizes)
            if self.online:
                evict.seal(self)
            else:
                evict.choose_once(self)
        self.open = False
        if self.selector is not None:
            self.split = recall.split(self)
            if isinstance(self.body, Tiles):
                recall.index_kept(self)
            recall.seal(self, closing=True)

    def seal(self) -> None:
        """Move what is due out of the tail, and note when the next block will be."""
        if self.selector is not None:
            recall.seal(self)
        else:
            evict.seal(self)

    # ------------------------------------------------------------------------------------------------- rolling back
    @property
    def reversible(self) -> bool:
        """Whether forgetting the newest tokens leaves no trace: nothing is observed or sealed any more."""
        return not self.open and not self.seals

    def settle(self) -> None:
        """Let whatever is still provisional stay."""
        draft, self.draft = self.draft, None
        if draft is not None:
            draft.settle(self, 0)

    def check_crop(self, n: int) -> None:
        """Raise ValueError where taking back the newest n tokens would leave a trace."""
        if n == 0:
            return
        if self.draft is not None:
            self.draft.check(n)
            return
        held = 0 if self.tail is None else int(self._retractable().min())
        if n > held:
            name = next((method.name for method in (self.evictor, self.codec, self.selector) if method is not None), "full")
            raise ValueError(
                f"cannot take back {n} tokens from a {name} cache: only the newest {held} have left no mark; call "
                "cache.activate_past_recording() before the tokens arrive"
            )

    def _retractable(self) -> np.ndarray:
        """How many of each row's newest tokens can be dropped without a trace, nothing being provisional."""
        assert self.tail is not None
        if self.plain:
            return self.tail.lengths
        if self.selector is not None and self.evictor is None:
            leaves_marks = self.needs.products if self.open else self.selector.remembers
        else:
            leaves_marks = not self.reversible
        if leaves_marks:
            return np.zeros_like(self.tokens)
        since = self.tokens - self.chosen if len(self.chosen) else self.tokens
        free: np.ndarray = np.minimum(self.tail.lengths, since)
        return free

    def can_retract(self, hidden: np.ndarray) -> bool:
        """Whether each row's newest hidden[r] tokens can be dropped without a trace."""
        return self.tail is not None and self.draft is None and bool((hidden <= self._retractable()).all())

    def retract(self, hidden: np.ndarray) -> None:
        """Drop each row's newest hidden[r] tokens, which turned out to be padding."""
        assert self.tail is not None
        self.tail.retract(hidden)
        self.tokens = self.tokens - hidden

    def crop(self, n: int) -> None:
        """Take back the newest n tokens of every row; other provisional tokens become final and the prompt ends."""
        self.check_crop(n)
        draft, self.draft = self.draft, None
        if draft is not None:
            draft.settle(self, n)
        elif self.tail is not None:
            self.forget(n)
        self.finish_prefill()

    def forget(self, n: int) -> None:
        """Drop the newest n tokens of every row, which nothing has observed."""
        assert self.tail is not None
        self.tail.take_back(n)
        self.tokens = self.tokens - n

    # ---------------------------------------------------------------------------------------------------- the rest
    def copy(self, token_ids: TokenIds | None) -> HeadGroup:
        """An independent group in the same state; what is provisional becomes final in both."""
        self.settle()
        twin = object.__new__(HeadGroup)
        twin.__dict__.update({**self.__dict__, "token_ids": token_ids})
        twin.tail = None if self.tail is None else self.tail.copy()
        twin.home = None if self.home is None else copy(self.home)
        if isinstance(self.body, Indexed):
            twin.body = self.body.copy()
        elif self.body is not None:
            twin.body = replace(self.body, home=twin.home)
        return twin

    def adopt(self, other: HeadGroup, kv_heads: Tensor | None, q_heads: Tensor | None) -> None:
        """Go on from a prompt that `other` has read densely and evicted nothing of, as if this group had read it in one
        piece: of its heads those given, or all.  `other` must have kept what this group's evictor needs."""
        other.settle()
        assert other.open and other.tail is not None and other.body is None and other.sink is None
        self._begin(other.tail.take_heads(kv_heads, ("mass",) if self.needs.mass else ()), other.tokens.copy())
        self.spec = other.spec
        if q_heads is not None and self.spec.sinks is not None:
            self.spec = replace(self.spec, sinks=self.spec.sinks[q_heads])
        if self.needs.votes:
            assert other.queries is not None
            queries = other.queries[:, :, -self.needs.votes :]
            self.queries = queries.clone() if q_heads is None else queries[:, q_heads]
        if self.needs.products:
            assert other.products is not None
            self.products = other.products.clone() if kv_heads is None else other.products[:, kv_heads]
        if self.seals:
            self.seal()

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows [B']; some may repeat, some may go."""
        if self.tail is None:
            return
        self.settle()
        self.tail.reorder(rows)
        self.sink = None if self.sink is None else self.sink.reorder(rows)
        if isinstance(self.body, Tiles):
            self.body = self.body.reorder(rows)
        elif self.body is not None:
            self.body.reorder(rows)
        self.queries = None if self.queries is None else self.queries.index_select(0, rows)
        self.products = None if self.products is None else self.products.index_select(0, rows)
        self.past = self.past.reorder(rows)
        split = [] if self.split is None else [self.split.sink, self.split.recent, self.split.block, self.split.body]
        chosen = [self.chosen] if len(self.chosen) else []
        per_row = [self.tokens, *chosen, *split]
        if len(rows) != len(self.tokens) or any((x != x[0]).any() for x in per_row):  # else no need to ask the device
            order = rows.cpu().numpy()
            self.tokens = self.tokens[order]
            self.chosen = self.chosen[order] if len(self.chosen) else self.chosen
            self.split = Split(*(x[order] for x in split)) if split else None
