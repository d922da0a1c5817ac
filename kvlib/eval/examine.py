"""Put samples to caches and write down what they do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlib.eval.language import Language
from kvlib.eval.results import Answer
from kvlib.eval.tasks import Continuation, Sample, Task, score
from kvlib.hf import Cache, Prompt
from kvlib.recipe import Recipe

MOST_PREDICTIONS = 2**28  # elements of the full cache's predictions kept at once: 1 GiB


@dataclass(frozen=True)
class _Turn:
    """A recipe's turn: its cache, which has read the prompt, and the logits [B, vocabulary] after its last token.

    read_s: the seconds reading took, shared or not; began: when what is the recipe's own began.
    """

    recipe: Recipe
    question: str
    cache: Cache
    logits: Tensor
    read_s: float
    began: float


class Examiner:
    """Asks a model under any recipe; samples come from a language, a seed and a range of depths."""

    def __init__(self, model: Any, tokenizer: Any, language: Language, seed: int, depths: tuple[float, float]):
        self.model, self.tokenizer, self.language, self.seed, self.depths = model, tokenizer, language, seed, depths
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def check(self, tasks: Sequence[Task], length: int, samples: int, recipes: Sequence[Recipe]) -> None:
        """Raise ValueError where a task or the model cannot do a length, or the model a recipe."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for task in tasks:
            tokens = task.check(self.language, length, self.seed, samples)
            if limit is not None and length + tokens > limit:
                raise ValueError(
                    f"length {length}: with its answer a {task} takes {length + tokens} of the model's {limit} positions: "
                    f"give {limit - tokens} or less"
                )
        for recipe in recipes:
            Cache(self.model, recipe, self.tokenizer)

    def check_known(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> None:
        """Raise ValueError where answers are known to other questions than would be asked now."""
        by_name = {str(task): task for task in tasks}
        for name, length, index, prompt in {(a.task, a.length, a.sample, a.prompt) for a in answers}:
            if name in by_name and prompt != self._sample(by_name[name], length, index).digest:
                raise ValueError(
                    f"sample {index} of {name} at {length} is not the one that was answered (tasks or text have changed "
                    "since): give another folder"
                )

    def _sample(self, task: Task, length: int, index: int) -> Sample:
        return task.sample(self.language, length, self.seed, index, self.depths)

    @torch.inference_mode()
    def examine(
        self, task: Task, length: int, indices: Sequence[int], asked: Sequence[tuple[Recipe, str]]
    ) -> Iterator[list[Answer]]:
        """The answers to samples, of one (recipe, question) after the other."""
        samples = {i: self._sample(task, length, i) for i in indices}
        for group in self._groups(task, samples):
            common = {"task": str(task), "length": length}
            if isinstance(task, Continuation):
                yield from self._continue(group, [recipe for recipe, _ in asked], common)
            else:
                yield from self._ask(group, asked, common)

    def _groups(self, task: Task, samples: dict[int, Sample]) -> Iterator[dict[int, Sample]]:
        """Samples that fill a rectangle: padding between context and question would shrink sliding windows."""
        by_length: dict[int, dict[int, Sample]] = {}
        for i, sample in samples.items():
            by_length.setdefault(len(sample.question), {})[i] = sample
        most = len(samples)
        if isinstance(task, Continuation):
            most = max(1, MOST_PREDICTIONS // (task.tokens * self.model.config.get_text_config(decoder=True).vocab_size))
        for group in by_length.values():
            items = list(group.items())
            for first in range(0, len(items), most):
                yield dict(items[first : first + most])

    def _ask(
        self, samples: dict[int, Sample], asked: Sequence[tuple[Recipe, str]], common: dict[str, Any]
    ) -> Iterator[list[Answer]]:
        context, question = (
            self._ids([s.context for s in samples.values()]),
            self._ids([s.question for s in samples.values()]),
        )
        reading = _Reading(self.model, self.tokenizer, [recipe for recipe, _ in asked])
        agnostic = [recipe for recipe, kind in asked if kind == "agnostic"]
        if agnostic:
            reading.read(context)
            for recipe in agnostic:
                turn = reading.turn(recipe, "agnostic")
                turn.cache.finish_prefill()
                yield self._answers(turn, forward(self.model, question, turn.cache), samples, common)
            reading.read(question)
        else:
            reading.read(torch.cat([context, question], 1))
        for recipe, kind in asked:
            if kind == "aware":
                turn = reading.turn(recipe, kind)
                yield self._answers(turn, turn.logits, samples, common)

    def _answers(self, turn: _Turn, logits: Tensor, samples: dict[int, Sample], common: dict[str, Any]) -> list[Answer]:
        """Greedy answers that begin with what `logits` predict."""
        said = [logits.argmax(-1, keepdim=True)]
        for _ in range(max(sample.tokens for sample in samples.values()) - 1):
            said.append(forward(self.model, said[-1], turn.cache).argmax(-1, keepdim=True))
        rows = torch.cat(said, 1).tolist()
        measured, found = _measures(turn, len(samples)), []
        for (i, sample), row, read in zip(samples.items(), rows, _read(turn.cache), strict=True):
            end = next((at for at, token in enumerate(row) if token in self._ends), len(row))
            answer = self.tokenizer.decode(row[: min(end, sample.tokens)], skip_special_tokens=True)
            graded = {"answer": answer, "references": sample.references, "score": score(answer, sample.references)}
            depths = tuple(round(depth, 4) for depth in sample.depths)
            found.append(Answer(sample=i, prompt=sample.digest, depths=depths, read=read, **graded, **measured, **common))
        return found

    def _continue(
        self, samples: dict[int, Sample], recipes: Sequence[Recipe], common: dict[str, Any]
    ) -> Iterator[list[Answer]]:
        follow = self._ids([s.question for s in samples.values()])
        wanted = {str(recipe) for recipe in recipes}
        everyone = {str(recipe): recipe for recipe in (Recipe(), *recipes)}  # the full cache is the measure of the others
        reading = _Reading(self.model, self.tokenizer, list(everyone.values()))
        reading.read(self._ids([s.context for s in samples.values()]))
        full: list[Tensor] = []
        for name, recipe in everyone.items():
            turn = reading.turn(recipe, "")
            sums = torch.zeros(3, len(samples), device=follow.device)
            for t in range(follow.shape[1] - 1):
                predicted = forward(self.model, follow[:, t : t + 1], turn.cache).float().log_softmax(-1)
                if len(full) == t:
                    full.append(predicted)
                sums += _distances(predicted, full[t], follow[:, t + 1])
            nll, kl, agreement = (sums / (follow.shape[1] - 1)).tolist()
            if name in wanted:
                measured = _measures(turn, len(samples))
                columns = zip(samples.items(), nll, kl, agreement, _read(turn.cache), strict=True)
                yield [
                    Answer(sample=i, prompt=s.digest, nll=a, kl=b, agreement=c, read=r, **measured, **common)
                    for (i, s), a, b, c, r in columns
                ]

    def _ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)


class _Reading:
    """The prompt so far: read once for the recipes that share it, and once more for each that cannot."""

    def __init__(self, model: Any, tokenizer: Any, recipes: Sequence[Recipe]):
        self.model, self.tokenizer = model, tokenizer
        self._prompt = Prompt(model, [recipe for recipe in recipes if recipe.dense_prompt], tokenizer)
        self._ids = torch.empty(0)
        self._logits = torch.empty(0)
        self._took = 0.0

    def read(self, ids: Tensor) -> None:
        """Go on reading ids [B, n]."""
        began = time.perf_counter()
        self._ids = torch.cat([self._ids.to(ids), ids], -1) if self._ids.numel() else ids
        self._logits = self._prompt.read(ids)
        settle(ids.device)
        self._took += time.perf_counter() - began

    def turn(self, recipe: Recipe, question: str) -> _Turn:
        """A cache that has read the prompt in one piece; what follows on the clock is the recipe's own."""
        began = time.perf_counter()
        if recipe.dense_prompt:
            return _Turn(recipe, question, self._prompt.cache(recipe), self._logits, self._took, began)
        cache = Cache(self.model, recipe, self.tokenizer)
        logits = forward(self.model, self._ids, cache)
        settle(logits.device)
        read = time.perf_counter()
        return _Turn(recipe, question, cache, logits, read - began, read)


def forward(model: Any, ids: Tensor, cache: Cache) -> Tensor:
    """Logits [B, vocabulary] after the last of ids [B, n]."""
    logits: Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1]


