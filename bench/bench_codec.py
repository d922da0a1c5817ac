"""What codecs cost and lose: bytes per token against the card's formula, errors on SmolLM2's keys and values, time.

    OMP_NUM_THREADS=1 .venv/bin/python bench/bench_codec.py --out bench/results

bytes:  of a body of 8,192 random bfloat16 tokens, 8 KV heads of 64 and of 128, beside the formula and dense.
errors: relative (Frobenius) of keys, values and attention output for the last 32 queries of 2,048 tokens of Python's own
        reference, the mean over SmolLM2's layers, float32.
cost:   one layer, 32 query and 8 KV heads of 128, float32: encoding 1,000 tokens, and a decode step at 8,192 tokens.
quality: divergence (KL, nats per token) of SmolLM2's next-token distributions from the full cache's, and change of the
        negative log-likelihood, float32: eight prompts of 2,048 tokens are read densely and encoded, and 256 tokens that
        follow each are scored, 2,040 predictions in all.
long:   ShadowKV over 512 tokens of the text fed one by one after the prompt, and a second turn of 256 in one piece:
        divergence from the full cache, and what is held where.
large:  ShadowKV's device bytes per token and layer at Llama-3-8B's shape, 32,768 random tokens.
rank:   low-rank keys on the same text: energy kept, divergence of the next-token distribution (128 tokens), device bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import kvlib
from kvlib import census
from kvlib.eval import load
from kvlib.eval.language import default_text
from kvlib.group import HeadGroup
from kvlib.hf import Prompt
from kvlib.hf.rope import rotary_of
from kvlib.kernels.attention import attention
from kvlib.kernels.low_rank import row_space
from kvlib.kernels.rotary import Rotary
from kvlib.policies.encoding import Codec, attend
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.store import Store

CODECS = [
    "kv8",
    "kv4",
    "kv4(smooth=0.5)",
    "kivi(bits=4, group=64)",
    "kivi(bits=2, group=64)",
    "kivi(bits=2)",
    "kivi(k_bits=4, v_bits=2)",
    "gear(bits=4)",
    "gear_l(bits=4)",
    "kivi(bits=4, group=0)",
    "gear(bits=2)",
    "gear_l(bits=2)",
    "rotated(bits=4)",
    "rotated(bits=3)",
    "rotated(bits=2)",
    "rotated(bits=4, levels=lloyd_max)",
    "rotated(bits=3, levels=lloyd_max)",
    "rotated(bits=2, levels=lloyd_max)",
    "mustafar(sparsity=0.5)",
    "mustafar(sparsity=0.7)",
    "hierarchical",
    "hierarchical(planes=1)",
    "low_rank",
    "lossless",
]
ROPE = Rotary(tuple(10000.0 ** (-i / 64) for i in range(64)))


def codec_of(recipe: str) -> Codec:
    codec = Recipe.parse(recipe + (" @ host" if recipe == "lossless" else "")).codec
    assert codec is not None
    return codec


def with_tail(recipes: list[str]) -> Iterator[str]:
    """The recipes with the same tail: 64 newest tokens, and blocks of 128."""
    for recipe in recipes:
        name, _, arguments = recipe.partition("(")
        if name != "lossless":
            yield f"{name}(recent=64{', ' + arguments if arguments else ')'} + block=128"


def rope(d: int) -> Rotary:
    return Rotary(ROPE.inv_freq[:: 128 // d])


def median_ms(run: Callable[[], Any], rounds: int) -> float:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def filled(codec: Codec, k: Tensor, v: Tensor, rotary: Rotary, most: int = 8192) -> Store:
    """A store of whole grains of k, v [1, H, m, d]."""
    import numpy as np

    store = Store(codec.forms(), 1, k.shape[1], k.device, rotary=rotary)
    m = k.shape[2] // store.grain * store.grain
    position = torch.arange(m).expand(1, k.shape[1], -1)
    piece = most // store.grain * store.grain
    rows = np.array([0])
    store.fit(rows, k[:, :, :m], v[:, :, :m], position)
    for lo in range(0, m, piece):
        cut = slice(lo, min(m, lo + piece))
        store.append(rows, k[:, :, cut], v[:, :, cut], position[:, :, cut])
    return store


def count_bytes(recipes: list[str]) -> Iterator[dict[str, Any]]:
    for recipe in recipes:
        codec = codec_of(recipe)
        row: dict[str, Any] = {"recipe": recipe}
        for d in (64, 128):
            k, v = torch.randn(2, 1, 8, 8192, d, dtype=torch.bfloat16).unbind()
            store = filled(codec, k, v, rope(d))
            n = int(store.counts[0])
            heads = [1 / 8 if form.scope == "group" and not form.paged else 1 for form in codec.forms()]
            formula = sum(h * form.bytes_per_token(d, n, merged=n) for h, form in zip(heads, codec.forms(), strict=True))
            row[str(d)] = {"measured": sum(store.used().values()) / n / 8, "formula": formula, "dense": 4 * d}
        yield row


def captured(model: Any, text: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and the last 32 queries of every layer."""
    prompt = Prompt(model, ["full", "snapkv(budget=64, window=32)"])
    prompt.read(text)
    for layer in prompt._read.managed:
        (group,) = layer.store.groups
        assert group.tail is not None and group.queries is not None
        k, v = (x[:, :, : group.tail.end] for x in (group.tail.k, group.tail.v))
        yield k, v, group.queries[:, :, -32:]


