"""One prompt, read once, for caches under many recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlib.hf.cache import Cache
from kvlib.hf.layer import CacheLayer
from kvlib.policies.base import Evictor, Needs, Sizes, Split, View
from kvlib.recipe import Recipe


@dataclass(frozen=True)
class _Collector(Evictor):
    """Evicts nothing, and collects from the prompt what the evictors of several recipes will choose by."""

    name: ClassVar[str] = "prompt"

    collects: Needs

    def requirements(self) -> Needs:
        return self.collects

    def evicts(self) -> bool:
        return True  # or nothing would be observed

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        none = np.zeros_like(seen)
        return Split(none, seen, none, none)

    def keep(self, view: View, rankable: Tensor, body: Tensor) -> Tensor:
        return rankable

    def unlimited(self) -> _Collector:
        return self


class Prompt:
    """A prompt that is read once, densely, and handed to any number of caches.

    recipes: the recipes that will be asked for; each must attend a prompt densely (`Recipe.dense_prompt`).

        prompt = Prompt(model, ["full", "snapkv(budget=0.25)"])
        logits = prompt.read(ids)
        cache = prompt.cache("snapkv(budget=0.25)")  # as if it had read the whole prompt in one piece

    `read` may be called again, before or after `cache`: the prompt goes on.
    Raises ValueError for a recipe that attends prompts in its own way.
    """

    def __init__(self, model: PreTrainedModel, recipes: Sequence[str | Recipe], tokenizer: Any = None):
        self._model, self._tokenizer = model, tokenizer
        self._recipes = [Recipe.parse(recipe) for recipe in recipes]
        for recipe in self._recipes:
            if not recipe.dense_prompt:
                raise ValueError(f"{recipe} attends a prompt in its own way: give it a kvlib.Cache of its own")
        collects = Needs()
        for recipe in self._recipes:
            for need in recipe.needs().values():
                collects |= dataclasses.replace(need, tokenizer=False)
        self._read = Cache(model, Recipe(evict=None if collects == Needs() else _Collector(collects)))

    @torch.no_grad()
    def read(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read ids [B, n], n > 1 but for the first piece; returns the logits [B, vocabulary] after the last.

        attention_mask [B, read + n] has a column for every token so far; positions count each row's own tokens.
        """
        if ids.shape[1] == 1 and self._read.get_seq_length():
            raise ValueError("one token alone would end the prompt: read it together with those before it")
        given: dict[str, Any] = {"past_key_values": self._read, "logits_to_keep": 1}
        if attention_mask is not None:
            given |= {"attention_mask": attention_mask, "position_ids": own_positions(attention_mask, ids.shape[1])}
        logits: Tensor = self._model(ids, **given).logits
        return logits[:, -1]

    def cache(self, recipe: str | Recipe) -> Cache:
        """A cache under one of the recipes that has read what was read so far."""
        recipe = Recipe.parse(recipe)
        if recipe not in self._recipes:
            raise ValueError(f"{recipe} was not among the recipes this prompt was read for: give it to Prompt(...)")
        made = Cache(self._model, recipe, self._tokenizer)
        for i, (mine, read) in enumerate(zip(made.layers, self._read.layers, strict=True)):
            if isinstance(mine, CacheLayer):
                mine.adopt(read)
            else:
                made.layers[i] = deepcopy(read)
        if made.token_ids is not None and self._read.token_ids is not None:
            made.token_ids.__dict__.update(deepcopy(self._read.token_ids.__dict__))
        return made


def own_positions(attention_mask: Tensor, n: int) -> Tensor:
    """Positions [B, n] of the newest n columns, each row counting its own tokens."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -n:]