def settle(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measures(turn: _Turn, rows: int) -> dict[str, Any]:
    """What all answers of a turn have in common, per row."""
    settle(turn.logits.device)
    took = time.perf_counter() - turn.began
    parts = turn.cache.nbytes(by="part")
    return {
        "recipe": str(turn.recipe),
        "question": turn.question,
        "nbytes": (sum(parts.values()) - parts["stock"]) // rows,
        "full_nbytes": turn.cache.full_nbytes() // rows,
        "read_s": round(turn.read_s / rows, 4),
        "own_s": round(took / rows, 4),
    }


def _read(cache: Cache) -> list[float]:
    """Share of its tokens that a query of each row attends, over all layers and heads that kvlib keeps."""
    if not cache.managed:
        return [1.0] * cache.layers[0].keys.shape[0]
    read = cache.attended()[torch.from_numpy(cache.managed_layers)].double().mean((0, 2))
    seen = torch.from_numpy(cache.managed[0].store.groups[0].tokens)
    shares: list[float] = (read / seen).tolist()
    return [round(share, 5) for share in shares]


def _distances(predicted: Tensor, full: Tensor, following: Tensor) -> Tensor:
    """Negative log-likelihood, KL(full || predicted) and agreement of log-probabilities [B, vocabulary]: [3, B]."""
    nll = -predicted.gather(1, following[:, None])[:, 0]
    kl = torch.nn.functional.kl_div(predicted, full, reduction="none", log_target=True).sum(1)
    agreement = (predicted.argmax(1) == full.argmax(1)).float()
    return torch.stack([nll, kl, agreement])
