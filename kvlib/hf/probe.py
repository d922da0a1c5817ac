"""Ranking heads without training, by reading one text of repeated random tokens."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlib.group import HeadGroup
from kvlib.hf.attach import attach, text_config
from kvlib.hf.cache import Cache
from kvlib.layer import Layer
from kvlib.policies.base import Sizes
from kvlib.policies.heads.razor_attention import REPEATS, induction
from kvlib.segment import Spec

_gates: weakref.WeakKeyDictionary[PreTrainedModel, np.ndarray] = weakref.WeakKeyDictionary()


class _ProbeLayer(Layer):
    """A full layer that also scores its heads on the probe text."""

    def __init__(self, period: int):
        super().__init__([HeadGroup(None, Sizes())], [None])
        self.period = period
        self.gates: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, new: Any, spec: Spec, *rest: Any, **more: Any) -> Tensor:
        """Score, then attend as ever."""
        self.gates = induction(q, k, spec.scale, self.period, spec.softcap, spec.sinks)
        return super().forward(q, k, v, new, spec, *rest, **more)


@torch.no_grad()
def induction_gates(model: PreTrainedModel) -> np.ndarray:
    """Rank a model's heads without training: gates [layers, kv_heads] by the induction probe, computed once per model.

    The probe text is one block of random tokens repeated, min(2048, max_positions / 2) tokens in all, drawn from a
    generator of its own.  Layers that keep their stock cache have gate 1.  Source: arXiv 2407.15891.
    """
    gates = _gates.get(model)
    if gates is None:
        attach(model)
        config = text_config(model)
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
        _gates[model] = gates
    return gates


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]
