"""Self-speculative decoding: one cache, read cheaply to draft and exactly to verify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlib.drafts import LONGEST
from kvlib.hf.cache import Cache
from kvlib.hf.prompt import own_positions
from kvlib.policies.base import RecipeError, check_whole
from kvlib.policies.encoding import Codec
from kvlib.policies.selection import Selector
from kvlib.recipe import Recipe


@dataclass(frozen=True)
class Speculation:
    """What `generate_speculative` returns: sequences [B, prompt + new], how many tokens of each row were drafted and
    accepted in how many rounds, and the cache, which can be used for another turn."""

    sequences: Tensor
    drafted: int
    accepted: int
    rounds: int
    cache: Cache

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(1, self.drafted)


def drafting(exact: Recipe, draft: Recipe) -> tuple[Recipe, bool]:
    """The recipe of a cache that can be read as both say, and whether drafts read fewer bytes of each token.

    Raises RecipeError where one cache cannot serve both, or drafts would cost as much as the rest.
    """
    if exact.select is not None:
        remedy = "drafts are verified by reading everything: give the selector to draft_recipe only"
        raise RecipeError(exact.select.name, None, None, remedy)
    codec = exact.codec
    for role in ("heads", "evict", "tier"):
        mine, its = getattr(exact, role), getattr(draft, role)
        if its not in (None, mine):
            raise RecipeError("draft_recipe", role, its, f"drafts read the cache of {exact}: leave it out")
    cheap = codec is not None and codec.draft() != codec and draft.codec in _drafts(codec)
    if not cheap and draft.codec not in (None, codec):
        other = f", or write {codec.draft()}" if codec is not None and codec.draft() != codec else ""
        raise RecipeError("draft_recipe", "codec", draft.codec, f"drafts read the cache of {exact}: leave it out{other}")
    if codec is not None and draft.select is not None:
        _check_borders(exact, codec, draft.select)
    fixed = exact.evict is not None or codec is not None
    if fixed and any(getattr(draft, size) is not None for size in ("sink", "recent", "block")):
        remedy = f"the sizes of the cache are those of {exact}: leave sink, recent and block out"
        raise RecipeError("draft_recipe", None, draft, remedy)
    if not cheap and (draft.select is None or not draft.select.selects()):
        remedy = "it reads as much as the exact recipe: give a selector with a small budget, or hierarchical(planes=1)"
        raise RecipeError("draft_recipe", None, draft, remedy)
    if codec is not None:  # `Cache.verify_as` knows how many tokens stay dense
        usual = replace(codec, recent=type(codec).recent)
        return replace(exact, select=draft.select, codec=usual), cheap
    sizes = {size: getattr(draft, size) for size in ("sink", "recent", "block") if getattr(draft, size) is not None}
    return replace(exact, select=draft.select, **sizes), cheap


def _drafts(codec: Codec) -> tuple[Codec, ...]:
    """What a draft may call the codec: by all its arguments, by all but `recent`, which selectors refuse, or by none."""
    draft = codec.draft()
    return draft, replace(draft, recent=type(codec).recent), type(codec)().draft()


def _check_borders(exact: Recipe, codec: Codec, select: Selector) -> None:
    """Raise RecipeError where a draft's units would change what is encoded together, or its budget is all dense."""
    block = -(-(exact.block or 64) // codec.grain) * codec.grain
    dense = block + (codec.recent if exact.recent is None else exact.recent) + (4 if exact.sink is None else exact.sink)
    if isinstance(select.budget, int) and select.budget <= dense:
        remedy = f"{exact} keeps up to {dense} tokens dense, which drafts read too: give a larger budget"
        raise RecipeError(select.name, "budget", select.budget, remedy)
    if select.run and block % select.run:
        remedy = f"{codec.name} seals {block} tokens at a time: give units that divide it"
        raise RecipeError(select.name, None, None, remedy)
    if not select.run and not all(form.alone for form in codec.forms()):
        remedy = f"its units put tokens in another order than the one in which {codec.name} encodes them: use quest"
        raise RecipeError(select.name, None, None, remedy)


@torch.no_grad()
def generate_speculative(
    model: PreTrainedModel,
    inputs: Tensor | Mapping[str, Tensor],
    draft_recipe: str | Recipe,
    gamma: int = 4,
    recipe: str | Recipe = "full",
    max_new_tokens: int = 128,
    tokenizer: Any = None,
) -> Speculation:
    """Greedy tokens of `recipe`, drafted `gamma` at a time under `draft_recipe` from the same cache.

    inputs: ids [B, n], or a tokenizer's output with `input_ids` and `attention_mask`.
    draft_recipe: a selector with a small budget ("quest(budget=256)"), "hierarchical(planes=1)" where recipe is
        "hierarchical", or both.  What drafts write is taken back; verified tokens are written by the exact reading.
    recipe: what is verified; it selects nothing.  Under a codec its own `recent` newest tokens are read by drafts too.

    Tokens are those of plain decoding within rounding: several tokens are verified in one product, so in half precision two
    almost equal logits may fall either way.  Rows end at the model's `eos_token_id` and are padded from there; rows of a
    batch advance together, by the least that one of them accepts.

    Raises RecipeError for recipes that cannot share a cache, ValueError for other bad input.
    Sources: arXiv 2502.10424 (QuantSpec), arXiv 2302.01318 for the round of drafting and verifying.
    """
    check_whole("generate_speculative", "gamma", gamma, 1)
    if gamma >= LONGEST:
        raise RecipeError("generate_speculative", "gamma", gamma, f"at most {LONGEST - 1} tokens can be taken back")
    check_whole("generate_speculative", "max_new_tokens", max_new_tokens, 1)
    exact, draft = Recipe.parse(recipe), Recipe.parse(draft_recipe)
    combined, cheap = drafting(exact, draft)
    ids, mask = (inputs, None) if isinstance(inputs, Tensor) else (inputs["input_ids"], inputs.get("attention_mask"))
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"inputs have the shape {tuple(ids.shape)}: give ids [B, n] with at least one token")
    cache = Cache(model, combined, tokenizer)
    cache.verify_as(exact)
    return _Run(model, cache, ids, mask, cheap).generate(gamma, max_new_tokens)


