"""Reading a model's rotary embedding: frequencies from its buffers, the layout of its pairs from what its layers do."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvlib.hf.attach import text_config
from kvlib.kernels.rotary import Rotary

_POSITIONS = (0, 1, 3, 50, 1023, 32770, 100003)
_CLOSE = 1e-4  # relative; a wrong layout, frequency or scaling is off by far more at some of these positions


@torch.no_grad()
def rotary_of(model: PreTrainedModel) -> Rotary:
    """What a model's full-attention layers do to their keys by position, checked on every one of these layers.

    model: a transformers decoder in any floating dtype, on one or several devices; only its attention modules run, on seven
    random vectors each and no further than to the point where keys go into the cache.

    Raises ValueError naming the family and the reason where no single fixed rotation describes all these layers: some apply
    none; its frequencies depend on the length of the text; or it is of another kind.  Source: arXiv 2104.09864 (RoFormer).
    """
    decoder = model.base_model.get_decoder()
    embedding: Any = getattr(decoder, "rotary_emb", None)
    if not hasattr(embedding, "rope_type"):
        raise _refusal(model, "it has no rotary embedding for all its layers, so there is no rotation to take off its keys")
    attentions = _attentions(model, decoder)
    layered = isinstance(embedding.rope_type, dict)  # one embedding per type of layer
    kind = embedding.rope_type.get("full_attention", "none") if layered else embedding.rope_type
    if moves(kind) or kind == "none":
        raise _refusal(model, f"the rope type of its full-attention layers is {kind!r}, not one with fixed frequencies")
    prefix = "full_attention_" if layered else ""
    inv_freq = tuple(getattr(embedding, f"{prefix}inv_freq").float().tolist())
    scaling = float(getattr(embedding, f"{prefix}attention_scaling"))
    probes = {i: _probe(model, attention, embedding, layered) for i, attention in attentions.items()}
    for i, (bare, turned, _) in probes.items():
        if torch.equal(bare, turned):
            raise _refusal(model, f"its layer {i} does not rotate its keys")
    for rotary in (Rotary(inv_freq, scaling, interleaved) for interleaved in (False, True)):
        if all(_explains(rotary, *probe) for probe in probes.values()):
            return rotary
    raise _refusal(model, "its layers do not turn pairs of dimensions by the angles of its rotary embedding")


def moves(kind: str) -> bool:
    """Whether frequencies of this rope type depend on the length of the text."""
    return "dynamic" in kind or kind == "longrope"


def rope_types(model: PreTrainedModel) -> set[str]:
    """The rope types of a model's layers, as transformers names them; none where it has no embedding for all of them."""
    embedding = getattr(model.base_model.get_decoder(), "rotary_emb", None)
    kind = getattr(embedding, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else set() if kind is None else {kind}


def _refusal(model: PreTrainedModel, reason: str) -> ValueError:
    family = text_config(model).model_type
    return ValueError(
        f"methods that need keys before their rotary embedding (shadowkv) cannot serve the family {family!r}: {reason}"
    )


def _attentions(model: PreTrainedModel, decoder: Any) -> dict[int, Any]:
    """The attention modules of the layers that attend to everything, by layer."""
    found = {}
    for module in decoder.modules():  # a layer comes before the attention inside it
        wanted = {"position_embeddings", "past_key_values"}
        if hasattr(module, "layer_idx") and wanted <= inspect.signature(module.forward).parameters.keys():
            found[module.layer_idx] = module
    stock = DynamicCache(config=text_config(model)).layers
    full = [i for i, layer in enumerate(stock) if type(layer) is DynamicLayer]
    if not full:
        raise _refusal(model, "none of its layers attends to everything")
    if not found.keys() >= set(full):
        raise _refusal(model, "its attention layers do not take position_embeddings and past_key_values")
    return {i: found[i] for i in full}


class _Caught(Exception):  # noqa: N818
    """Carries keys out of an attention module: what it does after storing them is not wanted."""


class _Catch:
    """Stands for a cache."""

    def update(self, key: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Caught(key)


def _probe(model: PreTrainedModel, attention: Any, embedding: Any, layered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [1, H, m, d] of random vectors without rotation, the same keys at some positions [m], and these positions."""
    device, shape = next(attention.parameters()).device, (1, len(_POSITIONS), text_config(model).hidden_size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    positions = torch.tensor(_POSITIONS, device=device)
    # Cosines in fp32 whatever the model's dtype: the comparison is then about the rotation, not about rounding.
    turn = embedding(hidden, positions[None], *(["full_attention"] if layered else []))
    if not isinstance(turn, tuple):
        raise _refusal(model, "its rotary embedding is not one of cosines and sines")
    keys = []
    for cos, sin in ((torch.ones_like(turn[0]), torch.zeros_like(turn[1])), turn):
        try:
            attention(
                hidden_states=hidden.to(model.dtype),
                position_embeddings=(cos, sin),
                position_ids=positions[None],
                attention_mask=None,
                past_key_values=_Catch(),
            )
        except _Caught as caught:
            keys.append(caught.args[0])
        else:
            raise _refusal(model, "its attention layers do not put their keys into the cache")
    return keys[0], keys[1], positions


def _explains(rotary: Rotary, bare: Tensor, turned: Tensor, positions: Tensor) -> bool:
    close = max(_CLOSE, torch.finfo(turned.dtype).eps)
    error = (rotary.turn(bare, positions) - turned.float()).abs().max()
    return bool(error <= close * turned.abs().max())
