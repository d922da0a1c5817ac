"""Which tokens end a sentence, and where the borders lie."""

import gc
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvlib import smollm2
from kvlib.policies.select import sentences
from kvlib.policies.select.sentences import borders, is_hard, is_soft, terminators

MODEL = Path(__file__).parent.parent / "data" / "tiny_retriever"
HARD = [".", "!", "?", "...", "…", " .", "?!", "。", "\uff01", "\uff1f", "。」", "……", "\uff1f\uff09", "e.g.", ". ", '."']
HARD += [".\n", "?\n\n", "!\r\n", ".”", ".)", '."""', "].", "\n\n", "\r\n\r\n", "\n   \n  ", "x\n\ny"]
NOT_HARD = ["", " ", "\n", "\r\n", " \n    ", "3.14", ".5", "a", ",", ";", ".,", "?(", "'.join", ".x\n", "-", ":", ")"]
SOFT = [",", ";", ", ", ',"', "),", "\uff0c", "\uff1b", "、", "\n", "\r\n", "\n    ", ".\n"]
NOT_SOFT = ["", ".", "1,000", "a", "(", ":", ";x", "。"]


class Fake:
    """What `terminators` asks of a tokenizer; ids may have holes."""

    def __init__(self, texts, length=None):
        self.texts, self.length, self.reads = texts, len(texts) if length is None else length, 0

    def __len__(self):
        return self.length

    def get_vocab(self):
        return {f"token {i}": i for i in self.texts}

    def batch_decode(self, sequences, skip_special_tokens=True, clean_up_tokenization_spaces=True):
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        self.reads += 1
        return ["".join(self.texts[i] for i in sequence) for sequence in sequences]


class Unhashable(Fake):
    """A tokenizer that no dictionary takes."""

    __hash__ = None


def reference(ends, least, most, soft):
    """The rule, a sentence at a time."""
    found, at = [], 0
    while True:
        allowed = [end for end in range(at + least, at + most + 1) if end <= len(ends)]
        stops, pauses = [end for end in allowed if ends[end - 1]], [end for end in allowed if soft[end - 1]]
        if not stops and at + most > len(ends):
            return found
        at = stops[0] if stops else pauses[-1] if pauses else at + most
        found.append(at)


def flags(*places, length):
    return np.isin(np.arange(length), places)


@st.composite
def texts(draw):
    least = draw(st.integers(1, 6))
    most = draw(st.integers(least, 14))
    m = draw(st.integers(0, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.0, 0.05, 0.2, 1.0]))
    return rng.random(m) < share, least, most, rng.random(m) < draw(st.sampled_from([0.0, 0.1, 0.5]))


def test_a_token_ends_a_sentence_by_its_text():
    assert [text for text in HARD if not is_hard(text)] == []
    assert [text for text in NOT_HARD if is_hard(text)] == []


def test_a_long_sentence_may_be_cut_after_commas_semicolons_and_newlines():
    assert [text for text in SOFT if not is_soft(text)] == []
    assert [text for text in NOT_SOFT if is_soft(text)] == []


def test_ids_are_looked_up_whatever_holes_the_vocabulary_has():
    table = terminators(Fake({0: ".\n", 1: "a", 2: ",", 7: "\uff1f"}))
    hard, soft = table.of(np.array([[1, 0, 2], [7, 5, 8], [-1, 10**6, 0]]))
    assert hard.tolist() == [[False, True, False], [True, False, False], [False, False, True]]
    assert soft.tolist() == [[False, True, True], [False, False, False], [False, False, True]]
    assert table.hard.shape == table.soft.shape == (8,)
    assert terminators(Fake({0: "."}, length=3)).hard.tolist() == [True, False, False]


def test_a_vocabulary_is_read_once_and_again_after_tokens_were_added():
    gc.collect()
    fake, other = Fake({0: "a", 1: "."}), Fake({0: ".", 1: "a"})
    assert terminators(fake) is terminators(fake)
    assert terminators(other).hard.tolist() == [True, False]
    fake.texts[2], fake.length = "?", 3
    assert terminators(fake).hard.tolist() == [False, True, True]
    assert fake.reads == 2
    before = len(sentences._known)
    del fake, other
    gc.collect()
    assert len(sentences._known) == before - 2
    assert terminators(Unhashable({0: "."})).hard.all()


