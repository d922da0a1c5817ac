"""The languages an evaluation can be held in: what a needle, a question and a haystack are in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from kvlib.eval import grammar
from kvlib.eval.provenance import digest

ADJECTIVES = "amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow noble odd plain".split()
NOUNS = "anchor basket candle dagger engine feather garden hammer island jacket kettle lantern mirror needle".split()
CITIES = (
    "Paris London Tokyo Berlin Madrid Rome Cairo Moscow Sydney Toronto Chicago Boston Vienna Oslo Dublin Lima Athens Delhi "
    "Dallas Geneva Havana Houston Kiev Lagos Lisbon Manila Miami Milan Munich Nairobi Prague Quebec Seattle Seoul Venice "
    "Warsaw"
).split()
PAIRS = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Question:
    """A question at the end of a prompt.

    begin: the words of the answer that are given with it; answer: a full right answer after them; references: what the
    answer must contain, none of it a first token alone, which an aware answer owes to the prompt's own attention.
    """

    text: str
    begin: str
    answer: str
    references: tuple[str, ...]


class Language(Protocol):
    """What tasks need to phrase themselves.  Ids are lists of ints; `rng` decides everything random."""

    spare: int  # tokens per reference that an answer may be longer than the right one

    @property
    def digest(self) -> str:
        """A hash of the text."""

    def check(self, tokens: int) -> None:
        """Raise ValueError where there are not so many tokens of text."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""

    def frame(self, question: Question) -> tuple[list[int], list[int]]:
        """Ids before the haystack, and from its end to where the answer starts."""

    def haystack(self, rng: np.random.Generator, tokens: int) -> list[list[int]]:
        """Pieces of exactly `tokens` ids in all, between which statements may stand."""

    def text(self, rng: np.random.Generator, tokens: int) -> list[int]:
        """A text of exactly `tokens` ids, for its perplexity."""

    def names(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different names."""

    def variables(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different names that are more than a token each, but for the one an answer begins with."""

    def words(self, rng: np.random.Generator, count: int) -> list[str]:
        """Words without order."""

    def number(self, rng: np.random.Generator) -> str:
        """A value of more than one token."""

    def needle(self, name: str, number: str) -> str:
        """The statement that gives a name its number."""

    def one_of(self, name: str, number: str) -> str:
        """The statement that gives a name one of its numbers."""

    def assign(self, name: str, value: str) -> str:
        """The statement that gives a variable a number or another variable's value."""

    def phrase(self, words: Sequence[str]) -> str:
        """The statement of words to be copied."""

    def ask(self, names: Sequence[str], numbers: Sequence[str]) -> Question:
        """What are the numbers of these names?"""

    def ask_all(self, name: str, numbers: Sequence[str]) -> Question:
        """What are all the numbers of this name?"""

    def trace(self, chain: Sequence[str], number: str) -> Question:
        """Which variables have the value?  Each of the chain was given the value of the one before."""

    def go_on(self, words: Sequence[str], given: int) -> Question:
        """How does the phrase that begins with the `given` first words go on?"""


class Synthetic:
    """The tiny model's own language, `kvlib.eval.grammar`."""

    spare = 0

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    @property
    def digest(self) -> str:
        """Of the words; the text follows from seeds."""
        return digest(" ".join(grammar.vocabulary()).encode())

    def check(self, tokens: int) -> None:
        """There is always more."""

    @staticmethod
    def spoken_by(tokenizer: Any) -> bool:
        """Whether this tokenizer has the grammar's words in the grammar's places."""
        words = grammar.vocabulary()
        if len(tokenizer) != len(words):
            return False
        return list(tokenizer.convert_ids_to_tokens(list(range(len(words))))) == list(words)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def frame(self, question: Question) -> tuple[list[int], list[int]]:
        """The first token; the question."""
        return [grammar.BOS], self.encode(question.text)

    def haystack(self, rng: np.random.Generator, tokens: int) -> list[list[int]]:
        """Sentences of one document."""
        return grammar.Text(rng, tokens).tokens(tokens)

    def text(self, rng: np.random.Generator, tokens: int) -> list[int]:
        """One document."""
        return [grammar.BOS, *(word for sentence in self.haystack(rng, tokens - 1) for word in sentence)]

    def names(self, rng: np.random.Generator, count: int) -> list[str]:
        """Names of the grammar."""
        return _words(rng, _of(grammar.NAMES), count, "names")

    variables = names  # the answer's first name is not among the references

    def words(self, rng: np.random.Generator, count: int) -> list[str]:
        """Filler words, each drawn alone."""
        pool = _of(grammar.WORDS)
        return [pool[i] for i in rng.integers(0, len(pool), count)]

    def number(self, rng: np.random.Generator) -> str:
        """Two of the hundred numbers."""
        return "{:02d} {:02d}".format(*rng.integers(0, len(grammar.NUMBERS), 2))

    def needle(self, name: str, number: str) -> str:
        """Key K a b."""
        return f"key {name} {number} ."

    one_of = needle

    def assign(self, name: str, value: str) -> str:
        """Set Y X, or set X a b."""
        return f"set {name} {value} ."

    def phrase(self, words: Sequence[str]) -> str:
        """Copy r r r."""
        return f"copy {' '.join(words)} ."

    def ask(self, names: Sequence[str], numbers: Sequence[str]) -> Question:
        """Ask K, or list K1 K2."""
        if len(names) == 1:
            return Question(f"ask {names[0]}", "", f"{numbers[0]} .", tuple(numbers))
        pairs = tuple(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
        return Question(f"list {' '.join(names)} :", "", f"{' '.join(pairs)} .", pairs)

    def ask_all(self, name: str, numbers: Sequence[str]) -> Question:
        """All K."""
        return Question(f"all {name}", "", f"{' , '.join(numbers)} .", tuple(numbers))

    def trace(self, chain: Sequence[str], number: str) -> Question:
        """Trace Y: the chain backwards, then the value."""
        back = [*chain[-2::-1], number]
        return Question(f"trace {chain[-1]}", "", f"{' '.join(back)} .", tuple(back[1:]))

    def go_on(self, words: Sequence[str], given: int) -> Question:
        """Paste r r."""
        rest = " ".join(words[given:])
        return Question(f"paste {' '.join(words[:given])}", "", f"{rest} .", (rest,))


class English:
    """A real text as haystack, magic numbers in it, and a chat model (or a plain one) that is asked for them."""

    spare = 4

    def __init__(self, tokenizer: Any, text: str):
        self._tokenizer, self._source = tokenizer, text

    @property
    def digest(self) -> str:
        """Of the haystack."""
        return digest(self._source.encode())

    def check(self, tokens: int) -> None:
        """Raise ValueError where the haystack is shorter."""
        if tokens > len(self._ids):
            raise ValueError(f"the text has {len(self._ids)} tokens and {tokens} are needed: give a longer text")

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.array(self.encode(self._source))

    @cached_property
    def _first(self) -> list[int]:
        """The token that this tokenizer starts every text with, if it does."""
        ids: list[int] = self._tokenizer("a").input_ids[:1]
        return ids if ids == [self._tokenizer.bos_token_id] else []

    @cached_property
    def _breaks(self) -> np.ndarray:
        """Indices where a sentence or line starts: after a line's end, or a full stop and before a space."""
        kinds, kind = np.unique(self._ids, return_inverse=True)
        pieces = [self._tokenizer.decode([token]) for token in kinds.tolist()]
        line = np.array([piece.rstrip(" ").endswith(("\n", "\u3002", "\uff01", "\uff1f")) for piece in pieces])[kind]
        stop = np.array([piece.endswith((".", "!", "?")) for piece in pieces])[kind]
        space = np.array([piece[:1].isspace() for piece in pieces])[kind]
        found: np.ndarray = np.flatnonzero(line[:-1] | (stop[:-1] & space[1:])) + 1
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def frame(self, question: Question) -> tuple[list[int], list[int]]:
        """The chat template's words and the request around the haystack."""
        request = f"Read the text and remember what is hidden in it.\n\n{SENTINEL}\n\n{question.text}"
        if self._tokenizer.chat_template:
            chat = [{"role": "user", "content": request}]
            whole = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            first = []  # the template has its own
        else:
            whole, first = f"{request}\n", self._first
        before, after = whole.split(SENTINEL)
        return [*first, *self.encode(before)], self.encode(after + question.begin)

    def haystack(self, rng: np.random.Generator, tokens: int) -> list[list[int]]:
        """A stretch of the text from the start of a sentence on, in sentences and lines."""
        ids, breaks = self._stretch(rng, tokens)
        return [piece.tolist() for piece in np.split(ids, breaks)]

    def text(self, rng: np.random.Generator, tokens: int) -> list[int]:
        """A stretch of the text."""
        return [*self._first, *self._stretch(rng, tokens - len(self._first))[0].tolist()]

    def _stretch(self, rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        self.check(tokens)
        starts = self._breaks[self._breaks <= len(self._ids) - tokens]
        start = int(rng.choice(starts)) if len(starts) else int(rng.integers(0, len(self._ids) - tokens + 1))
        breaks = self._breaks[(self._breaks > start) & (self._breaks < start + tokens)] - start
        return self._ids[start : start + tokens], breaks

    def names(self, rng: np.random.Generator, count: int) -> list[str]:
        """Cities; with more than there are, pairs of words."""
        return _words(rng, CITIES if count <= len(CITIES) else PAIRS, count, "names")

    def variables(self, rng: np.random.Generator, count: int) -> list[str]:
        """Pairs of words."""
        return _words(rng, PAIRS, count, "variables")

    def words(self, rng: np.random.Generator, count: int) -> list[str]:
        """Nouns and adjectives, each drawn alone."""
        pool = ADJECTIVES + NOUNS
        return [pool[i] for i in rng.integers(0, len(pool), count)]

    def number(self, rng: np.random.Generator) -> str:
        """Four digits, or seven where a tokenizer has one token for four."""
        number = str(rng.integers(1000, 10000))
        return number if len(self.encode(f" {number}")) > 1 else str(rng.integers(10**6, 10**7))

    def needle(self, name: str, number: str) -> str:
        """A magic number."""
        return f"\nThe magic number of {name} is {number}.\n"

    def one_of(self, name: str, number: str) -> str:
        """One of several magic numbers."""
        return f"\nOne of the magic numbers of {name} is {number}.\n"

    def assign(self, name: str, value: str) -> str:
        """A variable."""
        return f"\nThe value of {name} is {value if value.isdigit() else f'the value of {value}'}.\n"

    def phrase(self, words: Sequence[str]) -> str:
        """Words to remember."""
        return f"\nRemember this phrase: {' '.join(words)}.\n"

    def ask(self, names: Sequence[str], numbers: Sequence[str]) -> Question:
        """The magic numbers of some names."""
        if len(names) == 1:
            begin = f"The magic number of {names[0]} is"
            return Question(f"What is the magic number of {names[0]}?", begin, f" {numbers[0]}.", tuple(numbers))
        pairs = [f"The magic number of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
        text = f"What are the magic numbers of {', '.join(names[:-1])} and {names[-1]}?"
        begin = pairs[0][: -len(numbers[0]) - 2]
        return Question(text, begin, " ".join(pairs)[len(begin) :], tuple(numbers))

    def ask_all(self, name: str, numbers: Sequence[str]) -> Question:
        """All the magic numbers of a name."""
        text = f"What are all the magic numbers of {name}? There are {len(numbers)} of them."
        return Question(text, f"The magic numbers of {name} are", f" {', '.join(numbers)}.", tuple(numbers))

    def trace(self, chain: Sequence[str], number: str) -> Question:
        """All names of a value."""
        text = f"Which {len(chain)} names have the value {number}, directly or through another name?"
        begin = f"The names with the value {number} are {chain[0]},"
        return Question(text, begin, f" {', '.join(chain[1:])}.", tuple(chain[1:]))

    def go_on(self, words: Sequence[str], given: int) -> Question:
        """The rest of the phrase."""
        begin, rest = " ".join(words[:given]), " ".join(words[given:])
        return Question(
            f'How does the phrase that begins with "{begin}" go on?', f"The phrase is: {begin}", f" {rest}", (rest,)
        )


def language_of(tokenizer: Any, text: str | None = None) -> Synthetic | English:
    """The language to examine a model in, by its tokenizer; `text` is the haystack, Python's own reference by default.

    Raises ValueError where a text is given to a model that reads only the grammar's words.
    """
    if Synthetic.spoken_by(tokenizer):
        if text is not None:
            raise ValueError("this model reads only the words of kvlib.eval.grammar: leave the text out")
        return Synthetic(tokenizer)
    return English(tokenizer, default_text() if text is None else text)


def default_text() -> str:
    """A real English text that needs no download: the language reference inside every CPython."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def _of(ids: range) -> tuple[str, ...]:
    return grammar.vocabulary()[ids.start : ids.stop]


def _words(rng: np.random.Generator, pool: Sequence[str], count: int, what: str) -> list[str]:
    if count > len(pool):
        raise ValueError(f"{count} different {what} are needed and there are {len(pool)}: ask for fewer")
    return [pool[i] for i in rng.permutation(len(pool))[:count]]
