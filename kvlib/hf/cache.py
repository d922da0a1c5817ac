"""The cache that goes into `generate(past_key_values=...)`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvlib.group import HeadGroup
from kvlib.hf.attach import attach, attached, text_config
from kvlib.hf.layer import CacheLayer
from kvlib.hf.rope import rotary_of
from kvlib.kernels.rotary import Rotary
from kvlib.layer import Layer, NewTokens
from kvlib.model import ModelSpec
from kvlib.offload.account import PARTS, TIERS, allocated
from kvlib.offload.resident import Traffic
from kvlib.policies.base import RecipeError, Sizes
from kvlib.policies.encoding import Codec
from kvlib.policies.heads.table import HeadTable
from kvlib.policies.selection import Everything
from kvlib.recipe import Recipe
from kvlib.report import report
from kvlib.token_ids import TokenIds


class Cache(transformers.Cache):  # type: ignore[misc]
    """A KV cache under a recipe, for `model.generate(..., past_key_values=cache)`.

    model: a transformers decoder in eval mode; it is attached to kvlib's attention until `kvlib.detach(model)`.
    recipe: a `Recipe` or its string, such as "duo_attention(sparsity=0.5) + h2o(budget=256)".
    tokenizer: needed by methods that read text.

    Raises RecipeError for a recipe that cannot work and ValueError for a model that cannot be served.
    """

    def __init__(self, model: PreTrainedModel, recipe: str | Recipe = "full", tokenizer: Any = None):
        self.recipe = Recipe.parse(recipe)
        config = text_config(model)
        self.spec = ModelSpec.from_config(config)
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        self._model = weakref.ref(model)
        self.tokenizer = tokenizer
        self.announced: tuple[int, int] | None = None  # (tokens seen, drafts) of a coming chunk under assisted decoding
        for name, needs in self.recipe.needs().items():
            if needs.tokenizer and tokenizer is None:
                raise RecipeError(name, None, None, "it reads text: give kvlib.Cache(model, recipe, tokenizer=...)")
        self.token_ids = TokenIds() if any(needs.token_ids for needs in self.recipe.needs().values()) else None
        stock = DynamicCache(config=config).layers
        managed = [type(layer) is DynamicLayer for layer in stock]
        if not any(managed) and self.recipe != Recipe():
            raise ValueError(
                f"no layer of this {self.spec.family!r} model attends to everything (sliding windows keep their stock "
                "cache), so there is nothing to compress: use a stock cache, or set sliding_window=None"
            )
        if self.recipe.select is not None:
            self.recipe.select.fit((self.spec.layers, self.spec.kv_heads, self.spec.head_dim), tokenizer)
        if self.recipe.codec is not None:
            self.recipe.codec.fit(self.spec.layers, self.spec.kv_heads, self.spec.head_dim)
        self.table = self._head_table(model)
        self._rotary = self._rotary_of(model)
        attach(model, None if self.token_ids is None else _take_ids)
        self.managed_layers = np.array(managed)
        streaming = np.zeros((self.spec.layers, self.spec.kv_heads), dtype=bool)
        if self.table is not None and self.recipe.heads is not None:
            streaming = self.recipe.heads.split(self.table, self.managed_layers)
        self.streaming = streaming
        layers = [
            CacheLayer(self, i, self._layer(i, streaming[i])) if mine else layer
            for i, (layer, mine) in enumerate(zip(stock, managed, strict=True))
        ]
        super().__init__(layers=layers)
        self._set_layers(layers)

    def _rotary_of(self, model: PreTrainedModel) -> Rotary | None:
        """The model's rotary embedding, where a codec needs it; found once per attached model."""
        codecs = () if self.recipe.codec is None else self.recipe.codec.members()
        if not any(form.needs_rotary for codec in codecs for form in codec.forms()):
            return None
        state = attached.get(model)
        known: Rotary = rotary_of(model) if state is None or state.rotary is None else state.rotary
        if state is not None:
            state.rotary = known
        return known

    def _head_table(self, model: PreTrainedModel) -> HeadTable | None:
        if self.recipe.heads is None:
            return None
        from kvlib.hf.probe import induction_gates  # the probe reads its text through a cache

        return self.recipe.heads.table((self.spec.layers, self.spec.kv_heads), lambda: induction_gates(model))

    def _layer(self, index: int, streaming: np.ndarray) -> Layer:
        recipe, groups, heads = self.recipe, [], []
        select, evict = recipe.select, recipe.evictor
        if select is not None and index < min(select.dense_layers, self.spec.layers // 4):
            select, evict = None, recipe.evict
        ids = None if self.token_ids is None else self.token_ids.at
        first = index * self.spec.kv_heads
        for codec, own in self._codecs(index, np.flatnonzero(~streaming)):
            heads.append(own)
            group = HeadGroup(
                evict, recipe.sizes, ids, self.tokenizer, select, first + own, recipe.tier, codec, self._rotary
            )
            groups.append(group)
        if streaming.any():
            assert recipe.heads is not None
            heads.append(np.flatnonzero(streaming))
            groups.append(HeadGroup(recipe.heads.streaming(), Sizes(), heads=first + heads[-1]))
        return Layer(groups, heads if len(groups) > 1 else [None])

    def _codecs(self, index: int, heads: np.ndarray) -> list[tuple[Codec | None, np.ndarray]]:
        """The KV heads of a layer by the codec that keeps them."""
        codec = self.recipe.codec
        found: dict[Codec | None, list[int]] = {}
        for head in heads.tolist():
            own = None if codec is None else codec.at(index, head, self.spec.layers)
            found.setdefault(own, []).append(head)
        size = self.spec.head_dim
        return [(own and own.within(len(places), size), np.array(places)) for own, places in found.items()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """An independent copy on the same model, for prompts that several requests share."""
        copy = object.__new__(Cache)
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)  # all of it immutable, but for the layers and the ids
        if self.token_ids is not None:
            copy.token_ids = TokenIds()
            copy.token_ids.__dict__.update(deepcopy(self.token_ids.__dict__, memo))
        ids = None if copy.token_ids is None else copy.token_ids.at
        copy._set_layers(
            [layer.copy(copy, ids) if isinstance(layer, CacheLayer) else deepcopy(layer, memo) for layer in self.layers]
        )
        return copy

    def implementation(self) -> str:
        """The attention implementation the model runs now."""
        model = self._model()
        return "" if model is None else str(text_config(model)._attn_implementation)

    def _set_layers(self, layers: list[Any]) -> None:
        self.layers = layers
        #: The layers kvlib keeps; sliding and linear layers keep their stock cache.
        self.managed: list[CacheLayer] = [layer for layer in layers if isinstance(layer, CacheLayer)]
        for order, layer in enumerate(self.managed):
            layer.order = order

    def finish_prefill(self) -> None:
        """Declare the prompt complete: one-shot methods evict now instead of at the first one-token query."""
        for layer in self.managed:
            layer.store.finish_prefill()

    def verify_as(self, exact: Recipe) -> None:
        """Let tokens leave the tail as under `exact`, a recipe without this one's selector; before the first token."""
        if exact.codec is None:  # what is where does not change what is read
            return
        for layer in self.managed:
            for group in layer.store.groups:
                if group.codec is not None and group.selector is not None:
                    group.sealing = Everything(recent=exact.codec.recent)

    def read_as_draft(self, draft: bool, cheap: bool) -> None:
        """From now on read as drafts are made: what the selector chooses, and with `cheap` the codec's fewer bytes; or, not
        `draft`, everything.  Used by `generate_speculative`."""
        for layer in self.managed:
            for group in layer.store.groups:
                group.whole, group.cheap = not draft, draft and cheap

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values to a layer; raises ValueError, before any layer changes, for another batch size."""
        if self.managed and self.managed[0].batch_size not in (-1, key_states.shape[0]):
            self.managed[0].store.check(key_states, value_states)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return found

    def activate_past_recording(self) -> None:
        """From now on the newest tokens are provisional until `crop`; called by assisted decoding.

        Each of its forwards asks for the logits of the drafts and one more: a hook on the model, removed by `detach`,
        reads there how many drafts a chunk holds.
        """
        super().activate_past_recording()
        model = self._model()
        state = None if model is None else attached.get(model)
        if model is not None and state is not None and state.drafts is None:
            state.drafts = model.register_forward_pre_hook(_announce_drafts, with_kwargs=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens of every row (a negative number; 0 accepts provisional ones)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give how many tokens to remove, as a negative number (crop(-3) removes three)"
            )
        for layer in self.layers:  # all of them or none
            if isinstance(layer, CacheLayer):
                layer.store.check_crop(-int(tokens_to_remove))
            elif tokens_to_remove and getattr(layer, "is_sliding", False) and not layer.record_past:  # noqa: SIM102
                if layer.get_seq_length() >= layer.sliding_window:
                    raise ValueError(
                        f"cannot take back {-tokens_to_remove} tokens: layers with a sliding window have dropped what came "
                        "before them; call cache.activate_past_recording() before the tokens arrive"
                    )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows, for beam search."""
        super().reorder_cache(beam_idx)
        if self.token_ids is not None:
            self.token_ids.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select batch rows."""
        super().batch_select_indices(indices)
        if self.token_ids is not None:
            self.token_ids.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.token_ids is not None:
            self.token_ids.reorder(torch.arange(len(self.token_ids.count)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything; the cache can be used for another prompt."""
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this cache is gone: make a new cache")
        fresh = DynamicCache(config=text_config(model)).layers
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CacheLayer):
                layer.reset()
            else:  # a stock layer's own reset differs between versions, and keeps past recording on
                self.layers[i] = fresh[i]
        self.announced = None
        if self.token_ids is not None:
            self.token_ids.clear()

    def kept(self) -> Tensor:
        """Tokens held, LongTensor [layers, batch, kv_heads]; [layers, 0, kv_heads] before the first token.

        Layers that keep their stock cache count what it holds: their window, or 0 for layers without keys.
        """
        return self._counts(Layer.kept)

    def attended(self) -> Tensor:
        """Tokens a query after the prompt attends, LongTensor [layers, batch, kv_heads]: those `kept()`, less what a
        selector leaves unread and what waits unseen behind a streaming window."""
        return self._counts(Layer.attended)

    def _counts(self, count: Callable[[Layer], np.ndarray]) -> Tensor:
        rows = max((layer.batch_size for layer in self.managed), default=-1)
        counts = np.zeros((len(self.layers), max(rows, 0), self.spec.kv_heads), dtype=np.int64)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, CacheLayer):
                counts[i] = count(layer.store) if layer.store.shape is not None else 0
            elif isinstance(getattr(layer, "keys", None), Tensor):
                counts[i] = layer.keys.shape[-2]
        return torch.from_numpy(counts)

    def nbytes(self, by: str = "tier", used: bool = False) -> dict[str, int]:
        """Bytes allocated, everything included: `{"device": ..., "host": ..., "disk": ...}`.

        by="part" splits them into sink, body, tail, index (units, their summaries, positions), slots (device copies of a
        body in host memory), statistics (positions, scores, prompt queries, earlier queries), staging (what a rollback
        needs) and stock (layers that keep their stock cache).  used=True leaves out slack.
        """
        if by not in ("tier", "part"):
            raise ValueError(f"by={by!r}: give 'tier' or 'part'")
        tiers, parts = dict.fromkeys(TIERS, 0), dict.fromkeys(PARTS, 0)
        for (tier, part), size in self._places(used).items():
            tiers[tier] += size
            parts[part] += size
        return parts if by == "part" else tiers

    def _places(self, used: bool) -> dict[tuple[str, str], int]:
        """Bytes by (tier, part)."""
        found: dict[tuple[str, str], int] = {}
        seen: set[int] = set()
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                for place, size in layer.store.nbytes(used, seen).items():
                    found[place] = found.get(place, 0) + size
            else:
                stock = allocated((x for x in vars(layer).values() if isinstance(x, Tensor)), seen)
                found["device", "stock"] = found.get(("device", "stock"), 0) + stock
        if self.token_ids is not None:
            found["device", "statistics"] = found.get(("device", "statistics"), 0) + self.token_ids.nbytes(used)
        return found

    def traffic(self) -> Traffic:
        """What reading cost between host and device since the prompt began: (hits, misses, moved).

        hits and misses count runs of tokens that a selector chose and that had a slot on the device or not (a run is a page
        or a single token); moved is bytes of keys and values copied to the device, a body that is read whole included.
        """
        found = [layer.store.traffic() for layer in self.managed]
        return Traffic(*(sum(column) for column in zip(*found, strict=True))) if found else Traffic(0, 0, 0)

    def full_nbytes(self) -> int:
        """Bytes of keys and values if every token seen had been kept, slack left out."""
        total = 0
        for layer in self.managed:
            if layer.store.shape is not None:
                _, heads, d, dv = layer.store.shape
                tail = layer.store.groups[0].tail
                assert tail is not None
                total += int(layer.store.groups[0].tokens.sum()) * heads * (d + dv) * tail.k.element_size()
        return total

    def report(self) -> str:
        """What the cache holds, what it gave up and what ran, as text."""
        return report(self)


