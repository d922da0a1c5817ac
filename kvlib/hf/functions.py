"""The attention and mask functions registered under the name "kvlib"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvlib.kernels.attention import Visible, attention
from kvlib.kernels.merge import merge
from kvlib.layer import NewTokens
from kvlib.segment import Spec

NAME = "kvlib"
HANDLE = "_kvlib_layer"  # on a key tensor: the cache layer that parked it
NEW = "_kvlib_new"  # on a padding mask: what it says of the chunk's tokens


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Run outside a compiled graph: a cache's host state is no business of the compiler's."""
    return function(*args)


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
    growing = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length  # else: a static cache
    if local_size is not None or mask_function is not causal_mask_function or not growing:
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
        return eagerly(_padding_mask, attention_mask, q_length, kv_length, kv_offset)  # type: ignore[no-any-return]
    return _padding_mask(attention_mask, q_length, kv_length, kv_offset)


def _padding_mask(attention_mask: Tensor, q_length: int, kv_length: int, kv_offset: int) -> Tensor | None:
    if attention_mask.shape[-1] < kv_length:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns for {kv_length} tokens (those in the cache and the "
            "new ones): give it one column for each"
        )
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if q_length > 1 and bool(mask.all()):
        return None
    setattr(mask, NEW, NewTokens.from_mask(mask, q_length))  # read once for all layers
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
    layer = getattr(key, HANDLE, None)
    if layer is not None:
        spec = Spec(scale, softcap, s_aux)
        if torch.compiler.is_compiling():
            return eagerly(layer.attend, module, query, attention_mask, spec), None
        return layer.attend(module, query, attention_mask, spec), None
    if softcap is None and s_aux is None:
        mask, n, keys = attention_mask, query.shape[2], key.shape[2]
        if (mask is not None and mask.dim() == 2) or (mask is None and 1 < n < keys):
            mask = sdpa_mask(
                len(query), n, keys, keys - n, attention_mask=mask, device=query.device, allow_is_causal_skip=False
            )
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
        return out, None
    out = merge(
        [attention(query, key, value, scale, _stock_visibility(attention_mask, query.shape[2]), softcap)], s_aux
    ).out
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _stock_visibility(mask: Tensor | None, n: int) -> Visible:
    if mask is None or mask.dim() == 4:
        return Visible(causal=mask is None, mask=mask)
    return Visible(causal=True, mask=mask[:, None, None].bool().expand(-1, -1, n, -1))


AttentionInterface.register(NAME, kvlib_attention)
AttentionMaskInterface.register(NAME, kvlib_mask)
