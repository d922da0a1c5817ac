"""kvlib inside Hugging Face transformers, by its public hooks: the only file that knows that library.

A `Cache` subclass parks new keys and values in `update()`; the attention function registered as "kvlib" finds them by a
handle on the key tensor, where queries, scale and padding mask are known, and lets the layer take them in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvlib.group import HeadGroup
from kvlib.kernels.attention import Visible, attention
from kvlib.kernels.merge import merge
from kvlib.layer import Layer, NewTokens
from kvlib.model import ModelSpec
from kvlib.offload.account import allocated
from kvlib.policies.base import RecipeError, Sizes
from kvlib.policies.heads.razor_attention import REPEATS, induction
from kvlib.policies.heads.table import HeadTable
from kvlib.recipe import Recipe
from kvlib.report import report
from kvlib.segment import Spec
from kvlib.token_ids import TokenIds

NAME = "kvlib"
_HANDLE = "_kvlib_layer"
_NEW = "_kvlib_new"


@dataclass
class _Attachment:
    """What kvlib changed on one model, so that `detach` can undo it."""

    previous: str
    hook: Any = None
    generate: bool = False
    gates: np.ndarray | None = None  # the induction probe's, once per model


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Run outside a compiled graph: a cache's host state is no business of the compiler's."""
    return function(*args)


