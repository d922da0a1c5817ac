"""Find which key channels carry the scores: Double Sparsity's offline calibration, arXiv 2408.07092.

The source's criterion is q * k of every token with itself, after the rotation, over blocks of text; its own accumulator
lets each block overwrite the last, here all of them count alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlib.eval.language import language_of
from kvlib.group import HeadGroup
from kvlib.hf import Cache
from kvlib.layer import Layer
from kvlib.policies.base import Sizes
from kvlib.policies.select.channels import ChannelTable, channel_weight
from kvlib.segment import Spec


class _Weighing(Layer):
    """A full layer that also adds up what its key channels carry."""

    def __init__(self) -> None:
        super().__init__([HeadGroup(None, Sizes())], [None])
        self.total: Tensor | float = 0.0  # [H, d]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, new: Any, spec: Spec, *rest: Any, **more: Any) -> Tensor:
        """Weigh, then attend as ever."""
        self.total = self.total + channel_weight(q, k).sum(0).cpu().double()
        return super().forward(q, k, v, new, spec, *rest, **more)


@torch.no_grad()
def identify_channels(model: Any, ids: Tensor, progress: Callable[[int], None] = lambda block: None) -> ChannelTable:
    """Rank the key channels of a model in eval mode by blocks of text, ids [blocks, length].

    `progress(block)` is called after each block.  Layers that keep their stock cache have weight 0 and their channels in
    order.  Raises ValueError where there is no block, or no layer that attends to everything.
    """
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"ids of shape {tuple(ids.shape)}: give blocks of text as [blocks, length]")
    cache = Cache(model, "full")
    if not cache.managed:
        raise ValueError(f"no layer of this {cache.spec.family!r} model attends to everything: set sliding_window=None")
    weighing: dict[int, _Weighing] = {}
    for layer in cache.managed:
        layer.store = weighing[layer.index] = _Weighing()
    for block, row in enumerate(ids.to(model.device)):
        cache.reset()
        model.base_model(input_ids=row[None], past_key_values=cache, use_cache=True)
        progress(block)
    weight = np.zeros((cache.spec.layers, cache.spec.kv_heads, cache.spec.head_dim))
    for index, weighed in weighing.items():
        assert isinstance(weighed.total, Tensor)
        weight[index] = weighed.total.numpy() / ids.numel()
    header = {"model": cache.spec.family, "blocks": ids.shape[0], "length": ids.shape[1]}
    return ChannelTable.of(weight, "double_sparsity calibration, post-rotary q * k", header)


def text_blocks(tokenizer: Any, text: str | None, blocks: int, length: int, seed: int = 0) -> Tensor:
    """Ids [blocks, length] of stretches of `text`, by default of Python's own reference, drawn with `seed`.

    Raises ValueError where the text is shorter than a block.
    """
    language, rng = language_of(tokenizer, text), np.random.default_rng(seed)
    return torch.tensor([language.text(rng, length) for _ in range(blocks)])