class _Run:
    """One generation."""

    def __init__(self, model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None, cheap: bool):
        self.model, self.cache, self.ids, self.cheap = model, cache, ids, cheap
        self.mask = torch.ones_like(ids) if mask is None else mask
        self.padded = not bool(self.mask.all())
        ends = model.generation_config.eos_token_id
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=ids.device).flatten()
        pad = model.generation_config.pad_token_id
        self.pad = int(pad) if pad is not None else int(self.ends[0]) if len(self.ends) else 0

    def generate(self, gamma: int, most: int) -> Speculation:
        """Read the prompt, then draft and verify until there are `most` tokens or every row has ended."""
        self._read(draft=False)
        out = self._step(self.ids, keep=1)
        self.cache.finish_prefill()
        self.cache.activate_past_recording()
        drafted = accepted = rounds = 0
        done = torch.isin(out[:, 0], self.ends)
        while out.shape[1] < most and not bool(done.all()):
            room = min(gamma, most - out.shape[1] - 1)
            drafts = self._draft(out[:, -1:], room) if room else out[:, :0]
            found = self._step(torch.cat([out[:, -1:], drafts], 1), keep=room + 1)
            right = (found[:, :-1] == drafts) | done[:, None]
            over = done[:, None] | (torch.isin(found, self.ends).cumsum(1) > 0)  # rows that have ended by a column
            last = int((~over.all(0)).sum())  # the column in which the last of them does
            agreed = min(int(right.cumprod(1).sum(1).min()) if room else 0, last)
            self._take_back(room - agreed)
            ended = torch.cat([done[:, None], over[:, :agreed]], 1)
            out = torch.cat([out, found[:, : agreed + 1].masked_fill(ended, self.pad)], 1)
            done = over[:, agreed]
            drafted, accepted, rounds = drafted + room, accepted + agreed, rounds + 1
        self.cache.crop(0)
        return Speculation(torch.cat([self.ids, out], 1), drafted, accepted, rounds, self.cache)

    def _read(self, draft: bool) -> None:
        self.cache.read_as_draft(draft, self.cheap)

    def _draft(self, last: Tensor, n: int) -> Tensor:
        """n tokens [B, n] after `last` [B, 1], read cheaply and taken back from the cache."""
        self._read(draft=True)
        drafts = []
        for _ in range(n):
            last = self._step(last, keep=1)
            drafts.append(last)
        self._take_back(n)
        self._read(draft=False)
        return torch.cat(drafts, 1)

    def _take_back(self, n: int) -> None:
        self.cache.crop(-n)
        if n:
            self.mask = self.mask[:, :-n]

    def _step(self, ids: Tensor, keep: int) -> Tensor:
        """The model's choice [B, keep] after each of the newest ids [B, n]."""
        if self.cache.get_seq_length():
            self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], 1)
        given: dict[str, Any] = {"past_key_values": self.cache, "logits_to_keep": keep, "use_cache": True}
        if self.padded:
            given |= {"attention_mask": self.mask, "position_ids": own_positions(self.mask, ids.shape[1])}
        logits: Tensor = self.model(ids, **given).logits
        return logits.argmax(-1)