def compare(recipes: list[str], model: Any, text: Tensor) -> Iterator[dict[str, Any]]:
    layers, rotary = list(captured(model, text)), rotary_of(model)
    for recipe in recipes:
        codec, errors = codec_of(recipe), []
        for k, v, q in layers:
            k, v = k[:, :, 4:], v[:, :, 4:]  # sinks are dense
            store = filled(codec, k, v, rotary)
            m = int(store.counts[0])
            pieces = [store.piece(side, 0, m, lambda slots: slots) for side in "kv"]
            k, v = k[:, :, :m], v[:, :, :m]
            found = attend(codec.forms(), q, (pieces[0], pieces[1]), 0.125).out
            wanted = attention(q, k, v, 0.125).out
            here = [(found, wanted)]
            for form, stored, x in zip(codec.forms(), pieces, (k, v), strict=True):
                near = form.epilogue(form.decode(stored).float(), stored)
                smooth = stored.fixed.get("smooth")
                here.append((near if smooth is None else near * smooth.float(), x))
            errors.append([float((a - b).norm() / b.norm()) for a, b in here])
        output, key, value = torch.tensor(errors).mean(0).tolist()
        yield {"recipe": recipe, "k": key, "v": value, "output": output}


def time_it(recipes: list[str]) -> Iterator[dict[str, Any]]:
    k, v = torch.randn(2, 1, 8, 8192, 128).unbind()
    q1, k1, v1 = torch.randn(1, 32, 1, 128), *torch.randn(2, 1, 8, 1, 128).unbind()
    for recipe in ["full", *recipes]:
        row: dict[str, Any] = {"recipe": recipe}
        parsed = Recipe.parse(recipe + (" @ host" if recipe == "lossless" else ""))
        if parsed.codec is not None:
            codec = parsed.codec
            row["encode_ms_per_1k"] = median_ms(lambda codec=codec: filled(codec, k, v, rope(128)), 3) / 8.192
        group = HeadGroup(None, parsed.sizes, tier=parsed.tier, codec=parsed.codec, rotary=rope(128))
        group.spec = Spec(128**-0.5)
        group.take_in(k, v, None)
        group.finish_prefill()
        step = lambda group=group: group.forward(q1, k1, v1, None, group.spec, False)  # noqa: E731
        step()
        row["step_ms"] = median_ms(step, 3 if recipe == "lossless" else 11)
        yield row


def sweep(model: Any, text: Tensor) -> Iterator[dict[str, Any]]:
    ids, more = text[:, :2048], text[:, 2048:2176]
    ranks = (192, 160, 128, 96, 64, 32)
    recipes = [f"low_rank(rank={rank}, outliers={o})" for rank in ranks for o in (0, 48)]
    recipes += [f"shadowkv(budget=0.25, rank={rank}, outliers=12)" for rank in ranks]
    prompt = Prompt(model, ["full", *recipes])
    prompt.read(ids)
    rotary = rotary_of(model)
    reference = prompt.cache("full")
    energy = {}
    bare = [rotary.turn_back(k, torch.arange(2048)).transpose(1, 2).flatten(2) for k, _, _ in captured(model, ids)]
    for rank in ranks:
        energy[rank] = float(torch.stack([row_space(x, rank)[1] for x in bare]).mean())
    wanted = decoded(model, reference, more)
    for recipe in recipes:
        cache = prompt.cache(recipe)
        cache.finish_prefill()
        parsed = Recipe.parse(recipe).codec
        body = sum(layer.store.groups[0].body.counts.sum() for layer in cache.managed)  # type: ignore[union-attr]
        used = {place: size for place, size in cache._places(True).items() if place[1] in ("body", "index")}
        device = sum(size for (tier, _), size in used.items() if tier == "device")
        if "shadow" not in recipe:  # its values stay on the device
            device -= int(body) * 3 * 64 * 4
        got = decoded(model, cache, more)
        yield {
            "recipe": recipe,
            "energy": energy[parsed.rank],  # type: ignore[union-attr]
            "kl": float((wanted.exp() * (wanted - got)).sum(-1).mean()),
            "device_share": device / (int(body) * 2 * 3 * 64 * 4),
        }


def judge(recipes: list[str], model: Any, text: Tensor) -> Iterator[dict[str, Any]]:
    found: dict[str, list[tuple[float, float]]] = {recipe: [] for recipe in recipes}
    for start in range(0, 8 * 4000, 4000):
        ids, more = text[:, start : start + 2048], text[:, start + 2048 : start + 2304]
        prompt = Prompt(model, ["full", *recipes])
        prompt.read(ids)

        def predicted(recipe: str, prompt: Prompt = prompt, more: Tensor = more) -> Tensor:
            cache = prompt.cache(recipe)
            cache.finish_prefill()
            out: Tensor = model(more, past_key_values=cache).logits[:, :-1].log_softmax(-1)
            return out

        wanted, target = predicted("full"), more[:, 1:, None]
        for recipe in recipes:
            got = predicted(recipe)
            kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
            found[recipe].append((float(kl), float((wanted - got).gather(-1, target).mean())))
    for recipe, pairs in found.items():
        kl, nll = (statistics.mean(x) for x in zip(*pairs, strict=True))
        yield {"recipe": recipe, "kl": kl, "nll": nll, "kl_of_prompts": [kl for kl, _ in pairs]}


