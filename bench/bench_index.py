"""What building a selector's index costs beside reading the prompt, on SmolLM2.

    OMP_NUM_THREADS=1 .venv/bin/python bench/bench_index.py --out bench/results

Prompts are Python's own reference, bfloat16, batch 1.  build: from the end of the prompt's attention to an index ready for
the first query, all layers, the move of keys and values into the body included; share: of the time to read the prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

import kvlib
from kvlib.eval import load
from kvlib.eval.language import default_text
from kvlib.hf import Prompt
from kvlib.policies.select.sentences import terminators

RECIPES = [
    "oracle(budget=0.25)",
    "tokenselect(budget=0.25)",
    "quest(budget=0.25)",
    "quest(budget=0.25, bounds=meanstd)",
    "clusterkv(budget=0.25)",
    "clusterkv(budget=0.25, backend=faiss)",
    "clusterkv(budget=0.25, cluster=80)",
    "clusterkv(budget=0.25, estimate=True)",
    "sentencekv(budget=0.25, r=inf)",
    "double_sparsity(budget=0.25)",
]


def main() -> None:
    """Measure, print, and write index-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load("smollm2", "bfloat16")
    text = tokenizer(default_text(), return_tensors="pt").input_ids
    terminators(tokenizer)  # reads the vocabulary, once per tokenizer
    versions = {"kvlib": kvlib.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {
        "command": "python bench/bench_index.py",
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        "rows": [],
    }
    for length in args.lengths:
        ids, reading = text[:, :length], []
        for _ in range(args.rounds):
            prompt = Prompt(model, RECIPES, tokenizer)
            plain = Prompt(model, ["full"])
            began = time.perf_counter()
            plain.read(ids)
            reading.append(time.perf_counter() - began)
        prompt.read(ids)
        read_s = statistics.median(reading)
        print(f"{length} tokens read in {read_s:.2f} s")
        for recipe in RECIPES:
            took = []
            for _ in range(args.rounds):
                cache = prompt.cache(recipe)
                began = time.perf_counter()
                cache.finish_prefill()
                took.append(time.perf_counter() - began)
            build_s = statistics.median(took)
            index = cache.nbytes(by="part", used=True)
            row = {
                "recipe": recipe,
                "length": length,
                "read_s": read_s,
                "build_s": build_s,
                "build_ms_per_1k": 1e6 * build_s / length,
                "share": build_s / read_s,
                "index_bytes": index["index"],
                "index_share": index["index"] / max(1, index["body"]),
            }
            report["rows"].append(row)
            print(
                f"{recipe:42} {row['build_ms_per_1k']:8.1f} ms per 1k tokens, {100 * row['share']:5.1f} % of reading, "
                f"index {100 * row['index_share']:.1f} % of its keys and values",
                flush=True,
            )
    if args.out:
        (args.out / "index-cpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
