"""A real model under each recipe: decode step, prefill, bytes held after prefill and one step, peak while reading.

    .venv/bin/python bench/bench_model.py --out bench/results

Every recipe decodes in the same run, step by step in turn with transformers' own DynamicCache + sdpa.  The census counts
the storages of live tensors that were not there before the cache was.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache

import kvlib
from kvlib.eval import load
from kvlib.eval.language import default_text
from kvlib.segment import Tail

STOCK = "DynamicCache + sdpa"
RECIPES = [
    "full",
    "h2o(budget=0.25)",
    "h2o_prefill(budget=0.25)",
    "snapkv(budget=0.25)",
    "snapkv(budget=0.25, adaptive=True)",
    "streaming_llm(sink=4, recent=508)",
    "duo_attention(sparsity=0.5)",
    "duo_attention(sparsity=0.5) + h2o(budget=0.25)",
]


def live() -> dict[int, int]:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


class Peak:
    """Largest nbytes() while one forward runs, sampled where a layer holds most: before the tail gives up what was sealed,
    when the old and the new body are there too, and after every layer."""

    def __init__(self, model, cache):
        self.most = 0
        hooks = [layer.register_forward_hook(lambda *_: self.note(cache)) for layer in model.model.layers]
        drop = Tail.drop

        def watched(tail, oldest):
            self.note(cache)
            drop(tail, oldest)

        Tail.drop = watched
        self.undo = [hook.remove for hook in hooks] + [lambda: setattr(Tail, "drop", drop)]

    def note(self, cache):
        self.most = max(self.most, cache.nbytes()["device"])

    def remove(self):
        for undo in self.undo:
            undo()


def attach(model, name):
    model.set_attn_implementation("sdpa" if name == STOCK else "kvlib")


def read(model, ids, name, peak=False):
    attach(model, name)
    before = live() if peak else {}
    cache = DynamicCache(config=model.config) if name == STOCK else kvlib.Cache(model, name)
    watch = Peak(model, cache) if peak else None
    began = time.perf_counter()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    took = time.perf_counter() - began
    if watch is None:
        return cache, token, took, None
    watch.remove()
    model(token, past_key_values=cache)
    census = sum(size for at, size in live().items() if at not in before) - token.untyped_storage().nbytes()
    return cache, token, took, {"peak": watch.most, "nbytes": cache.nbytes()["device"], "census": census}


def measure(model, ids, steps):
    names = [STOCK, *RECIPES]
    rows = {name: {"recipe": name, "tokens": ids.shape[1]} for name in names}
    for name in RECIPES:  # memory first, each alone
        cache, _, _, memory = read(model, ids, name, peak=True)
        full = cache.full_nbytes()
        rows[name] |= {key: round(value / full, 4) for key, value in memory.items()} | {"full_bytes": full}
        del cache
    state = {name: read(model, ids, name)[:3] for name in names}
    times = {name: [] for name in names}
    for _ in range(steps):
        for name in names:
            attach(model, name)
            cache, token, _ = state[name]
            began = time.perf_counter()
            model(token, past_key_values=cache)
            times[name].append(time.perf_counter() - began)
    for name in names:
        median = sorted(times[name])[steps // 2]
        rows[name] |= {"prefill_s": round(state[name][2], 2), "decode_ms": round(1e3 * median, 2)}
    for name in RECIPES:
        paired = sorted(a / b for a, b in zip(times[name], times[STOCK], strict=True))
        rows[name]["decode_ratio"] = round(paired[steps // 2], 3)
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    results = []
    for kind in options.dtypes.split(","):
        model, tokenizer = load("smollm2", kind)
        text = tokenizer(default_text(), return_tensors="pt").input_ids
        for length in map(int, options.lengths.split(",")):
            for row in measure(model, text[:, :length], options.steps):
                results.append({"dtype": kind, **row})
                print(json.dumps(results[-1]), flush=True)
    if options.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "kvlib": kvlib.__version__}
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        command = f"bench/bench_model.py --lengths {options.lengths} --dtypes {options.dtypes} --steps {options.steps}"
        options.out.mkdir(parents=True, exist_ok=True)
        document = {"command": command, **versions, **machine, "model": "SmolLM2-135M-Instruct", "rows": results}
        (options.out / "model-cpu.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
