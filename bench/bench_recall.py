"""What selectors find among 32k keys with planted structure, what they cost a decode step, and what their index costs.

    OMP_NUM_THREADS=2 .venv/bin/python bench/bench_recall.py --out bench/results

One layer in the shape of Llama-3-8B (32 query heads, 8 KV heads of 128), batch 1.  All recipes decode in the same run, step
by step in turn, with `full`.  recall@B: the share of the true top-B tokens (by attention summed over a KV head's query
heads) that are read; error: relative distance of the attention output from that of the full cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from planted import GROUP, KV_HEADS, D, Planted, Tokenizer

import kvlib
from kvlib import indexed, ranked
from kvlib.group import HeadGroup
from kvlib.recipe import Recipe
from kvlib.segment import Spec

SPEC = Spec(D**-0.5)
SELECTORS = {
    "oracle": "oracle(budget={b})",
    "quest": "quest(budget={b})",
    "quest mean+std": "quest(budget={b}, bounds=meanstd)",
    "quest cuboid-mean": "quest(budget={b}, bounds=cuboid)",
    "quest page=64 logical=16": "quest(budget={b}, page=64, logical=16)",
    "clusterkv": "clusterkv(budget={b})",
    "clusterkv cluster=80": "clusterkv(budget={b}, cluster=80)",
    "clusterkv estimate": "clusterkv(budget={b}, estimate=True)",
    "clusterkv faiss": "clusterkv(budget={b}, backend=faiss)",
    "sentencekv r=inf": "sentencekv(budget={b}, r=inf)",
    "tokenselect": "tokenselect(budget={b}, theta=2)",
    "double_sparsity": "double_sparsity(budget={b})",
    "double_sparsity factor=16": "double_sparsity(budget={b}, factor=16)",
}


def filled(recipe: str, data: Planted, dtype: torch.dtype) -> tuple[HeadGroup, float]:
    """A head group that holds the planted keys under a recipe, and the seconds its index took."""
    parsed = Recipe.parse(recipe)
    ids = lambda positions: data.ids[positions.clamp(max=len(data.ids) - 1)]  # noqa: E731
    group = HeadGroup(parsed.evictor, parsed.sizes, ids, Tokenizer(), parsed.select, np.arange(KV_HEADS), parsed.tier)
    group.spec = SPEC
    group.take_in(data.k.to(dtype), data.v.to(dtype), None)
    if group.needs.products:
        q = torch.cat([data.query(i) for i in range(64)], 2).to(dtype).repeat(1, 1, data.tokens // 64, 1)
        group.remember(q, None)
    began = time.perf_counter()
    group.finish_prefill()
    return group, time.perf_counter() - began


def step(group: HeadGroup, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return group.forward(q, k, v, None, SPEC, recording=False)


def recall(data: Planted, budgets: list[int], queries: int) -> list[dict]:
    """recall@B and output error of every selector, fp32."""
    rows = []
    for name, recipe in SELECTORS.items():
        group, seconds = filled(recipe.format(b=budgets[-1]), data, torch.float32)
        for budget in budgets:
            if budget != budgets[-1]:
                group, _ = filled(recipe.format(b=budget), data, torch.float32)
            found, errors = [], []
            for i in range(queries):
                q = data.query(i)
                group.past = type(group.past)()
                logits = torch.einsum("hgd,htd->hgt", q.view(KV_HEADS, GROUP, D), data.k[0]) * SPEC.scale
                p = logits.softmax(-1)
                best = p.sum(1).topk(budget).indices
                read = torch.zeros(KV_HEADS, data.tokens, dtype=torch.bool)
                read[:, : 0 if group.sink is None else int(group.sink.counts[0, 0])] = True
                read[:, data.tokens - int(group.tail.lengths[0]) :] = True
                room = budget - int(read[0].sum())
                rest = torch.where(read.view(KV_HEADS, 1, -1), logits, float("-inf")).logsumexp(-1).view(1, -1, 1)
                query = ranked.Query(
                    q, group.selector.prepare(q[:, :, 0], group.past, lambda: data.ids[-1:], Tokenizer())[0], rest, SPEC
                )
                slots = group.body.chosen(query, room, group.past)[0].expand(KV_HEADS, -1)
                where = torch.stack([group.body.positions(0, h) for h in range(KV_HEADS)]).long()
                read.scatter_(1, where.gather(1, slots), True)
                found.append(read.gather(1, best).float().mean().item())
                exact = torch.einsum("hgt,htd->hgd", p, data.v[0])
                parts, _ = group.body.read(query, np.array([room]), group.tokens, group.past)
                masked = torch.where(read.view(KV_HEADS, 1, -1), logits, float("-inf"))
                own = torch.einsum("hgt,htd->hgd", masked.softmax(-1), data.v[0])
                if len(parts) > 1:  # estimated units beside the ones that are read
                    always = torch.where(
                        read.scatter(1, where.gather(1, slots), False).view(KV_HEADS, 1, -1), logits, float("-inf")
                    )
                    base = indexed.Partial(
                        torch.einsum("hgt,htd->hgd", always.softmax(-1), data.v[0]).reshape(1, -1, 1, D), rest
                    )
                    own = indexed.merge([base, *parts]).out.view(KV_HEADS, GROUP, D)
                errors.append(((own - exact).norm() / exact.norm()).item())
            rows.append(
                {"selector": name, "budget": budget, "recall": statistics.mean(found), "error": statistics.mean(errors)}
            )
            shown = f"recall {rows[-1]['recall']:.3f} error {rows[-1]['error']:.3f} build {seconds:.2f} s"
            print(f"{name:26} B={budget:5} {shown}", flush=True)
        rows[-1]["build_s"] = seconds
    return rows


def decode(data: Planted, budget: int, steps: int, dtype: torch.dtype) -> list[dict]:
    """Milliseconds of one layer's selection and attention per decode step, every recipe in turn, and its shares."""
    recipes = {"full": "full", **{name: recipe.format(b=budget) for name, recipe in SELECTORS.items()}}
    recipes["tokenselect theta=0.9"] = f"tokenselect(budget={budget})"
    recipes["lserve's pages"] = f"quest(budget={budget}, page=64, logical=16, every=4)"
    groups = {name: filled(recipe, data, dtype)[0] for name, recipe in recipes.items()}
    times: dict[str, list[float]] = {name: [] for name in groups}
    for i in range(steps + 3):
        q, k, v = data.query(i // 8).to(dtype), data.k[:, :, i : i + 1].to(dtype), data.v[:, :, i : i + 1].to(dtype)
        for name, group in groups.items():
            began = time.perf_counter()
            step(group, q, k, v)
            if i >= 3:
                times[name].append(time.perf_counter() - began)
    rows = []
    for name, group in groups.items():
        row = {"recipe": recipes[name], "name": name, "ms": 1000 * statistics.median(times[name])}
        if group.selector is not None:
            row |= shares(group, data, dtype)
        rows.append(row)
    return rows


def shares(group: HeadGroup, data: Planted, dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of scanning (scores, votes, the best units) and of the rest."""
    plain, spent = indexed.Indexed._choose, [0.0]

    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = plain(*args, **kwargs)
        spent[0] += time.perf_counter() - began
        return out

    indexed.Indexed._choose = timed
    scan, whole = [], []
    for i in range(12):
        spent[0], began = 0.0, time.perf_counter()
        step(group, data.query(50 + i).to(dtype), data.k[:, :, i : i + 1].to(dtype), data.v[:, :, i : i + 1].to(dtype))
        whole.append(time.perf_counter() - began)
        scan.append(spent[0])
    indexed.Indexed._choose = plain
    ms = 1000 * statistics.median(scan[2:])
    return {"scan_ms": ms, "attend_ms": 1000 * statistics.median(whole[2:]) - ms}


def main() -> None:
    """Measure, print, and write recall-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", choices=["recall", "decode"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = Planted(args.tokens)
    report = {
        "command": f"python bench/bench_recall.py --tokens {args.tokens} --queries {args.queries} --steps {args.steps}",
        "threads": torch.get_num_threads(),
        "versions": {"kvlib": kvlib.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    with torch.no_grad():
        if args.only != "decode":
            report["recall"] = recall(data, [256, 512, 1024, 2048], args.queries)
        if args.only != "recall":
            report["decode"] = decode(data, 1024, args.steps, getattr(torch, args.dtype))
            full = report["decode"][0]["ms"]
            for row in report["decode"]:
                split = "".join(f"  {part} {row[part + '_ms']:.2f}" for part in ("scan", "attend") if part + "_ms" in row)
                print(f"{row['name']:26} {row['ms']:7.2f} ms  {full / row['ms']:5.1f}x{split}", flush=True)
    if args.out:
        (args.out / "recall-cpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
