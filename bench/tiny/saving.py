"""Checkpoints of a run, and the trained model as transformers reads it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from presets import Preset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvlib.eval.grammar import SPECIAL, vocabulary


def checkpoints(out: Path) -> list[Path]:
    """Complete ones, the last one last."""
    return sorted(out.glob("checkpoint-*"))


def write_checkpoint(out: Path, preset: Preset, step: int, state: dict[str, Any]) -> None:
    """Written beside, then renamed: a checkpoint is complete or not there."""
    older, beside = checkpoints(out), out / ".checkpoint"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    (beside / "preset.json").write_text(json.dumps(asdict(preset), indent=1) + "\n")
    torch.save(state, beside / "state.pt")
    beside.rename(out / f"checkpoint-{step:06d}")
    for folder in older:
        shutil.rmtree(folder)


def last_checkpoint(out: Path, preset: Preset) -> Path | None:
    """The folder of the last one in `out`, if there is one.

    Raises ValueError where it was made with another preset.
    """
    if not (found := checkpoints(out)):
        return None
    theirs = dict(_leaves(json.loads((found[-1] / "preset.json").read_text())))
    ours = dict(_leaves(asdict(preset)))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{found[-1]} was made with {name}={theirs.get(name)}, and this run has {name}={ours.get(name)}: give the "
                "options it was made with to go on with it, or another folder to start afresh"
            )
    return found[-1]


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf."""
    if not isinstance(tree, dict | list | tuple):
        yield path, tree
        return
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(value, f"{path}.{name}" if path else str(name))


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights in float16, configuration and tokenizer, as transformers reads them."""
    half = copy.deepcopy(model).half()
    half.set_attn_implementation("sdpa")
    half.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word, as spaces separate them."""
    pad, bos, eos = SPECIAL[:3]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=pad))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