_attached: weakref.WeakKeyDictionary[PreTrainedModel, _Attachment] = weakref.WeakKeyDictionary()


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer of a kvlib `Cache`, as transformers sees it."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: Cache, index: int, store: Layer):
        super().__init__()
        self._owner = weakref.ref(owner)
        self.index, self.store = index, store
        self.seen = 0  # columns that went through, padding included: what generate() calls the length
        self.record_past = False
        self._parked: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheLayer:
        raise TypeError("copy the whole cache: copy.deepcopy(cache)")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage follows the first keys."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Park new keys and values for the attention function; returns them, the keys carrying a handle.

        Under another attention implementation an uncompressed layer returns all it holds; a compressed one raises
        RuntimeError naming the remedy.
        """
        if torch.compiler.is_compiling():
            return _eagerly(self._park, key_states, value_states)  # type: ignore[no-any-return]
        return self._park(key_states, value_states)

    def _park(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.store.check(key_states, value_states)
        owner = self._owner()
        if owner is None or owner.implementation() != NAME:
            return self._stock_update(key_states, value_states)
        self._parked = (key_states, value_states)
        setattr(key_states, _HANDLE, self)
        return key_states, value_states

    def _stock_update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.store.groups
        if len(groups) == 1 and groups[0].evictor is None and (self.store.shape is None or self.store.dense()):
            with torch.no_grad():
                self.store.shape = (k.shape[0], k.shape[1], k.shape[3], v.shape[3])
                groups[0].take_in(k, v)
            self.seen += k.shape[2]
            self.is_initialized = True
            dense = self.store.dense()
            assert dense is not None
            return dense
        raise RuntimeError(
            f"layer {self.index} of this cache is compressed and only kvlib's attention can read it: keep the model "
            f"attached (kvlib.Cache(model, recipe) attaches it, kvlib.detach(model) undoes that), or call "
            f'model.set_attn_implementation("{NAME}")'
        )

    def attend(self, module: Any, q: Tensor, mask: Tensor | None, spec: Spec) -> Tensor:
        """Commit what `update` parked and attend it: q [B, Hq, n, d]; returns [B, n, Hq, dv]."""
        if self._parked is None:
            raise RuntimeError(f"layer {self.index}: keys were attended twice; kvlib cannot serve layers that share keys")
        if module.training:
            raise RuntimeError("kvlib caches do not train: call model.eval() first")
        (k, v), self._parked = self._parked, None
        new = self._new_tokens(mask, q.shape[2])
        owner = self._owner()
        drafts = 0 if owner is None or not self.record_past else owner.drafts
        out = self.store.forward(q, k, v, new, spec, self.record_past, drafts)
        self.seen += q.shape[2]
        self.is_initialized = True
        return out.transpose(1, 2).contiguous()

    def _new_tokens(self, mask: Tensor | None, n: int) -> NewTokens | None:
        if mask is None:
            return None
        if mask.dim() != 2:
            raise ValueError(
                "this forward uses a custom attention mask, which a kvlib cache cannot honour: give a 2-D padding mask"
            )
        # The mask function has read the mask on the host once for all layers; device_map hooks may have moved it since.
        known = getattr(mask, _NEW, None)
        return known if known is not None else _read_mask(mask, n)

    def get_seq_length(self) -> int:
        """Tokens seen, left padding included; never the number held."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens seen and coming, offset 0)."""
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        """-1: grows without end."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first token."""
        return -1 if self.store.shape is None else self.store.shape[0]

    def reset(self) -> None:
        """Forget everything; the next prompt may have another batch size."""
        self.store.clear()
        self.seen, self.record_past, self._parked, self.is_initialized = 0, False, None, False

    def activate_past_recording(self) -> None:
        """From now on the newest tokens are provisional until `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens; 0 accepts what is provisional."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give how many tokens to remove, as a negative number (crop(-3) removes three)"
            )
        self.store.crop(-int(tokens_to_remove))
        self.seen += int(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows, for beam search."""
        if self.is_initialized:
            self.store.reorder(beam_idx.to(self.store.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            rows = torch.arange(self.batch_size, device=self.store.device)
            self.store.reorder(rows.repeat_interleave(repeats))


class Cache(transformers.Cache):  # type: ignore[misc]
    """A KV cache under a recipe, for `model.generate(..., past_key_values=cache)`.

    model: a transformers decoder in eval mode; it is attached to kvlib's attention until `kvlib.detach(model)`.
    recipe: a `Recipe` or its string, such as "duo_attention(sparsity=0.5) + h2o(budget=256)".
    tokenizer: needed by methods that read text.

    Raises RecipeError for a recipe that cannot work and ValueError for a model that cannot be served.
    """

    def __init__(self, model: PreTrainedModel, recipe: str | Recipe = "full", tokenizer: Any = None):
        self.recipe = Recipe.parse(recipe)
        config = _text_config(model)
        self.spec = ModelSpec.from_config(config)
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        self._model = weakref.ref(model)
        self.tokenizer = tokenizer
        self.drafts = 0  # tokens of the coming chunk that are drafts after the prompt
        evict = self.recipe.evict
        needs = evict.requirements() if evict is not None else None
        if needs is not None and needs.tokenizer and tokenizer is None:
            assert evict is not None
            raise RecipeError(evict.name, None, None, "it reads text: give kvlib.Cache(model, recipe, tokenizer=...)")
        self.token_ids = TokenIds() if needs is not None and needs.token_ids else None
        stock = DynamicCache(config=config).layers
        managed = [type(layer) is DynamicLayer for layer in stock]
        if not any(managed) and self.recipe.lossy:
            raise ValueError(
                f"no layer of this {self.spec.family!r} model attends to everything (sliding windows keep their stock "
                "cache), so there is nothing to compress: use a stock cache, or set sliding_window=None"
            )
        attach(model, ids=self.token_ids is not None)
        self.table = self._head_table(model)
        self.managed_layers = np.array(managed)
        streaming = np.zeros((self.spec.layers, self.spec.kv_heads), dtype=bool)
        if self.table is not None and self.recipe.heads is not None:
            streaming = self.recipe.heads.split(self.table, self.managed_layers)
        self.streaming = streaming
        layers = [
            CacheLayer(self, i, self._layer(streaming[i])) if mine else layer
            for i, (layer, mine) in enumerate(zip(stock, managed, strict=True))
        ]
        super().__init__(layers=layers)

    def _head_table(self, model: PreTrainedModel) -> HeadTable | None:
        if self.recipe.heads is None:
            return None
        return self.recipe.heads.table((self.spec.layers, self.spec.kv_heads), lambda: induction_gates(model))

    def _layer(self, streaming: np.ndarray) -> Layer:
        ids = None if self.token_ids is None else self.token_ids.at
        groups, heads = [], []
        if not streaming.all():
            groups.append(HeadGroup(self.recipe.evict, self.recipe.sizes, ids, self.tokenizer))
            heads.append(np.flatnonzero(~streaming))
        if streaming.any():
            assert self.recipe.heads is not None
            groups.append(HeadGroup(self.recipe.heads.streaming(), Sizes()))
            heads.append(np.flatnonzero(streaming))
        return Layer(groups, heads if len(groups) > 1 else [None])

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """An independent copy on the same model, for prompts that several requests share."""
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this cache is gone")
        copy = Cache(model, self.recipe, self.tokenizer)
        memo[id(self)] = copy
        for mine, theirs in zip(self.layers, copy.layers, strict=True):
            if isinstance(mine, CacheLayer):
                for name in ("seen", "record_past", "is_initialized"):
                    setattr(theirs, name, getattr(mine, name))
                theirs.store = mine.store.copy(None if copy.token_ids is None else copy.token_ids.at)
            else:
                theirs.__dict__.update(deepcopy(mine.__dict__, memo))
        if self.token_ids is not None and copy.token_ids is not None:
            copy.token_ids.__dict__.update(deepcopy(self.token_ids.__dict__, memo))
        return copy

    def implementation(self) -> str:
        """The attention implementation the model runs now."""
        model = self._model()
        return "" if model is None else str(_text_config(model)._attn_implementation)

    @property
    def managed(self) -> list[CacheLayer]:
        """The layers kvlib keeps; sliding and linear layers keep their stock cache."""
        return [layer for layer in self.layers if isinstance(layer, CacheLayer)]

    def finish_prefill(self) -> None:
        """Declare the prompt complete: one-shot methods evict now instead of at the first one-token query."""
        for layer in self.managed:
            layer.store.finish_prefill()

    def activate_past_recording(self) -> None:
        """From now on the newest tokens are provisional until `crop`; called by assisted decoding.

        Its first forward holds the prompt and the first drafts together, and asks for the logits of the drafts only: a
        hook that removes itself reads there how many they are.
        """
        super().activate_past_recording()
        model = self._model()
        if model is not None and self.recipe.lossy and self.get_seq_length() == 0:
            mine = weakref.ref(self)

            def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hook.remove()
                cache, keep = kwargs.get("past_key_values"), kwargs.get("logits_to_keep")
                if isinstance(cache, Cache) and cache is mine() and isinstance(keep, int):
                    cache.drafts = max(0, keep - 1)

            hook = model.register_forward_pre_hook(count, with_kwargs=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens of every row (a negative number; 0 accepts provisional ones)."""
        for layer in self.managed:
            layer.store.check_crop(-int(tokens_to_remove))
        self.drafts = 0
        super().crop(tokens_to_remove)
        if self.token_ids is not None:
            self.token_ids.crop(-int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows, for beam search."""
        super().reorder_cache(beam_idx)
        if self.token_ids is not None:
            self.token_ids.reorder(beam_idx)

    def reset(self) -> None:
        """Forget everything; the cache can be used for another prompt."""
        super().reset()
        self.drafts = 0
        if self.token_ids is not None:
            self.token_ids.clear()

    def kept(self) -> Tensor:
        """Tokens held, LongTensor [managed layers, batch, kv_heads]; [layers, 0, kv_heads] before the first token."""
        counts = [layer.store.kept() for layer in self.managed]
        if not counts or not counts[0].size:
            return torch.zeros(len(counts), 0, self.spec.kv_heads, dtype=torch.long)
        return torch.from_numpy(np.stack(counts))

    def nbytes(self, by: str = "tier", used: bool = False) -> dict[str, int]:
        """Bytes allocated, everything included: `{"device": ..., "host": ..., "disk": ...}`.

        by="part" splits them into sink, body, tail, statistics (positions, scores, indices, prompt queries), staging
        (what a rollback needs) and stock (layers that keep their stock cache).  used=True leaves out slack.
        """
        if by not in ("tier", "part"):
            raise ValueError(f"by={by!r}: give 'tier' or 'part'")
        parts = dict.fromkeys(("sink", "body", "tail", "statistics", "staging", "stock"), 0)
        seen: set[int] = set()
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                for part, size in layer.store.nbytes(used, seen).items():
                    parts[part] += size
            else:
                parts["stock"] += allocated((x for x in vars(layer).values() if isinstance(x, Tensor)), seen)
        if self.token_ids is not None:
            parts["statistics"] += self.token_ids.nbytes(used)
        return parts if by == "part" else {"device": sum(parts.values()), "host": 0, "disk": 0}

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


# --------------------------------------------------------------------------------------- attaching to a model
def attach(model: PreTrainedModel, ids: bool = False) -> None:
    """Let `model` attend through kvlib; with `ids` its base model also tells token ids to the caches that need them."""
    state = _attached.get(model)
    if state is None:
        state = _Attachment(str(_text_config(model)._attn_implementation))
    if _text_config(model)._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
        if _text_config(model)._attn_implementation != NAME:
            family = model.config.model_type
            raise ValueError(f"kvlib does not support the family {family!r}: it does not dispatch its attention")
    _attached[model] = state
    if ids and state.hook is None:
        state.hook = model.base_model.register_forward_pre_hook(_take_ids, with_kwargs=True)


def detach(model: PreTrainedModel) -> None:
    """Give the model back the attention it had and remove every hook.  Idempotent.

    An uncompressed cache still works afterwards; a compressed one raises RuntimeError naming the remedy.
    """
    state = _attached.pop(model, None)
    if state is None:
        return
    if state.hook is not None:
        state.hook.remove()
    if state.generate:
        del model.generate
    model.set_attn_implementation(state.previous)


def patch(model: PreTrainedModel, recipe: str | Recipe, tokenizer: Any = None) -> None:
    """Make every `model.generate()` that is given no cache use a fresh one under `recipe`, until `detach(model)`."""
    recipe = Recipe.parse(recipe)
    Cache(model, recipe, tokenizer)  # whatever cannot work is said now
    state = _attached[model]
    if state.generate:
        del model.generate
    stock, me = model.generate, weakref.ref(model)

    def generate(*args: Any, **kwargs: Any) -> Any:
        owner = me()
        own_cache = kwargs.get("past_key_values") is not None or kwargs.get("cache_implementation") is not None
        if owner is not None and not own_cache and kwargs.get("use_cache") is not False:
            kwargs["past_key_values"] = Cache(owner, recipe, tokenizer)
        return stock(*args, **kwargs)

    model.generate = generate
    state.generate = True


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _take_ids(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: hand the ids of new tokens to a cache whose recipe needs them."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or cache.token_ids is None:
        return
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError(f"the recipe {cache.recipe} reads token ids, but the model was given embeddings: give input_ids")
    mask = kwargs.get("attention_mask")
    new = NewTokens(np.full(len(ids), ids.shape[1], dtype=np.int64)) if mask is None else _read_mask(mask, ids.shape[1])
    cache.token_ids.append(ids, new)


# ------------------------------------------------------------------------------- the two registered functions
def _read_mask(mask: Tensor, n: int) -> NewTokens:
    return NewTokens.from_mask(mask[:, mask.shape[1] - n :])


def kvlib_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask a layer gets: for full layers the 2-D padding mask itself (None where nothing is padding), for sliding
    layers and custom patterns the stock 4-D mask."""
    if local_size is not None or mask_function is not causal_mask_function:
        kwargs["allow_is_causal_skip"] = False
        stock: Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
        return stock
    if attention_mask is None:
        return None
    if torch.compiler.is_compiling():
        return _eagerly(_padding_mask, attention_mask, q_length, kv_length, kv_offset)  # type: ignore[no-any-return]
    return _padding_mask(attention_mask, q_length, kv_length, kv_offset)


def _padding_mask(attention_mask: Tensor, q_length: int, kv_length: int, kv_offset: int) -> Tensor | None:
    if attention_mask.shape[-1] < kv_length:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns for {kv_length} tokens (those in the cache and the "
            "new ones): give it one column for each"
        )
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if bool(mask.all()):
        return None
    setattr(mask, _NEW, _read_mask(mask, q_length))
    return mask


def kvlib_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of models attached to kvlib; serves stock caches and cacheless calls too."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(key, _HANDLE, None)
    if layer is not None:
        spec = Spec(scale, softcap, s_aux)
        if torch.compiler.is_compiling():
            return _eagerly(layer.attend, module, query, attention_mask, spec), None
        return layer.attend(module, query, attention_mask, spec), None
    if softcap is None and s_aux is None:
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            n, keys = query.shape[2], key.shape[2]
            mask = sdpa_mask(
                len(query), n, keys, keys - n, attention_mask=mask, device=query.device, allow_is_causal_skip=False
            )
        elif mask is None and 1 < query.shape[2] < key.shape[2]:
            n, keys = query.shape[2], key.shape[2]
            mask = sdpa_mask(len(query), n, keys, keys - n, device=query.device, allow_is_causal_skip=False)
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
        return out, None
    out = merge([attention(query, key, value, scale, _stock_visibility(attention_mask), softcap)], s_aux).out
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _stock_visibility(mask: Tensor | None) -> Visible:
    if mask is None or mask.dim() == 4:
        return Visible(causal=mask is None, mask=mask)
    return Visible(causal=True, mask=mask[:, None, None].bool())


AttentionInterface.register(NAME, kvlib_attention)
AttentionMaskInterface.register(NAME, kvlib_mask)


# ------------------------------------------------------------------------------------- ranking heads, untrained
class _ProbeLayer(Layer):
    """A full layer that also scores its heads on the probe text."""

    def __init__(self, period: int):
        super().__init__([HeadGroup(None, Sizes())], [None])
        self.period = period
        self.gates: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, new: NewTokens | None, spec: Spec, recording: bool = False, drafts: int = 0
    ) -> Tensor:
        """Score, then attend as ever."""
        self.gates = induction(q, k, spec.scale, self.period, spec.softcap)
        return super().forward(q, k, v, new, spec, recording, drafts)


@torch.no_grad()
def induction_gates(model: PreTrainedModel) -> np.ndarray:
    """Rank a model's heads without training: gates [layers, kv_heads] by the induction probe, computed once per model.

    The probe text is one block of random tokens repeated, min(2048, max_positions / 2) tokens in all, drawn from a
    generator of its own.  Layers that keep their stock cache have gate 1.  Source: arXiv 2407.15891.
    """
    attach(model)
    state = _attached[model]
    if state.gates is None:
        config = _text_config(model)
        cache = Cache(model, "full")
        period = max(1, (min(2048, cache.spec.max_positions // 2) - 1) // REPEATS)
        generator = torch.Generator().manual_seed(0)
        special = {x for name in ("bos", "eos", "pad") for x in _as_list(getattr(config, f"{name}_token_id", None))}
        ordinary = torch.tensor([i for i in range(cache.spec.vocabulary) if i not in special])
        block = ordinary[torch.randint(len(ordinary), (period,), generator=generator)]
        first = (_as_list(config.bos_token_id) or [int(ordinary[0])])[:1]
        ids = torch.cat([torch.tensor(first), block.repeat(REPEATS)])[None].to(model.device)
        probes: dict[int, _ProbeLayer] = {}
        for layer in cache.managed:
            layer.store = probes[layer.index] = _ProbeLayer(period)
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        gates = np.ones((cache.spec.layers, cache.spec.kv_heads))
        for index, probe in probes.items():
            assert probe.gates is not None
            gates[index] = probe.gates[0].float().cpu().numpy()
        state.gates = gates
    return state.gates


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]
