"""The models an evaluation can name: `smollm2` and `tiny`, which need no hub, and any transformers folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

TINY = Path(__file__).parent / "tiny_retriever"
TINY_CAVEAT = (
    "tiny: trained to 4,096 tokens; part of its retrieval circuit is laid by construction, it has no attention sink, "
    "key statements are salient to it before they are asked for, and it is weak at multi-value lists; claims about sinks "
    "and question-agnostic compression need another model"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """A model in eval mode on the GPU if there is one, and its tokenizer; no hub is ever asked.

    model: "smollm2", "tiny" or the path of a transformers folder.
    dtype: float32, bfloat16, float16, or auto: what this machine computes fastest, float32 for `tiny`.

    Raises ValueError for what does not exist and FileNotFoundError naming the command that installs SmolLM2.
    """
    import transformers

    from kvlib import smollm2

    if dtype not in DTYPES and dtype != "auto":
        raise ValueError(f"dtype={dtype}: give {', '.join(DTYPES)} or auto")
    if model not in ("smollm2", "tiny") and not Path(model).is_dir():
        raise ValueError(f"model {model}: no such folder; give 'smollm2', 'tiny' or the path of a transformers model")
    folder = smollm2.weights() if model == "smollm2" else TINY if model == "tiny" else Path(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        kind = torch.float32 if model == "tiny" else torch.bfloat16 if device == "cuda" else faster_dtype()
    else:
        kind = DTYPES[dtype]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval().to(device)
    return loaded, transformers.AutoTokenizer.from_pretrained(folder)


def faster_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, else float32."""

    def cost(dtype: torch.dtype) -> float:
        a, b = torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - began)
        return best

    return torch.bfloat16 if cost(torch.bfloat16) < cost(torch.float32) else torch.float32