def long_run(model: Any, text: Tensor) -> Iterator[dict[str, Any]]:
    recipes = ["shadowkv(budget=0.25, rank=96, outliers=12)", "low_rank(rank=96)"]
    prompt = Prompt(model, ["full", *recipes])
    prompt.read(text[:, :2048])
    steps, turn = text[:, 2048:2560], text[:, 2560:2816]
    full = prompt.cache("full")
    wanted = [decoded(model, full, steps), model(turn, past_key_values=full).logits.log_softmax(-1)]
    for recipe in recipes:
        cache = prompt.cache(recipe)
        got = [decoded(model, cache, steps), model(turn, past_key_values=cache).logits.log_softmax(-1)]
        kl = [(w.exp() * (w - g)).sum(-1)[0] for w, g in zip(wanted, got, strict=True)]
        yield {
            "recipe": recipe,
            "kl_by_128_steps": [float(x.mean()) for x in kl[0].split(128)],
            "kl_second_turn": float(kl[1].mean()),
            "kept": int(cache.kept().min()),
            "bytes": cache.nbytes(used=True),
            "full_bytes": cache.full_nbytes(),
        }


def draw(report: dict[str, Any], path: Path) -> None:
    """Divergence against bytes per token, a point per codec."""
    from matplotlib import pyplot

    share = {row["recipe"]: row["64"]["measured"] / row["64"]["dense"] for row in report["bytes"]}
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    names = [recipe for recipe in report["recipes"] if recipe != "lossless"]
    families = sorted({name.partition("(")[0] for name in names})
    points = sorted((share[name], row["kl"], name) for row, name in zip(report["quality"], names, strict=True))
    for i, (x, kl, name) in enumerate(points):
        axes.scatter(100 * x, kl, color=f"C{families.index(name.partition('(')[0]) % 10}", zorder=2)
        axes.annotate(name, (100 * x, kl), (4, (5, -10)[i % 2]), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", ylabel="KL from the full cache, nats per token")
    axes.set_xlabel("bytes of the body, % of bfloat16 (head size 64)")
    axes.set_xticks([15, 20, 25, 30, 40, 50, 70], [15, 20, 25, 30, 40, 50, 70])
    axes.minorticks_off()
    axes.set_title("SmolLM2, 2,048 tokens encoded, the next 255 scored, eight texts")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def large_shape() -> Iterator[dict[str, Any]]:
    recipe = Recipe.parse("shadowkv")
    group = HeadGroup(None, recipe.sizes, selector=recipe.select, tier=recipe.tier, codec=recipe.codec, rotary=rope(128))
    k, v = torch.randn(2, 1, 8, 32768, 128, dtype=torch.bfloat16).unbind()
    group.take_in(k, v, None)
    group.finish_prefill()
    used, tokens = census.nbytes(group, True, set()), int(group.body.counts[0])  # type: ignore[union-attr]
    device = used["device", "body"] + used["device", "index"]
    yield {
        "recipe": str(recipe),
        "tokens": tokens,
        "device_bytes_per_token": device / tokens,
        "share": device / tokens / 4096,
    }


def decoded(model: Any, cache: Any, more: Tensor) -> Tensor:
    """Log-probabilities [1, n, vocabulary] after each of the tokens `more` [1, n], fed one by one."""
    found = [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(more.shape[1])]
    return torch.cat(found, 1).log_softmax(-1)


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write codecs-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["bytes", "errors", "cost", "quality", "long", "large", "rank"])
    parser.add_argument("--recipe", nargs="+", default=CODECS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load("smollm2", "float32")
    text = tokenizer(default_text(), return_tensors="pt").input_ids
    versions = {"kvlib": kvlib.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report: dict[str, Any] = {
        "command": "python bench/bench_codec.py",
        "threads": torch.get_num_threads(),
        "recipes": args.recipe,
        "versions": {**versions, "python": platform.python_version()},
    }
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "bytes": lambda: count_bytes(args.recipe),
        "errors": lambda: compare(args.recipe, model, text[:, :2048]),
        "cost": lambda: time_it(args.recipe),
        "quality": lambda: judge([*with_tail(args.recipe)], model, text),
        "large": large_shape,
        "long": lambda: long_run(model, text),
        "rank": lambda: sweep(model, text),
    }
    for part in args.parts:
        report[part] = []
        for row in parts[part]():
            report[part].append(row)
            print(part, row, flush=True)
    path = None if args.out is None else args.out / "codecs-cpu.json"
    if path is not None and path.exists():  # parts measured in other runs stay
        report = {**json.loads(path.read_text()), **report}
    if args.figure:
        draw(report, args.figure)
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
