"""Ask every recipe every question: batches of samples, one prompt read for all recipes, answers written as they come."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlib.eval.language import Language, language_of
from kvlib.eval.models import fingerprint, load
from kvlib.eval.results import FORMAT, Answer, Journal, Memory, Results, this_run
from kvlib.eval.tasks import Continuation, Sample, Task, parse_tasks, score
from kvlib.hf import Cache, Prompt
from kvlib.hf.prompt import own_positions
from kvlib.policies import Oracle, RandomEviction, StreamingLLM
from kvlib.policies.base import budget_tokens
from kvlib.recipe import Recipe

QUESTIONS = ("aware", "agnostic")
DEFAULT_TASKS = "niah, multikey, multivalue, multiquery, vt, copy, continuation"
BATCH_TOKENS = 16384  # prompts read side by side unless the caller says how many


@dataclass(frozen=True)
class _Batch:
    """Samples of one task and length, and who is still to be asked in which way."""

    task: Task
    length: int
    samples: tuple[int, ...]
    asked: tuple[tuple[Recipe, str], ...]  # (recipe, question)


def evaluate(
    model: Any,
    recipes: Sequence[str | Recipe],
    tasks: str | Sequence[str | Task] = DEFAULT_TASKS,
    lengths: Sequence[int] = (1024,),
    samples: int = 20,
    *,
    questions: Sequence[str] = QUESTIONS,
    baselines: bool = True,
    text: str | None = None,
    depths: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    batch: int | None = None,
    dtype: str = "auto",
    tokenizer: Any = None,
    out: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Results:
    """Measure what recipes give up, on a model that really retrieves.

    model:     "smollm2", "tiny", the path of a transformers model, or a model (then with `tokenizer`).
    tasks:     such as "niah, multikey(keys=2), continuation"; see `kvlib.eval.tasks`.
    lengths:   prompt lengths in tokens, question included.
    questions: "aware": the question is part of the prompt when a recipe compresses; "agnostic": it comes afterwards.
    baselines: also ask `full`, and at every budget among the recipes `oracle`, `random` and `streaming_llm`.
    text:      haystack and text to be continued; by default Python's own reference.
    depths:    where in the haystack needles may lie.
    batch:     samples side by side; by default as many as make 16,384 tokens.
    out:       folder for `answers.jsonl`, to which an interrupted or a larger evaluation adds what is missing.
    progress:  called with (cost done, cost in all, what is being done).

    The same arguments give the same samples, and more samples contain the fewer.  Greedy decoding; the first token of an
    aware answer comes from the prompt's own attention, as in `generate`.  Raises ValueError for what cannot be asked.
    """
    wanted = [Recipe.parse(recipe) for recipe in recipes]
    parsed = parse_tasks(tasks)
    _check(samples, lengths, questions, depths)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model, tokenizer = load(model, dtype)
    elif tokenizer is None:
        raise ValueError("a model object needs its tokenizer: evaluate(model, recipes, tokenizer=...)")
    language = language_of(tokenizer, text)
    settings = {
        "format": FORMAT,
        "model": name,
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "language": type(language).__name__,
        "text": "default" if text is None else hashlib.sha256(text.encode()).hexdigest()[:12],
        "depths": list(depths),
        "seed": seed,
    }
    run = this_run(model)
    journal = Memory(settings, run) if out is None else Journal(Path(out) / "answers.jsonl", settings, run)
    examiner = _Examiner(model, tokenizer, language, seed, depths)
    examiner.check(parsed, lengths)
    plan = list(_plan(wanted, parsed, lengths, samples, questions, baselines, batch, journal.results))
    total, done = sum(_cost(part) for part in plan), 0
    for part in plan:
        if progress is not None:
            progress(done, total, f"{part.task} at {part.length:,}")
        for answers in examiner.examine(part):
            journal.add(answers)
            done += part.length * len(answers)
            if progress is not None:
                progress(done, total, f"{part.task} at {part.length:,}")
    return journal.results


def baselines_for(recipes: Sequence[Recipe], length: int) -> list[Recipe]:
    """What keeps the scale honest: `full`, and for each budget the best and the worst that it allows, and a window."""
    budgets = [getattr(method, "budget", None) for recipe in recipes for method in (recipe.evict, recipe.select)]
    found = [Recipe()]
    for budget in dict.fromkeys(b for b in budgets if b is not None):
        if isinstance(budget, float) and budget == 1.0:
            continue
        tokens = int(budget_tokens(budget, torch.tensor([length]).numpy(), 4)[0])
        window = StreamingLLM(sink=min(4, tokens // 8), recent=tokens - min(4, tokens // 8))
        found += [Recipe(select=Oracle(budget)), Recipe(evict=RandomEviction(budget)), Recipe(evict=window)]
    return found


def _check(samples: int, lengths: Sequence[int], questions: Sequence[str], depths: tuple[float, float]) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples}: give 1 or more")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={list(lengths)}: give prompt lengths in tokens, such as 1024,2048")
    if not questions or set(questions) - set(QUESTIONS):
        raise ValueError(f"questions={list(questions)}: give 'aware', 'agnostic' or both")
    if len(depths) != 2 or not 0 <= depths[0] <= depths[1] <= 1:
        raise ValueError(f"depths={depths}: give two numbers from 0 to 1, the lower one first")


def _plan(
    recipes: Sequence[Recipe],
    tasks: Sequence[Task],
    lengths: Sequence[int],
    samples: int,
    questions: Sequence[str],
    baselines: bool,
    batch: int | None,
    known: Results,
) -> Iterator[_Batch]:
    """What is still to be asked.  Whoever lacks the same answers is asked together."""
    answered = {answer.key for answer in known.answers}
    for length in lengths:
        asked = list(dict.fromkeys([*(baselines_for(recipes, length) if baselines else []), *recipes]))
        size = batch or max(1, BATCH_TOKENS // length)
        for task in tasks:
            kinds = [""] if isinstance(task, Continuation) else list(questions)
            for first in range(0, samples, size):
                indices = tuple(range(first, min(samples, first + size)))
                lacking: dict[tuple[int, ...], list[tuple[Recipe, str]]] = {}
                for kind in kinds:
                    for recipe in asked:
                        missing = tuple(i for i in indices if (str(recipe), str(task), length, kind, i) not in answered)
                        if missing:
                            lacking.setdefault(missing, []).append((recipe, kind))
                for missing, who in lacking.items():
                    yield _Batch(task, length, missing, tuple(who))


def _cost(part: _Batch) -> int:
    return part.length * len(part.samples) * len(part.asked)


class _Examiner:
    """Puts samples to caches and writes down what they do."""

    def __init__(self, model: Any, tokenizer: Any, language: Language, seed: int, depths: tuple[float, float]):
        self.model, self.tokenizer, self.language, self.seed, self.depths = model, tokenizer, language, seed, depths

    def check(self, tasks: Sequence[Task], lengths: Sequence[int]) -> None:
        """Raise ValueError, before anything runs, where a task or the model cannot do a length."""
        for length in lengths:
            for task in tasks:
                sample = self._sample(task, length, 0)
                longest = len(sample.context) + len(sample.question) + sample.tokens
                limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", longest)
                if longest > limit:
                    raise ValueError(
                        f"length {length}: with its answer a {task} takes {longest} of {limit} positions: give less"
                    )

    def _sample(self, task: Task, length: int, index: int) -> Sample:
        return task.sample(self.language, length, self.seed, index, self.depths)

    def examine(self, part: _Batch) -> Iterator[list[Answer]]:
        """The answers of one recipe after the other."""
        samples = [self._sample(part.task, part.length, i) for i in part.samples]
        if isinstance(part.task, Continuation):
            yield from self._continue(part, samples)
        else:
            yield from self._ask(part, samples)

    @torch.inference_mode()
    def _ask(self, part: _Batch, samples: list[Sample]) -> Iterator[list[Answer]]:
        context = _rows([s.context for s in samples], self.model.device)
        question = _rows([s.question for s in samples], self.model.device)
        shared = [recipe for recipe, _ in part.asked if recipe.dense_prompt]
        reading = _Reading(self.model, self.tokenizer, shared)
        tokens = max(s.tokens for s in samples)
        if any(kind == "agnostic" for _, kind in part.asked):
            reading.read(*context)
            for recipe, kind in part.asked:
                if kind == "agnostic":
                    cache, _, took = reading.cache(recipe)
                    cache.finish_prefill()
                    began = time.perf_counter()
                    mask = _beside(reading.mask, question[1])
                    first = _forward(self.model, question[0], mask, cache)
                    yield self._answers(part, recipe, kind, samples, cache, first, mask, tokens, took, began)
            reading.read(*question)
        else:
            reading.read(torch.cat([context[0], question[0]], 1), torch.cat([context[1], question[1]], 1))
        for recipe, kind in part.asked:
            if kind == "aware":
                cache, first, took = reading.cache(recipe)
                began = time.perf_counter()
                yield self._answers(part, recipe, kind, samples, cache, first, reading.mask, tokens, took, began)

    def _answers(
        self,
        part: _Batch,
        recipe: Recipe,
        kind: str,
        samples: list[Sample],
        cache: Cache,
        logits: Tensor,
        mask: Tensor,
        tokens: int,
        prefill: float,
        began: float,
    ) -> list[Answer]:
        said = [logits.argmax(-1, keepdim=True)]
        for _ in range(tokens - 1):
            mask = _beside(mask, torch.ones_like(said[-1]))
            said.append(_forward(self.model, said[-1], mask, cache).argmax(-1, keepdim=True))
        ids = torch.cat(said, 1).tolist()
        measured = self._measures(part, recipe, kind, cache, prefill, time.perf_counter() - began)
        found = []
        for i, sample, row, read in zip(part.samples, samples, ids, _read(cache), strict=True):
            answer = self.tokenizer.decode(row[: sample.tokens], skip_special_tokens=True)
            graded = {"answer": answer, "references": sample.references, "score": score(answer, sample.references)}
            depths = tuple(round(d, 4) for d in sample.depths)
            found.append(Answer(sample=i, depths=depths, read=read, **graded, **measured))
        return found

    @torch.inference_mode()
    def _continue(self, part: _Batch, samples: list[Sample]) -> Iterator[list[Answer]]:
        context, mask = _rows([s.context for s in samples], self.model.device)
        follow = torch.tensor([s.question for s in samples], device=self.model.device)
        recipes = [recipe for recipe, _ in part.asked]
        reading = _Reading(self.model, self.tokenizer, [Recipe(), *(r for r in recipes if r.dense_prompt)])
        reading.read(context, mask)
        full: Tensor | None = None
        for recipe in dict.fromkeys([Recipe(), *recipes]):  # the full cache's predictions are the measure of the others
            cache, _, took = reading.cache(recipe)
            began = time.perf_counter()
            known, steps = mask, []
            for t in range(follow.shape[1] - 1):
                known = _beside(known, torch.ones_like(follow[:, :1]))
                steps.append(_forward(self.model, follow[:, t : t + 1], known, cache))
            predicted = torch.stack(steps, 1).float().log_softmax(-1)
            _settle(predicted.device)
            measured = self._measures(part, recipe, "", cache, took, time.perf_counter() - began)
            full = predicted if full is None else full
            if recipe in recipes:
                yield _distances(part.samples, predicted, full, follow[:, 1:], _read(cache), measured)

    def _measures(
        self, part: _Batch, recipe: Recipe, kind: str, cache: Cache, prefill: float, decode: float
    ) -> dict[str, Any]:
        """What all answers of a batch have in common."""
        rows = len(part.samples)
        return {
            "recipe": str(recipe),
            "task": str(part.task),
            "length": part.length,
            "question": kind,
            "nbytes": sum(cache.nbytes().values()) // rows,
            "full_nbytes": cache.full_nbytes() // rows,
            "prefill_s": round(prefill / rows, 4),
            "decode_s": round(decode / rows, 4),
        }


class _Reading:
    """The prompt so far: read once for the recipes that share it, and once more for each that cannot."""

    def __init__(self, model: Any, tokenizer: Any, shared: Sequence[Recipe]):
        self.model, self.tokenizer = model, tokenizer
        self._prompt = Prompt(model, shared, tokenizer)
        self._ids: Tensor | None = None
        self.mask = torch.empty(0)
        self._logits = torch.empty(0)  # after the last token
        self._took = 0.0

    def read(self, ids: Tensor, mask: Tensor) -> None:
        """Go on reading."""
        began = time.perf_counter()
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], 1)
        self.mask = mask if self._ids is ids else torch.cat([self.mask, mask], 1)
        self._logits = self._prompt.read(ids, self.mask)
        _settle(ids.device)
        self._took += time.perf_counter() - began

    def cache(self, recipe: Recipe) -> tuple[Cache, Tensor, float]:
        """A cache that has read the prompt in one piece, the logits after its last token, and the seconds that took."""
        if recipe.dense_prompt:
            return self._prompt.cache(recipe), self._logits, self._took
        assert self._ids is not None
        began = time.perf_counter()
        cache = Cache(self.model, recipe, self.tokenizer)
        logits = _forward(self.model, self._ids, self.mask, cache)
        _settle(logits.device)
        return cache, logits, time.perf_counter() - began


def _settle(device: torch.device) -> None:
    """Wait for the device, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forward(model: Any, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Logits [B, vocabulary] after the last of ids; positions count each row's own tokens."""
    n = ids.shape[1]
    positions = own_positions(mask, n)
    padded = mask if not bool(mask.all()) else None
    out = model(ids, attention_mask=padded, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    logits: Tensor = out.logits[:, -1]
    return logits


def _rows(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _beside(mask: Tensor, more: Tensor) -> Tensor:
    return torch.cat([mask, more], 1)


def _read(cache: Cache) -> list[float]:
    """Share of its tokens that a query of each row attends, over all layers and heads."""
    read = cache.read()[torch.from_numpy(cache.managed_layers)].double().mean((0, 2))
    seen = torch.from_numpy(cache.managed[0].store.groups[0].tokens)
    shares: list[float] = (read / seen).tolist()
    return [round(share, 5) for share in shares]


def _distances(
    samples: Sequence[int], predicted: Tensor, full: Tensor, following: Tensor, read: list[float], measured: dict[str, Any]
) -> list[Answer]:
    """Log-probabilities [B, n, vocabulary] against the full cache's and against what follows [B, n]."""
    nll = -predicted.gather(2, following.unsqueeze(-1))[..., 0].mean(1)
    kl = torch.nn.functional.kl_div(predicted, full, reduction="none", log_target=True).sum(-1).mean(1)
    agreement = (predicted.argmax(-1) == full.argmax(-1)).float().mean(1)
    columns = zip(samples, nll.tolist(), kl.tolist(), agreement.tolist(), read, strict=True)
    return [Answer(sample=i, nll=a, kl=max(0.0, b), agreement=c, read=r, **measured) for i, a, b, c, r in columns]
