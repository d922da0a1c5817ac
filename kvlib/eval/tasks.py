"""The tasks, in RULER's terms (arXiv 2404.06654): facts hidden in a haystack, and a question about them.

niah         one needle.
multikey     one needle asked for among several of the same kind.
multivalue   all the values of one key.
multiquery   several keys in one question.
vt           variable tracking: a value handed from variable to variable.
copy         a phrase to be continued from its first two words.
continuation no question: perplexity of the text that follows, and distance from the full cache's predictions.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from kvlib.eval.language import Language, Question
from kvlib.policies.base import RecipeError, check_whole, written
from kvlib.policies.notation import build, nearest, read_call, split

_GOLDEN = 0.6180339887498949
FAR = 64  # tokens a statement may stand off its place to stand between sentences


@dataclass(frozen=True)
class Facts:
    """What a document states.  asked: statements the question is about, in order; others: of the same kind, not asked."""

    asked: tuple[str, ...]
    others: tuple[str, ...]
    question: Question


@dataclass(frozen=True)
class Sample:
    """One document and its question, as ids.

    depths: where in the haystack the asked statements stand, 0..1; tokens: how long an answer may be.
    """

    context: list[int]
    question: list[int]
    references: tuple[str, ...] = ()
    depths: tuple[float, ...] = ()
    tokens: int = 0

    @property
    def digest(self) -> str:
        """A hash of its ids."""
        return f"{zlib.crc32(np.array([*self.context, -1, *self.question]).tobytes()):08x}"


@dataclass(frozen=True)
class Task(ABC):
    """A kind of question; its fields are how hard it is."""

    name: ClassVar[str]
    least: ClassVar[dict[str, int]] = {}  # of each parameter

    def __post_init__(self) -> None:
        for parameter, least in self.least.items():
            check_whole(self.name, parameter, getattr(self, parameter), least)

    @abstractmethod
    def sample(self, language: Language, length: int, seed: int, index: int, depths: tuple[float, float]) -> Sample:
        """The index-th sample of a seed: a prompt of exactly `length` tokens, what is asked for at depths within `depths`.

        Depends on nothing else, so that samples can be made in any order and number.  Raises ValueError where the length
        leaves no room.
        """

    @abstractmethod
    def check(self, language: Language, length: int, seed: int, count: int) -> int:
        """Raise ValueError where one of the first `count` samples cannot be made; returns the most tokens of an answer."""

    def __str__(self) -> str:
        return written(self)


class _Draft(NamedTuple):
    """A sample but for its haystack, for which there is room for `room` tokens after the ids `before`."""

    rng: np.random.Generator
    facts: Facts
    before: list[int]
    statements: list[list[int]]
    question: list[int]
    room: int


@dataclass(frozen=True)
class Recall(Task):
    """Facts hidden in a haystack and a question about them."""

    @abstractmethod
    def facts(self, language: Language, rng: np.random.Generator) -> Facts:
        """One instance."""

    def sample(self, language: Language, length: int, seed: int, index: int, depths: tuple[float, float]) -> Sample:
        """See `Task.sample`; a lone statement's depth is spread evenly over the samples (golden ratio)."""
        rng, facts, before, statements, question, room = self._draft(language, length, seed, index)
        low, high = depths
        if len(facts.asked) == 1:
            start = np.random.default_rng(seed).random()
            places = [low + (high - low) * ((start + index * _GOLDEN) % 1)]
        else:
            places = sorted((low + (high - low) * rng.random(len(facts.asked))).tolist())
        places += rng.random(len(facts.others)).tolist()
        hidden, found = _hide(language.haystack(rng, room), statements, places)
        tokens = _answer_tokens(language, facts.question)
        return Sample(before + hidden, question, facts.question.references, tuple(found[: len(facts.asked)]), tokens)

    def check(self, language: Language, length: int, seed: int, count: int) -> int:
        """See `Task.check`."""
        drafts = (self._draft(language, length, seed, i) for i in range(count))
        return max(_answer_tokens(language, draft.facts.question) for draft in drafts)

    def _draft(self, language: Language, length: int, seed: int, index: int) -> _Draft:
        rng = np.random.default_rng([seed, zlib.crc32(str(self).encode()), length, index])
        facts = self.facts(language, rng)
        before, question = language.frame(facts.question)
        statements = [language.encode(text) for text in (*facts.asked, *facts.others)]
        room = length - len(before) - len(question) - sum(map(len, statements))
        if room < 16:
            taken = length - room
            raise ValueError(
                f"{self} at length {length}: statements and question of sample {index} take {taken} tokens: give lengths "
                f"of {taken + 16} or more"
            )
        language.check(room)
        return _Draft(rng, facts, before, statements, question, room)


def _hide(pieces: list[list[int]], statements: list[list[int]], places: list[float]) -> tuple[list[int], list[float]]:
    """The pieces in one list with each statement at the border nearest to its place, and the places that became of it.

    Where no border is near, a statement stands between two tokens.
    """
    hay = [token for piece in pieces for token in piece]
    borders = np.cumsum([0, *map(len, pieces)])
    wanted = [round(place * len(hay)) for place in places]
    nearest = [int(borders[np.abs(borders - at).argmin()]) for at in wanted]
    chosen = [near if abs(near - at) <= FAR else at for near, at in zip(nearest, wanted, strict=True)]
    found, last = [], 0
    for at, statement in sorted(zip(chosen, statements, strict=True), key=lambda pair: pair[0]):
        found += [*hay[last:at], *statement]
        last = at
    return found + hay[last:], [at / len(hay) for at in chosen]


