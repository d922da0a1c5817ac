"""Sentences by token id: which tokens end one, read from their decoded text once, and where the borders then lie."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

_CLOSERS = (
    " \t\r\n\v\f\u00a0\u3000\"'\u2019\u201d\u00bb\u203a)]}\uff02\uff07\uff09\uff3d\uff5d\u300d\u300f\u3009\u300b\u3011"
)
_STOPS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
_PAUSES = (",", ";", "\uff0c", "\uff1b", "\u3001")
_BLANK_LINE = re.compile(r"\n\s*[\r\n]")

# Whatever counts as a tokenizer may not be hashable or weakly referable; such a one is read anew each time.
_known: weakref.WeakKeyDictionary[Any, tuple[int, Terminators]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Terminators:
    """Which ids of a vocabulary end a sentence (`hard`) or are where a long one may be cut (`soft`): bool [ids] each.

    A token is judged by its own text: one that ends in a full stop counts even where a digit follows, and a blank line
    counts only as one token.
    """

    hard: np.ndarray
    soft: np.ndarray

    def of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ends, soft) of tokens with these ids, bool of the same shape, for `borders`; an id that the vocabulary does not
        have is neither."""
        known = (ids >= 0) & (ids < len(self.hard))
        place = np.where(known, ids, 0)
        return self.hard[place] & known, self.soft[place] & known


def terminators(tokenizer: Any) -> Terminators:
    """The terminators of a Hugging Face tokenizer, read once per tokenizer and again after tokens were added to it."""
    size = len(tokenizer)
    try:
        known = _known.get(tokenizer)
    except TypeError:
        return _read(tokenizer, size)
    if known is None or known[0] != size:
        known = _known[tokenizer] = (size, _read(tokenizer, size))
    return known[1]


def _read(tokenizer: Any, size: int) -> Terminators:
    ids = sorted(set(tokenizer.get_vocab().values()))  # may have holes, and go on behind them
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    hard, soft = np.zeros((2, max(size, ids[-1] + 1)), dtype=bool)
    hard[ids] = [is_hard(text) for text in texts]
    soft[ids] = [is_soft(text) for text in texts]
    return Terminators(hard, soft)


def is_hard(text: str) -> bool:
    """Whether a token of this text ends a sentence: it ends in . ! ? or an ellipsis or their CJK forms, but for spaces,
    newlines and closing quotes and brackets, or it has a blank line in it."""
    return text.rstrip(_CLOSERS).endswith(_STOPS) or _BLANK_LINE.search(text) is not None


def is_soft(text: str) -> bool:
    """Whether a sentence that is too long may be cut after a token of this text: a comma, a semicolon, or a newline."""
    return text.rstrip(_CLOSERS).endswith(_PAUSES) or "\n" in text


def borders(ends: np.ndarray, least: int = 4, most: int = 64, soft: np.ndarray | None = None) -> np.ndarray:
    """Exclusive ends of all complete sentences among consecutive tokens, int64, ascending; the rest is the open sentence.

    ends [m] bool: tokens that end a sentence, from a border on.
    least, most: a sentence shorter than `least` tokens goes on into the next; one without an end in its first `most`
        tokens is cut there, after the last of them marked in `soft` [m] that leaves it `least`, if there is one.

    Where a sentence ends depends on its first `most` tokens alone, so text segmented piece by piece, each time from the
    last border on, has the borders of the whole.  Raises ValueError where not 1 <= least <= most.
    """
    if not 1 <= least <= most:
        raise ValueError(f"least={least}, most={most}: give 1 <= least <= most")
    m = len(ends)
    begin = np.arange(m + 1)
    first, last = begin + least, begin + most
    stops = np.append(np.flatnonzero(ends) + 1, m + most + 1)
    stop = stops[np.searchsorted(stops, first)]  # the first end from `first` on; beyond `last`: none
    pauses = np.zeros(1, dtype=np.int64) if soft is None else np.append(0, np.flatnonzero(soft) + 1)
    pause = pauses[np.searchsorted(pauses, last, side="right") - 1]  # the last one up to `last`
    cut = np.where(pause >= first, pause, last)
    # The end of a sentence for every place where one might begin: what is left is to go from each to the next.
    end = np.where(stop <= last, stop, np.where(last <= m, cut, m + 1)).tolist()
    found, at = [], end[0]
    while at <= m:
        found.append(at)
        at = end[at]
    return np.array(found, dtype=np.int64)
