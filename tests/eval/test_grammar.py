"""The synthetic language is the one the shipped model was trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvlib.eval import grammar

TOKENIZER = Path(__file__).parent.parent / "data" / "tiny_retriever" / "tokenizer.json"


def test_every_word_has_the_place_the_shipped_tokenizer_gives_it():
    shipped = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    assert {word: i for i, word in enumerate(grammar.vocabulary())} == shipped


@pytest.mark.parametrize("count", [1, 2, 12, 500])
def test_text_has_the_length_asked_for_and_ends_sentences(count):
    sentences = grammar.Text(np.random.default_rng(3), count).tokens(count)
    assert sum(map(len, sentences)) == count
    assert all(sentence[-1] == grammar.DOT for sentence in sentences)
    assert all(word in grammar.WORDS for sentence in sentences for word in sentence[:-1])


def test_sentences_are_of_many_lengths_and_phrases_recur():
    text = grammar.Text(np.random.default_rng(3), 960)
    sentences = [text.sentence() for _ in range(400)]
    assert {len(sentence) for sentence in sentences} == set(range(5, 16))
    fours = [tuple(s[i : i + 4]) for s in sentences for i in range(len(s) - 4)]
    most = max(set(fours), key=fours.count)
    assert fours.count(most) > 20  # a bigram language alone repeats few of 512**4


def test_the_language_is_the_same_for_every_document():
    """Zipf: the commonest word of one document is among the commonest of another."""
    heads = []
    for seed in (1, 2):
        text = grammar.Text(np.random.default_rng(seed), 4000).tokens(4000)
        words, counts = np.unique([w for s in text for w in s if w != grammar.DOT], return_counts=True)
        heads.append(words[counts.argsort()[-20:]])
    assert len(np.intersect1d(*heads)) >= 8
