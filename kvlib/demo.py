"""The demonstration: a real model reads a real text with a fact hidden in it, through several recipes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlib.recipe import Recipe

RECIPES = (
    "full",
    "streaming_llm(sink=4, recent=508)",
    "h2o(budget=0.25)",
    "snapkv(budget=0.125, window=16)",
    "snapkv(budget=0.25, window=16)",
    "snapkv(budget=0.125, window=16, adaptive=True)",
    "duo_attention(sparsity=0.5)",
    "duo_attention(sparsity=0.5) + snapkv(budget=0.25, window=16)",
)
CITIES = (
    "Paris London Tokyo Berlin Madrid Rome Cairo Moscow Sydney Toronto Chicago Boston Vienna Oslo Dublin Lima"
).split()
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Question:
    """A prompt ids [1, n] and the number its answer must contain."""

    ids: Tensor
    answer: str


@dataclass
class Score:
    """What one recipe did, summed over the questions."""

    recipe: str
    right: int = 0
    asked: int = 0
    nbytes: int = 0
    full_nbytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tokens: int = 0

    @property
    def share(self) -> float:
        """Bytes held of those the full cache would hold."""
        return self.nbytes / max(1, self.full_nbytes)


def default_text() -> str:
    """A real English text that needs no download: the language reference inside every CPython."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def questions(tokenizer: Any, text: str, length: int, count: int, seed: int = 0) -> list[Question]:
    """`count` prompts of about `length` tokens, each a piece of the text with one fact hidden at its own depth.

    Raises ValueError where the text is shorter than the prompts.
    """
    rng = random.Random(seed)
    hay = tokenizer(text, add_special_tokens=False).input_ids
    room = length - 96  # the fact, the question and the chat's own words
    if room < 64 or len(hay) < room:
        raise ValueError(
            f"the text has {len(hay)} tokens, prompts of {length} need at least {max(64, room)}: give more text"
        )
    found = []
    for i, city in enumerate(rng.sample(CITIES * (1 + count // len(CITIES)), count)):
        number = str(rng.randint(1000, 9999))
        start = rng.randrange(len(hay) - room + 1)
        piece = hay[start : start + room]
        cut = int(room * (0.05 + 0.8 * (i + 0.5) / count))  # before the last tenth, which every recipe keeps
        fact = f"\nThe magic number of {city} is {number}.\n"
        story = tokenizer.decode(piece[:cut]) + fact + tokenizer.decode(piece[cut:])
        request = f"Read the text and remember the magic number in it.\n\n{story}\n\nWhat is the magic number of {city}?"
        found.append(Question(_encode(tokenizer, request, f"The magic number of {city} is"), number))
    return found


def _encode(tokenizer: Any, request: str, begin: str) -> Tensor:
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": request}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + begin
        ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(f"{request}\n{begin}", return_tensors="pt").input_ids
    return ids


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, recipe: Recipe, question: Question, score: Score) -> str:
    """Answer one question under a recipe, greedily, and add what it took to the score; returns the answer."""
    import kvlib

    cache = kvlib.Cache(model, recipe, tokenizer)
    ids = question.ids.to(model.device)
    began = time.perf_counter()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    read = time.perf_counter()
    tokens = [logits[:, -1:].argmax(-1)]
    for _ in range(ANSWER_TOKENS - 1):
        tokens.append(model(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    score.prefill_s += read - began
    score.decode_s += time.perf_counter() - read
    score.tokens += ANSWER_TOKENS - 1
    answer: str = tokenizer.decode(torch.cat(tokens, 1)[0], skip_special_tokens=True)
    score.right += question.answer in answer
    score.asked += 1
    score.nbytes += sum(cache.nbytes().values())
    score.full_nbytes += cache.full_nbytes()
    return answer


def run(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[str],
    asked: Sequence[Question],
    step: Callable[[str], None] = lambda recipe: None,
) -> list[Score]:
    """All recipes on all questions; `step(recipe)` is called after each answer."""
    parsed = [Recipe.parse(text) for text in recipes]
    scores = []
    for recipe in parsed:
        score = Score(str(recipe))
        for question in asked:
            ask(model, tokenizer, recipe, question, score)
            step(score.recipe)
        scores.append(score)
    return scores


def plot(scores: Sequence[Score], path: Path) -> None:
    """Memory against accuracy, a point per recipe, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for i, score in enumerate(scores):
        x, y = 100 * score.share, 100 * score.right / score.asked
        axes.scatter(x, y, s=90, color=f"C{i}", label=score.recipe, zorder=3)
    axes.set_xlabel("KV bytes held, % of keys and values of all tokens")
    axes.set_ylabel("answers right, %")
    axes.set_ylim(-5, 105)
    axes.set_xlim(0, 115)
    axes.grid(alpha=0.3)
    axes.set_title(f"What each recipe keeps, and what it still knows ({scores[0].asked} questions)")
    axes.legend(fontsize=8, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