def _answer_tokens(language: Language, question: Question) -> int:
    return len(language.encode(question.answer)) + language.spare * len(question.references)


def score(answer: str, references: Sequence[str]) -> float:
    """Share of the references that an answer contains (RULER's string match, of whole words)."""
    said = " ".join(answer.split())
    hits = [re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", said) is not None for reference in references]
    return sum(hits) / len(references)


@dataclass(frozen=True)
class Niah(Recall):
    """One needle in the haystack."""

    name: ClassVar[str] = "niah"

    def facts(self, language: Language, rng: np.random.Generator) -> Facts:
        """A name and its number."""
        (name,), number = language.names(rng, 1), language.number(rng)
        return Facts((language.needle(name, number),), (), language.ask([name], [number]))


@dataclass(frozen=True)
class MultiKey(Recall):
    """One needle asked for, among `keys` of the same kind."""

    name: ClassVar[str] = "multikey"
    least: ClassVar[dict[str, int]] = {"keys": 2}

    keys: int = 4

    def facts(self, language: Language, rng: np.random.Generator) -> Facts:
        """Names and their numbers."""
        names = language.names(rng, self.keys)
        numbers = [language.number(rng) for _ in names]
        needles = [language.needle(*pair) for pair in zip(names, numbers, strict=True)]
        return Facts((needles[0],), tuple(needles[1:]), language.ask(names[:1], numbers[:1]))


@dataclass(frozen=True)
class MultiValue(Recall):
    """All of one key's `values`, each in a needle of its own."""

    name: ClassVar[str] = "multivalue"
    least: ClassVar[dict[str, int]] = {"values": 2}

    values: int = 3

    def facts(self, language: Language, rng: np.random.Generator) -> Facts:
        """One name, several numbers."""
        (name,) = language.names(rng, 1)
        numbers = [language.number(rng) for _ in range(self.values)]
        return Facts(tuple(language.one_of(name, number) for number in numbers), (), language.ask_all(name, numbers))


@dataclass(frozen=True)
class MultiQuery(Recall):
    """The needles of `queries` keys in one question."""

    name: ClassVar[str] = "multiquery"
    least: ClassVar[dict[str, int]] = {"queries": 2}

    queries: int = 3

    def facts(self, language: Language, rng: np.random.Generator) -> Facts:
        """Names and their numbers, all asked for."""
        names = language.names(rng, self.queries)
        numbers = [language.number(rng) for _ in names]
        needles = tuple(language.needle(*pair) for pair in zip(names, numbers, strict=True))
        order = rng.permutation(len(names))  # asked in another order than stated
        return Facts(needles, (), language.ask([names[i] for i in order], [numbers[i] for i in order]))


@dataclass(frozen=True)
class VariableTracking(Recall):
    """A value that is handed on `hops` times, from variable to variable."""

    name: ClassVar[str] = "vt"
    least: ClassVar[dict[str, int]] = {"hops": 1}

    hops: int = 2

    def facts(self, language: Language, rng: np.random.Generator) -> Facts:
        """A chain of assignments, in order."""
        chain = language.variables(rng, self.hops + 1)
        number = language.number(rng)
        given = [number, *chain[:-1]]
        statements = tuple(language.assign(*pair) for pair in zip(chain, given, strict=True))
        return Facts(statements, (), language.trace(chain, number))


@dataclass(frozen=True)
class Copy(Recall):
    """A phrase of `words` random words, to be continued from the first two."""

    name: ClassVar[str] = "copy"
    least: ClassVar[dict[str, int]] = {"words": 3}

    words: int = 12

    def facts(self, language: Language, rng: np.random.Generator) -> Facts:
        """A phrase."""
        words = language.words(rng, self.words)
        return Facts((language.phrase(words),), (), language.go_on(words, 2))


@dataclass(frozen=True)
class Continuation(Task):
    """The `tokens` that follow a real text: perplexity, and KL and top-1 agreement against the full cache."""

    name: ClassVar[str] = "continuation"
    least: ClassVar[dict[str, int]] = {"tokens": 1}

    tokens: int = 64

    def sample(self, language: Language, length: int, seed: int, index: int, depths: tuple[float, float]) -> Sample:
        """`length` tokens of text, and as its question the `tokens` that follow and one more to be predicted."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), length, index])
        ids = language.text(rng, length + self.tokens + 1)
        return Sample(ids[:length], ids[length:], tokens=self.tokens)

    def check(self, language: Language, length: int, seed: int, count: int) -> int:
        """See `Task.check`."""
        language.check(length + self.tokens + 1)
        return self.tokens


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Niah, MultiKey, MultiValue, MultiQuery, VariableTracking, Copy, Continuation)
}


def parse_tasks(text: str | Sequence[str | Task]) -> list[Task]:
    """Tasks from "niah, multikey(keys=2)" or a sequence of such; raises RecipeError naming what cannot be read."""
    terms = (
        split(text, ",")
        if isinstance(text, str)
        else [x for t in text for x in (split(t, ",") if isinstance(t, str) else [t])]
    )
    found: list[Task] = []
    for term in terms:
        if isinstance(term, Task):
            found.append(term)
            continue
        name, arguments = read_call(term.strip(), str(text))
        if name not in TASKS:
            raise RecipeError(name, None, name, nearest(name, TASKS, "task"))
        found.append(build(TASKS[name], arguments))
    return list(dict.fromkeys(found))
