"""One layer of a kvlib cache, as transformers sees it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvlib.group import TokenIds
from kvlib.hf.functions import HANDLE, NAME, NEW, eagerly
from kvlib.layer import Layer, NewTokens
from kvlib.segment import Spec

if TYPE_CHECKING:
    from kvlib.hf.cache import Cache
    from kvlib.steady import Steady


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
        self.order = 0  # place among the layers kvlib keeps
        self.seen = 0  # columns that went through, padding included: what generate() calls the length
        self.record_past = False
        self._parked: tuple[Tensor, Tensor] | None = None
        self.steady: Steady | None = None  # what takes the step instead, while one is recorded

    def copy(self, owner: Cache, token_ids: TokenIds | None) -> CacheLayer:
        """An independent layer in the same state, of another cache."""
        twin = CacheLayer(owner, self.index, self.store.copy(token_ids))
        twin.seen, twin.record_past, twin.is_initialized = self.seen, self.record_past, self.is_initialized
        return twin

    def adopt(self, other: CacheLayer) -> None:
        """Go on from a prompt that a layer of a `Prompt` has read."""
        owner = self._owner()
        assert owner is not None
        self.store.adopt(other.store, owner.spec.q_heads // owner.spec.kv_heads)
        self.seen = other.seen
        self.is_initialized = other.seen > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: storage follows the first keys."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Park new keys and values for the attention function; returns them, the keys carrying a handle.

        Under another attention implementation an uncompressed layer returns all it holds; a compressed one raises
        RuntimeError naming the remedy.
        """
        if torch.compiler.is_compiling():
            return eagerly(self._park, key_states, value_states)  # type: ignore[no-any-return]
        return self._park(key_states, value_states)

    def _park(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.store.check(key_states, value_states)
        owner = self._owner()
        if owner is None or owner.implementation() != NAME:
            return self._stock_update(key_states, value_states)
        self._check_attended(owner)
        self._parked = (key_states, value_states)
        setattr(key_states, HANDLE, self)
        return key_states, value_states

    def _stock_update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.store.groups
        plain = len(groups) == 1 and groups[0].plain
        if plain and (self.store.shape is None or self.store.dense()):
            with torch.no_grad():
                self.store.shape = (k.shape[0], k.shape[1], k.shape[3], v.shape[3])
                groups[0].take_in(k, v, None)
            self.seen += k.shape[2]
            self.is_initialized = True
            dense = self.store.dense()
            assert dense is not None
            return dense
        raise RuntimeError(
            f"layer {self.index} of this cache is not one dense tensor and only kvlib's attention can read it: keep the "
            f"model attached (kvlib.Cache(model, recipe) attaches it, kvlib.detach(model) undoes that), or call "
            f'model.set_attn_implementation("{NAME}")'
        )

    def attend(self, module: Any, q: Tensor, mask: Tensor | None, spec: Spec) -> Tensor:
        """Commit what `update` parked and attend it: q [B, Hq, n, d]; returns [B, n, Hq, dv]."""
        if self._parked is None:
            raise RuntimeError(f"layer {self.index}: keys were attended twice; kvlib cannot serve layers that share keys")
        if module.training:
            raise RuntimeError("kvlib caches do not train: call model.eval() first")
        (k, v), self._parked = self._parked, None
        if self.steady is not None:  # the host follows afterwards
            return self.steady.step(q, k, v, spec).transpose(1, 2).contiguous()
        new = self._new_tokens(mask, q.shape[2])
        drafts = self._drafts(q.shape[2]) if self.record_past else None
        out = self.store.forward(q, k, v, new, spec, self.record_past, drafts)
        self.seen += q.shape[2]
        self.is_initialized = True
        return out.transpose(1, 2).contiguous()

    def _check_attended(self, owner: Cache) -> None:
        """Raise RuntimeError where the layer before this one parked keys that never reached kvlib's attention."""
        before = owner.managed[self.order - 1]
        if self.order == 0 and before is not self:  # whatever is parked is from a forward that was given up
            for layer in owner.managed:
                layer._parked = None
        elif before._parked is not None:
            raise RuntimeError(
                f"the keys of layer {before.index} never reached kvlib's attention: either this cache belongs to another "
                "model than the one that is called, or the model changes keys after the cache has seen them, and kvlib "
                "cannot serve it"
            )

    def _drafts(self, n: int) -> int | None:
        """How many of the coming n tokens are drafts, None where nobody said.  A new turn's prompt ends the recording:
        transformers switches it on for assisted decoding and never off."""
        owner = self._owner()
        announced = None if owner is None else owner.announced
        if announced is None or announced[0] != self.seen:
            return None
        if announced[1] == 0 and n > 2 and not self.store.groups[0].open:
            self.record_past = False
        return announced[1]

    def _new_tokens(self, mask: Tensor | None, n: int) -> NewTokens | None:
        if mask is None:
            return None
        if mask.dim() != 2:
            raise ValueError(
                "this forward uses a custom attention mask, which a kvlib cache cannot honour: give a 2-D padding mask"
            )
        # The mask function has read the mask on the host once for all layers; device_map hooks may have moved it since.
        known = getattr(mask, NEW, None)
        return known if known is not None else NewTokens.from_mask(mask, n)

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
