"""The synthetic language that the tiny retrieval model speaks: its words, its sentences, its statements and questions.

    filler       w w w w .                     Zipf unigrams, sparse bigrams, phrases that recur in a document
    needle       key K a b .                   K one of 256 names; a, b two of 100 numbers
    query        ask K                         -> a b .
    multi-query  list K1 K2 :                  -> K1 a b K2 c d .
    multi-value  several needles of one K; all K   -> a b , c d .     in order of appearance
    variables    set X a b . ... set Y X .     trace Y -> X a b .     eval Y -> a b .
    copy         copy r r r r .                paste r r -> r r .

Words are separated by spaces; the model's tokenizer gives each its place in `vocabulary()`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SPECIAL = (
    "<pad> <bos> <eos> . <nl> , : key ask list all set trace eval copy paste".split() + [f"<r{i}>" for i in range(16)]
)  # fmt: skip
PAD, BOS, EOS, DOT, NL, COMMA, COLON, KEY, ASK, LIST, ALL, SET, TRACE, EVAL, COPY, PASTE = range(16)
NAMES = range(32, 288)
NUMBERS = range(288, 388)
WORDS = range(388, 900)
SIZE = 1024
LONGEST = 12  # words of a sentence, before phrases

_SUCCESSORS = 6
_SEED_OF_WORDS, _SEED_OF_BIGRAMS = 12345, 777  # with others it is another language


@lru_cache
def vocabulary() -> tuple[str, ...]:
    """The word behind every id: special words, capitalised names, two-digit numbers, filler words, unused ones."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    rng = np.random.default_rng(_SEED_OF_WORDS)
    taken = set(SPECIAL)

    def word(least: int, most: int) -> str:
        while True:
            made = "".join(syllables[i] for i in rng.integers(0, len(syllables), int(rng.integers(least, most + 1))))
            if made not in taken:
                taken.add(made)
                return made

    words = [*SPECIAL]
    words += [word(2, 2).capitalize() for _ in NAMES]
    words += [f"{i:02d}" for i in range(len(NUMBERS))]
    words += [word(1, 3) for _ in WORDS]
    return (*words, *(f"<u{i}>" for i in range(SIZE - len(words))))


class Text:
    """Endless filler of one document: sentences of 4 to 12 words, half of them with one of the document's own phrases.

    length: the document's tokens, which decide how many phrases it has.
    """

    def __init__(self, rng: np.random.Generator, length: int):
        self._rng = rng
        self._phrases = rng.integers(0, len(WORDS), (max(2, length // 96), 4)) + WORDS.start
        self._ready: list[list[int]] = []
        self._ahead = max(8, length // 8)

    def sentence(self) -> list[int]:
        """The next sentence, its full stop included."""
        if not self._ready:
            self._ready = _sentences(self._rng, self._ahead)
        words = self._ready.pop()
        if self._rng.random() < 0.5:  # early phrases recur more often
            phrase = self._phrases[int(self._rng.random() ** 2 * len(self._phrases))]
            at = 1 + int(self._rng.random() * (len(words) - 2))
            words = [*words[:at], *phrase.tolist(), *words[at + 2 :]]
        return [*words, DOT]

    def tokens(self, count: int) -> list[list[int]]:
        """Sentences of exactly `count` tokens in all; the last one may be short."""
        found: list[list[int]] = []
        while count > 0:
            sentence = self.sentence()
            if len(sentence) > count:
                sentence = [*sentence[: count - 1], DOT]
            found.append(sentence)
            count -= len(sentence)
        return found


@lru_cache
def _bigrams() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cumulative word frequencies, the successors [words, 6] of each word and their cumulative frequencies."""
    frequency = 1 / np.arange(1, len(WORDS) + 1)
    successors = np.random.default_rng(_SEED_OF_BIGRAMS).integers(0, len(WORDS), (len(WORDS), _SUCCESSORS))
    rank = 1 / np.arange(1, _SUCCESSORS + 1)
    return np.cumsum(frequency / frequency.sum()), successors, np.cumsum(rank / rank.sum())


def _sentences(rng: np.random.Generator, count: int) -> list[list[int]]:
    """`count` sentences without phrases or full stops."""
    frequency, successors, rank = _bigrams()

    def draw(cumulative: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(cumulative, rng.random(count)), len(cumulative) - 1)

    words = [draw(frequency)]
    for _ in range(LONGEST - 1):
        following, jump = successors[words[-1], draw(rank)], draw(frequency)
        words.append(np.where(rng.random(count) < 0.25, jump, following))
    lengths = rng.integers(4, LONGEST + 1, count)
    table = np.stack(words, 1) + WORDS.start
    return [row[:n].tolist() for row, n in zip(table, lengths, strict=True)]