def _announce_drafts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model under assisted decoding: tell the cache how many of the coming tokens are drafts."""
    cache, keep = kwargs.get("past_key_values"), kwargs.get("logits_to_keep")
    if isinstance(cache, Cache):
        cache.announced = (cache.get_seq_length(), keep - 1) if isinstance(keep, int) and keep > 0 else None


def _take_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: hand the ids of new tokens to a cache whose recipe needs them."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or cache.token_ids is None:
        return
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError(f"the recipe {cache.recipe} reads token ids, but the model was given embeddings: give input_ids")
    mask = kwargs.get("attention_mask")
    rows, n = ids.shape
    new = NewTokens(np.full(rows, n, dtype=np.int64)) if mask is None else NewTokens.from_mask(mask, n)
    held = cache.managed[0].store.groups[0].tokens
    first = held if len(held) else np.zeros(rows, dtype=np.int64)
    if len(held) and new.older is not None:  # what the mask now calls padding is about to be dropped
        first = np.minimum(held, new.older)
    cache.token_ids.put(ids, new, first)


def patch(model: PreTrainedModel, recipe: str | Recipe, tokenizer: Any = None) -> None:
    """Make every `model.generate()` that is given no cache use a fresh one under `recipe`, until `detach(model)`."""
    recipe = Recipe.parse(recipe)
    Cache(model, recipe, tokenizer)  # whatever cannot work is said now
    state = attached[model]
    if state.generate:
        del model.generate
    stock, me = model.generate, weakref.ref(model)

    def generate(*args: Any, **kwargs: Any) -> Any:
        owner = me()
        own_cache = kwargs.get("past_key_values") is not None or kwargs.get("cache_implementation") is not None
        if owner is not None and not own_cache and kwargs.get("use_cache") is not False:
            kwargs["past_key_values"] = cache = Cache(owner, recipe, tokenizer)
            if getattr(kwargs.get("generation_config"), "is_assistant", False):  # its tokens are drafts, to be taken back
                cache.activate_past_recording()
        return stock(*args, **kwargs)

    model.generate = generate
    state.generate = True
