"""Answers are written, read and summed up as they are."""

import math

import pytest

from kvlib.eval.results import Answer, Journal, Results, wilson

SETTINGS = {"format": 1, "model": "m", "seed": 0}


def answer(sample=0, recipe="full", task="niah", question="aware", **more):
    measured = {"nbytes": 50, "full_nbytes": 100, "read": 0.5, "prefill_s": 1.0, "decode_s": 0.1}
    return Answer(recipe, task, 64, question, sample, **{**measured, **more})


def test_wilson_intervals_are_the_published_ones():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_cells_are_means_with_intervals():
    scored = [answer(i, score=float(i < 3), nbytes=10 * (i + 1)) for i in range(4)]
    continued = [answer(i, task="continuation", question="", nll=1.0 + i, kl=0.1 * i, agreement=0.5) for i in range(2)]
    first, second = Results(SETTINGS, [], scored + continued).cells()
    assert (first.value, first.count, first.held) == (0.75, 4, 0.25)
    assert (first.low, first.high) == wilson(0.75, 4)
    assert second.value == pytest.approx(math.exp(1.5))
    error = 1.96 * math.sqrt(0.5 / 2)
    assert (second.low, second.high) == pytest.approx((math.exp(1.5 - error), math.exp(1.5 + error)))
    assert second.kl == pytest.approx(0.05)
    assert second.agreement == 0.5


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.gz"])
def test_what_is_saved_is_loaded(tmp_path, name):
    given = Results(SETTINGS, [{"torch": "1"}], [answer(0, score=1.0, references=("a",)), answer(1, question="", kl=0.5)])
    given.save(tmp_path / name)
    assert Results.load(tmp_path / name) == given


def test_a_journal_goes_on_after_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, SETTINGS, {"torch": "1"}).add([answer(0), answer(1)])
    whole = path.read_text()
    path.write_text(whole[:-20])
    again = Journal(path, SETTINGS, {"torch": "2"})
    assert [a.sample for a in again.results.answers] == [0]
    again.add([answer(1)])
    found = Results.load(path)
    assert [a.sample for a in found.answers] == [0, 1]
    assert found.runs == [{"torch": "1"}, {"torch": "2"}]
    assert len(path.read_text().splitlines()) == 5


def test_a_journal_of_other_settings_is_left_alone(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, SETTINGS, {}).add([answer(0)])
    before = path.read_text()
    with pytest.raises(ValueError, match=r"seed=0, this is seed=1: give another folder"):
        Journal(path, {**SETTINGS, "seed": 1}, {})
    assert path.read_text() == before
    path.write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="not an evaluation"):
        Results.load(path)
