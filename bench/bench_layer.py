"""What one layer's cache costs a decode step, beside transformers' DynamicLayer + sdpa: pytest bench/bench_layer.py

Shapes of SmolLM2-135M (9 query, 3 KV heads of 64), float32.  At 16 tokens the difference of two rows is host overhead.
"""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from kvlib.group import HeadGroup
from kvlib.layer import Layer
from kvlib.recipe import Recipe
from kvlib.segment import Spec


def prompt(n):
    return torch.randn(1, 9, n, 64), torch.randn(1, 3, n, 64), torch.randn(1, 3, n, 64)


@pytest.mark.parametrize("n", [16, 2048, 4096])
@pytest.mark.parametrize(
    "recipe", ["stock", "full", "h2o(budget=0.25)", "snapkv(budget=0.25)", "streaming_llm(recent=508)"]
)
def test_decode_step(benchmark, recipe, n):
    q, k, v = prompt(n)
    q1, k1, v1 = prompt(1)
    if recipe == "stock":
        stock = DynamicLayer()
        stock.update(k, v)

        def step():
            keys, values = stock.update(k1, v1)
            out = torch.nn.functional.scaled_dot_product_attention(q1.view(1, 3, 3, 64), keys, values)
            return out.reshape(1, 9, 1, 64).transpose(1, 2).contiguous()
    else:
        parsed = Recipe.parse(recipe)
        layer, spec = Layer([HeadGroup(parsed.evict, parsed.sizes)], [None]), Spec(0.125)
        layer.forward(q, k, v, None, spec)

        def step():
            return layer.forward(q1, k1, v1, None, spec).transpose(1, 2).contiguous()

    with torch.no_grad():
        benchmark.pedantic(step, rounds=300, warmup_rounds=20)
