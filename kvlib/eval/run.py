"""Ask every recipe every question: batches of samples, one prompt read for all recipes, answers written as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvlib.eval.examine import Examiner
from kvlib.eval.language import language_of
from kvlib.eval.models import load
from kvlib.eval.provenance import fingerprint, source_of, this_run
from kvlib.eval.results import FORMAT, Journal, Results
from kvlib.eval.tasks import Continuation, Task, parse_tasks
from kvlib.hf import detach
from kvlib.policies import Oracle, RandomEviction, StreamingLLM
from kvlib.policies.base import budget_tokens
from kvlib.recipe import Recipe

QUESTIONS = ("aware", "agnostic")
DEFAULT_TASKS = "niah, multikey, multivalue, multiquery, vt, copy, continuation"
BATCH_TOKENS = 16384  # prompts read side by side unless the caller says how many


@dataclass(frozen=True)
class Asking:
    """What is asked of whom.  See `evaluate`."""

    recipes: tuple[Recipe, ...]
    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    samples: int
    questions: tuple[str, ...]
    baselines: bool
    batch: int | None

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if not self.tasks:
            raise ValueError("tasks are missing: give some, such as 'niah, continuation'")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={list(self.lengths)}: give prompt lengths in tokens, such as 1024,2048")
        if not self.questions or set(self.questions) - set(QUESTIONS):
            raise ValueError(f"questions={list(self.questions)}: give 'aware', 'agnostic' or both")

    def whom(self, length: int) -> list[Recipe]:
        """The recipes asked at a length, each once."""
        found = [*(baselines_for(self.recipes, length) if self.baselines else []), *self.recipes]
        return list({str(recipe): recipe for recipe in found}.values())

    def written(self) -> dict[str, Any]:
        """What a reader needs to ask the same again."""
        return {
            "recipes": [str(recipe) for recipe in self.recipes],
            "tasks": [str(task) for task in self.tasks],
            "lengths": list(self.lengths),
            "samples": self.samples,
            "questions": list(self.questions),
            "baselines": self.baselines,
        }


@dataclass(frozen=True)
class Batch:
    """Samples of one task and length, and who is still to be asked in which way: (recipe, question)."""

    task: Task
    length: int
    samples: tuple[int, ...]
    asked: tuple[tuple[Recipe, str], ...]

    @property
    def cost(self) -> int:
        """Tokens read, about."""
        return self.length * len(self.samples) * len(self.asked)


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
    depths:    where in the haystack the statements asked for may stand.
    batch:     samples side by side; by default as many as make 16,384 tokens.
    out:       folder for `answers.jsonl`, to which an interrupted or a larger evaluation adds what is missing.
    progress:  called with (cost done, cost in all, what is being done).

    The same arguments give the same samples, and more samples contain the fewer.  Greedy decoding; the first token of an
    aware answer comes from the prompt's own attention, as in `generate`.  A model object is left as it was found.

    Raises ValueError for what cannot be asked, before anything is.
    """
    asking = Asking(
        recipes=tuple(Recipe.parse(recipe) for recipe in recipes),
        tasks=tuple(parse_tasks(tasks)),
        lengths=tuple(dict.fromkeys(lengths)),
        samples=samples,
        questions=tuple(dict.fromkeys(questions)),
        baselines=baselines,
        batch=batch,
    )
    if len(depths) != 2 or not 0 <= depths[0] <= depths[1] <= 1:
        raise ValueError(f"depths={depths}: give two numbers from 0 to 1, the lower one first")
    path = None if out is None else Path(out) / "answers.jsonl"
    journal = Journal(path)
    name, own = (model, True) if isinstance(model, str) else (type(model).__name__, False)
    if own:
        model, tokenizer = load(name, journal.results.settings.get("dtype", "auto") if dtype == "auto" else dtype)
    elif tokenizer is None:
        raise ValueError("a model object needs its tokenizer: evaluate(model, recipes, tokenizer=...)")
    language = language_of(tokenizer, text)
    settings = {
        "format": FORMAT,
        "model": name,
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "language": type(language).__name__,
        "text": language.digest,
        "depths": list(depths),
        "seed": seed,
    }
    attached = own or model.config._attn_implementation == "kvlib"
    try:
        examiner = Examiner(model, tokenizer, language, seed, depths)
        sources: dict[str, str] = {}
        for length in asking.lengths:
            whom = asking.whom(length)
            examiner.check(asking.tasks, length, samples, whom)
            sources |= {str(recipe): source_of(recipe) for recipe in whom}
        journal.begin(settings, {**this_run(model), **asking.written()}, sources)
        examiner.check_known(asking.tasks, journal.results.answers)
        _ask_all(asking, examiner, journal, progress or (lambda done, total, what: None))
    finally:
        if not attached:
            detach(model)
    return journal.results


def _ask_all(asking: Asking, examiner: Examiner, journal: Journal, progress: Callable[[int, int, str], None]) -> None:
    plan = list(_plan(asking, journal.results))
    total, done = sum(part.cost for part in plan), 0
    for part in plan:
        what = f"{part.task} at {part.length:,}"
        progress(done, total, what)
        for answers in examiner.examine(part.task, part.length, part.samples, part.asked):
            journal.add(answers)
            done += part.length * len(answers)
            progress(done, total, what)


def baselines_for(recipes: Sequence[Recipe], length: int) -> list[Recipe]:
    """What keeps the scale honest: `full`, and for each budget the best and the worst that it allows, and a window."""
    budgets = [getattr(method, "budget", None) for recipe in recipes for method in (recipe.evict, recipe.select)]
    found = [Recipe()]
    for budget in {repr(budget): budget for budget in budgets if budget is not None}.values():
        if isinstance(budget, float) and budget == 1.0:
            continue
        tokens = int(budget_tokens(budget, np.array([length]), 1)[0])
        sink = min(4, tokens // 8)
        found += [Recipe(select=Oracle(budget)), Recipe(evict=StreamingLLM(sink=sink, recent=tokens - sink))]
        if isinstance(budget, float) or budget >= RandomEviction.minimum:
            found.append(Recipe(evict=RandomEviction(budget)))
    return found


def _plan(asking: Asking, known: Results) -> Iterator[Batch]:
    """What is still to be asked.  Whoever lacks the same answers is asked together."""
    answered = {answer.key for answer in known.answers}
    for length in asking.lengths:
        size, whom = asking.batch or max(1, BATCH_TOKENS // length), asking.whom(length)
        for task in asking.tasks:
            kinds = ("",) if isinstance(task, Continuation) else asking.questions
            for first in range(0, asking.samples, size):
                indices = range(first, min(asking.samples, first + size))
                lacking: dict[tuple[int, ...], list[tuple[Recipe, str]]] = {}
                for kind in kinds:
                    for recipe in whom:
                        missing = tuple(i for i in indices if (str(recipe), str(task), length, kind, i) not in answered)
                        if missing:
                            lacking.setdefault(missing, []).append((recipe, kind))
                for missing, who in lacking.items():
                    yield Batch(task, length, missing, tuple(who))
