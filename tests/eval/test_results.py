"""Answers are written, read and summed up as they are."""

import math
from pathlib import Path

import pytest

from kvlib.eval import load, parse_tasks
from kvlib.eval.language import language_of
from kvlib.eval.results import Answer, Journal, Results, wilson

SETTINGS = {"format": 2, "model": "m", "seed": 0}


def answer(sample=0, recipe="full", task="niah", question="aware", **more):
    measured = {"nbytes": 50, "full_nbytes": 100, "read": 0.5, "read_s": 1.0, "own_s": 0.1, "prompt": "0"}
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


def begun(path, settings=SETTINGS, sources=None, **run):
    journal = Journal(path)
    journal.begin(settings, run, sources or {})
    return journal


def test_a_journal_goes_on_after_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl"
    begun(path, torch="1").add([answer(0), answer(1)])
    whole = path.read_text()
    path.write_text(whole[:-20])
    again = begun(path, torch="2")
    assert [a.sample for a in again.results.answers] == [0]
    assert path.read_text() == whole[:-20]  # nothing is written before there are answers
    again.add([answer(1)])
    again.add([answer(2)])
    found = Results.load(path)
    assert [(a.sample, a.run) for a in found.answers] == [(0, 0), (1, 1), (2, 1)]
    assert [run["torch"] for run in found.runs] == ["1", "2"]
    assert found == again.results
    assert len(path.read_text().splitlines()) == 6


def test_a_journal_of_other_settings_is_left_alone(tmp_path):
    path = tmp_path / "answers.jsonl"
    begun(path).add([answer(0)])
    before = path.read_text()
    with pytest.raises(ValueError, match=r"seed=0, this is seed=1: give another folder"):
        begun(path, {**SETTINGS, "seed": 1})
    assert path.read_text() == before


def test_a_recipe_that_has_changed_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    begun(path, sources={"mine": "a", "full": "b"}).add([answer(0)])
    begun(path, sources={"full": "b", "new": "c"})
    with pytest.raises(ValueError, match="mine has changed since it answered"):
        begun(path, sources={"mine": "d"})


@pytest.mark.parametrize("content", ["", "notes", '{"other": 1}\n', '{"settings": {"format": 1}}\n'])
def test_files_of_another_kind_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="not an evaluation of format 2"):
        Journal(path)
    assert path.read_text() == content


def test_settings_without_answers_bind_nobody(tmp_path):
    path = tmp_path / "answers.jsonl"
    Results(SETTINGS).save(path)
    begun(path, {**SETTINGS, "seed": 1}).add([answer(0)])
    found = Results.load(path)
    assert found.settings["seed"] == 1
    assert len(found.answers) == len(found.runs) == 1


def test_a_single_continuation_has_no_interval():
    (cell,) = Results(SETTINGS, [], [answer(task="continuation", question="", nll=1.0, kl=0.1, agreement=0.5)]).cells()
    assert math.isnan(cell.low) and math.isnan(cell.kl_error)
    assert cell.value == pytest.approx(math.e)


def test_the_published_answers_are_to_the_questions_asked_today():
    """Or else the figures in the documentation could not be made again."""
    results = Results.load(Path(__file__).parents[2] / "bench" / "results" / "eval-tiny" / "answers.jsonl.gz")
    language = language_of(load("tiny")[1])
    prompts = {(a.task, a.length, a.sample): a.prompt for a in results.answers if a.length == 1024 and a.sample in (0, 31)}
    assert len(prompts) == 2 * 7
    for (task, length, index), prompt in prompts.items():
        assert parse_tasks(task)[0].sample(language, length, results.settings["seed"], index, (0.0, 1.0)).digest == prompt
