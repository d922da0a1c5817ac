"""Self-speculative decoding on SmolLM2: how many drafts are right, whether tokens are those of plain decoding, and time.

    OMP_NUM_THREADS=1 .venv/bin/python bench/bench_speculate.py --out bench/results

Prompts are the first 2,048 tokens of Python's own reference and two later pieces; 96 tokens each, float32, batch 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import kvlib
from kvlib.eval import load
from kvlib.eval.language import default_text

PAIRS = [
    ("hierarchical", "hierarchical(planes=1)"),
    ("hierarchical", "hierarchical(planes=1) + quest(budget=512, dense_layers=0)"),
    ("full", "quest(budget=512, dense_layers=0)"),
    ("full", "clusterkv(budget=512, dense_layers=0)"),
    ("full", "clusterkv(budget=256, dense_layers=0) + block=64"),
    ("full", "tokenselect(budget=512)"),
]


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write speculate-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = load("smollm2", "float32")
    model.generation_config.eos_token_id = None
    text = tokenizer(default_text(), return_tensors="pt").input_ids
    prompts = [text[:, 9000 * i : 9000 * i + 2048] for i in range(args.samples)]
    versions = {"kvlib": kvlib.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report: dict[str, Any] = {
        "command": "python bench/bench_speculate.py",
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        "rows": [],
    }
    plain: dict[str, list[torch.Tensor]] = {}
    for recipe, draft in PAIRS:
        if recipe not in plain:
            given = {"max_new_tokens": args.tokens, "do_sample": False}
            plain[recipe] = [
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=kvlib.Cache(model, recipe), **given
                )
                for ids in prompts
            ]
        for gamma in args.gamma:
            began = time.perf_counter()
            runs = [kvlib.generate_speculative(model, ids, draft, gamma, recipe, args.tokens, tokenizer) for ids in prompts]
            drafted, accepted, rounds = (sum(getattr(run, x) for run in runs) for x in ("drafted", "accepted", "rounds"))
            row = {
                "recipe": recipe,
                "draft": draft,
                "gamma": gamma,
                "acceptance": accepted / drafted,
                "tokens_per_round": len(prompts) * (args.tokens - 1) / rounds,
                "same": sum(torch.equal(run.sequences, wanted) for run, wanted in zip(runs, plain[recipe], strict=True)),
                "of": len(prompts),
                "seconds": time.perf_counter() - began,
            }
            report["rows"].append(row)
            print(row, flush=True)
    if args.out:
        (args.out / "speculate-cpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