def test_the_tiny_tokenizer_has_one_full_stop():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    table = terminators(tokenizer)
    assert tokenizer.convert_ids_to_tokens(np.flatnonzero(table.hard).tolist()) == ["."]
    assert tokenizer.convert_ids_to_tokens(np.flatnonzero(table.soft).tolist()) == [","]
    ids = np.array(tokenizer("key Roga 12 34 . ask Roga , Taki : . set Futa 5 .").input_ids)
    assert [tokenizer.decode(part) for part in np.split(ids, borders(table.of(ids)[0], 1))[:-1]] == [
        tokenizer.decode(tokenizer(part).input_ids) for part in ("key Roga 12 34 .", "ask Roga , Taki : .", "set Futa 5 .")
    ]


@pytest.mark.skipif(not (smollm2.home() / "smollm2-135m-instruct" / "ready").is_file(), reason="no SmolLM2 here")
def test_english_falls_into_its_sentences():
    tokenizer = AutoTokenizer.from_pretrained(smollm2.home() / "smollm2-135m-instruct")
    began = time.perf_counter()
    table = terminators(tokenizer)
    assert time.perf_counter() - began < 4
    parts = [
        'The first sentence has a "quoted end."',
        " Is the second one a question (yes)?",
        "\n\nA heading that has no full stop\n\n   ",
        " so it ends here, Oh!!!",
        " 「日本語の文です。",
        "\nwhat is left, is open",
    ]
    ids = np.array(tokenizer("".join(parts)).input_ids)
    assert [tokenizer.decode(part) for part in np.split(ids, borders(table.of(ids)[0]))] == parts


def test_borders_known_answers():
    assert borders(flags(4, 9, 14, length=18)).tolist() == [5, 10, 15]
    assert borders(flags(1, 4, 6, 12, length=14)).tolist() == [5, 13]  # two are too short: they go on into the next
    assert borders(flags(3, length=4)).tolist() == [4]
    assert borders(flags(length=0)).tolist() == []
    assert borders(flags(length=130)).tolist() == [64, 128]
    assert borders(flags(length=63)).tolist() == []
    assert borders(flags(63, length=64), soft=flags(40, length=64)).tolist() == [64]
    assert borders(flags(64, length=69), soft=flags(20, 40, 66, length=69)).tolist() == [41, 65]
    assert borders(flags(length=10), 4, 10, soft=flags(2, length=10)).tolist() == [10]  # a cut would leave too few
    assert borders(flags(length=10), 4, 10, soft=flags(3, length=10)).tolist() == [4]
    assert borders(flags(0, 1, length=2), least=1).dtype == np.int64


@settings(max_examples=200)
@given(texts())
def test_borders_follow_the_rule(text):
    ends, least, most, soft = text
    assert borders(ends, least, most, soft).tolist() == reference(ends, least, most, soft)
    assert np.array_equal(borders(ends, least, most), borders(ends, least, most, np.zeros_like(soft)))


@given(texts())
def test_sentences_are_consecutive_and_neither_too_short_nor_too_long(text):
    ends, least, most, soft = text
    found = borders(ends, least, most, soft)
    lengths = np.diff(found, prepend=0)
    assert ((least <= lengths) & (lengths <= most)).all()
    assert len(ends) - (found[-1] if len(found) else 0) < most
    stops = np.flatnonzero(ends) + 1
    for begin, end in zip([0, *found], found, strict=False):
        inside = stops[(stops >= begin + least) & (stops <= end)]
        assert inside.tolist() in ([], [end])


@given(texts(), st.data())
def test_text_that_comes_in_pieces_has_the_borders_of_the_whole(text, data):
    ends, least, most, soft = text
    whole = borders(ends, least, most, soft).tolist()
    found, at, seen = [], 0, 0
    while seen < len(ends):
        seen = min(seen + data.draw(st.integers(1, 30)), len(ends))
        found += (at + borders(ends[at:seen], least, most, soft[at:seen])).tolist()
        at = found[-1] if found else 0
    assert found == whole


def test_limits_that_contradict_each_other_are_refused():
    for least, most in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match=f"least={least}, most={most}: give"):
            borders(flags(length=8), least, most)


def test_a_long_text_takes_little_time():
    rng = np.random.default_rng(0)
    for share in (1.0, 0.05, 0.0):
        ends, took = rng.random(32768) < share, []
        for _ in range(20):
            began = time.perf_counter()
            borders(ends, 1, 64, ~ends)
            took.append(time.perf_counter() - began)
        assert min(took) < 0.01
