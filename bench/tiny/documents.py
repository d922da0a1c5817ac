"""Documents in the synthetic language, and the batches made of them.

A document is statements scattered over filler text, then questions on them among more text.  Every batch is a pure function
of (seed, epoch, rank, step): nothing needs replaying to resume a run, and helpers may make the batches in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing import get_context
from typing import TypeVar

import numpy as np

from kvlib.eval.grammar import (
    ALL,
    ASK,
    BOS,
    COLON,
    COMMA,
    COPY,
    DOT,
    EVAL,
    KEY,
    LIST,
    LONGEST,
    NAMES,
    NL,
    NUMBERS,
    PASTE,
    SET,
    SPECIAL,
    TRACE,
    WORDS,
    Text,
)

NONE, TEXT, ANSWER = range(3)  # what the loss of a token counts as
QUESTIONS = {word: SPECIAL[word] for word in (ASK, LIST, ALL, TRACE, EVAL, PASTE)}

_MIXTURE = {"needle": 0.45, "passage": 0.15, "chain": 0.22, "series": 0.18}
_TOKENS_PER_FACT = 11  # of a statement and its share of the questions
_LONGEST_SENTENCE = LONGEST + 4  # a phrase's two more words, full stop, line break

Item, Made = TypeVar("Item"), TypeVar("Made")


class Document:
    """Token ids, the loss class of each, and the question word of each answer token (0 elsewhere)."""

    def __init__(self):
        self.ids, self.losses, self.questions = [BOS], [NONE], [0]

    def put(self, tokens: Sequence[int], loss: int, question: int = 0) -> None:
        """Append tokens of one class."""
        self.ids += tokens
        self.losses += [loss] * len(tokens)
        self.questions += [question] * len(tokens)

    def cut(self, size: int) -> None:
        """Keep the first `size` tokens."""
        for row in (self.ids, self.losses, self.questions):
            del row[size:]


class _Facts:
    """Statements, in groups whose inner order matters, and questions on them: (question, answer).  No name serves twice."""

    def __init__(self, rng: np.random.Generator, count: int):
        self.rng = rng
        self.names = rng.permutation(NAMES).tolist()
        self.groups: list[list[list[int]]] = []
        self.questions: list[tuple[list[int], list[int]]] = []
        self.needles: list[tuple[int, list[int]]] = []
        kinds = rng.choice(list(_MIXTURE), count, p=list(_MIXTURE.values()))
        stated = 0
        for kind in kinds:
            if stated >= count or len(self.names) < 6:
                break
            stated += getattr(self, kind)()
        self.ask()

    def number(self) -> list[int]:
        return [NUMBERS.start + int(self.rng.random() * len(NUMBERS)) for _ in range(2)]

    def needle(self) -> int:
        name, value = self.names.pop(), self.number()
        self.groups.append([[KEY, name, *value, DOT]])
        self.needles.append((name, value))  # which are asked together is decided once all are known
        return 1

    def series(self) -> int:
        name, values = self.names.pop(), [self.number() for _ in range(self.rng.integers(2, 5))]
        self.groups.append([[KEY, name, *value, DOT] for value in values])
        answer = [token for value in values for token in (*value, COMMA)]
        self.questions.append(([ALL, name], [*answer[:-1], DOT]))
        return len(values)

    def chain(self) -> int:
        names = [self.names.pop() for _ in range(self.rng.integers(1, 4))]
        value = self.number()
        links = [[SET, later, earlier, DOT] for earlier, later in pairwise(names)]
        self.groups.append([[SET, names[0], *value, DOT], *links])
        *way, last = names
        if self.rng.random() < 0.3:
            self.questions.append(([EVAL, last], [*value, DOT]))
        else:
            self.questions.append(([TRACE, last], [*reversed(way), *value, DOT]))
        return len(names)

    def passage(self) -> int:
        pool = WORDS if self.rng.random() < 0.5 else NUMBERS
        words = self.rng.integers(pool.start, pool.stop, self.rng.integers(6, 17)).tolist()
        self.groups.append([[COPY, *words, DOT]])
        self.questions.append(([PASTE, *words[:2]], [*words[2:], DOT]))
        return 2

    def ask(self) -> None:
        """Ask for the needles one by one, some for several at once."""
        self.rng.shuffle(self.needles)
        while self.needles:
            many = len(self.needles) >= 3 and self.rng.random() < 0.15
            asked = [self.needles.pop() for _ in range(min(len(self.needles), self.rng.integers(2, 5) if many else 1))]
            names = [name for name, _ in asked]
            if many:
                answer = [token for name, value in asked for token in (name, *value)]
                self.questions.append(([LIST, *names, COLON], [*answer, DOT]))
            else:
                self.questions.append(([ASK, *names], [*asked[0][1], DOT]))


def document(rng: np.random.Generator, length: int, density: float) -> Document:
    """A document of BOS and `length` tokens, of which statements and questions take about the share `density`.

    The questions stand in the last 5 to 35 % of the filler text.
    """
    facts = _Facts(rng, max(1, int(length * density / _TOKENS_PER_FACT)))
    text = Text(rng, length)

    def broken(sentence: list[int]) -> list[int]:
        return [*sentence, NL] if rng.random() < 0.15 else sentence

    def filler(room: int) -> Iterator[list[int]]:
        while room >= _LONGEST_SENTENCE:
            sentence = broken(text.sentence())
            room -= len(sentence)
            yield sentence

    body = []  # (place, tokens, loss, question)
    for group in facts.groups:
        places = np.sort(rng.random(len(group)))
        body += [(place, broken(statement), NONE, 0) for place, statement in zip(places, group, strict=True)]
    questions, room = facts.questions, length - sum(len(entry[1]) for entry in body)
    room -= sum(len(question) + len(answer) for question, answer in questions)
    while room < 0 and questions:
        room += sum(map(len, questions.pop()))
    among = int(room * (0.05 + 0.3 * rng.random())) if questions else 0
    body += [(rng.random(), sentence, TEXT, 0) for sentence in filler(room - among)]
    tail = [(rng.random(), question, NONE, answer) for question, answer in questions]
    tail += [(rng.random(), sentence, TEXT, 0) for sentence in filler(among)]

    made = Document()
    for _, tokens, loss, answer in [*sorted(body, key=_place), *sorted(tail, key=_place)]:
        made.put(tokens, loss)
        if answer:
            made.put(answer, ANSWER, question=tokens[0])
    for sentence in text.tokens(length + 1 - len(made.ids)):
        made.put(sentence, TEXT)
    made.cut(length + 1)  # a document too short even for its statements
    return made


def _place(entry: tuple) -> float:
    return entry[0]


def sample(rng: np.random.Generator, length: int) -> Document:
    """A document of the training mixture: dense recall, mixed, few needles in much text, or nearly nothing but text."""
    draw, share = rng.random(2)
    if draw < 0.45:
        density = 0.75 + 0.2 * share
    elif draw < 0.75:
        density = 0.15 + 0.5 * share
    else:
        density = 0.02 + 0.1 * share if draw < 0.95 else 0.0
    return document(rng, length, density)


@dataclass(frozen=True)
class Batch:
    """Documents and where their loss is.

    ids: [documents, length + 1].  at: [n], places in the flattened [documents, length] whose next token is learnt.
    questions: [n], the question word whose answer that token belongs to, 0 in text.
    """

    ids: np.ndarray
    at: np.ndarray
    questions: np.ndarray


def batch(seed: int, epoch: int, rank: int, step: int, *, length: int, documents: int, text_share: float) -> Batch:
    """All answers and a share of the text to learn from; the same arguments always give the same batch."""
    rng = np.random.default_rng([seed, epoch, rank, step])
    made = [sample(rng, length) for _ in range(documents)]
    losses = np.array([document.losses[1:] for document in made]).reshape(-1)
    wanted = (losses == ANSWER) | ((losses == TEXT) & (rng.random(losses.shape) < text_share))
    (at,) = np.nonzero(wanted)
    questions = np.array([document.questions[1:] for document in made]).reshape(-1)
    return Batch(np.array([document.ids for document in made]), at, questions[at])


def ahead(make: Callable[[Item], Made], items: Sequence[Item], workers: int) -> Iterator[Made]:
    """make(item) for each item in order, made ahead by `workers` processes; by none, when it is asked for."""
    if not workers:
        yield from map(make, items)
        return
    rest = iter(items)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        pending = deque(pool.submit(make, item) for item in islice(rest, 3 * workers))
        while pending:
            made = pending.popleft().result()
            pending.extend(pool.submit(make, item) for item in islice(rest, 1))
            yield made
