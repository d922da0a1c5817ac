"""A small fixed evaluation on the tiny model: the expected order holds, and methods that are broken are caught."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kvlib
from kvlib.candidates import Candidates
from kvlib.eval import evaluate, load
from kvlib.policies import DuoAttention, SnapKV
from kvlib.policies.base import _METHODS

BUDGET = 0.0625
SNAPKV = f"snapkv(budget={BUDGET}, window=8)"
DUO = "duo_attention(sink=4, recent=32)"
TASKS = "niah, multikey(keys=16), multiquery, vt, copy"
FIXED = {"lengths": [768], "samples": 12, "questions": ["aware"], "depths": (0.05, 0.85)}


@pytest.fixture(scope="module")
def loaded():
    return load("tiny")


def mean(results, recipe, task=None):
    scores = [a.score for a in results.answers if a.recipe == recipe and task in (None, a.task)]
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def results(loaded):
    model, tokenizer = loaded
    return evaluate(model, [SNAPKV, DUO, f"h2o(budget={BUDGET})"], TASKS, tokenizer=tokenizer, **FIXED)


def test_the_expected_order_holds(results):
    full, oracle, snapkv, random = (
        mean(results, recipe) for recipe in ("full", f"oracle(budget={BUDGET})", SNAPKV, f"random(budget={BUDGET})")
    )
    assert full >= oracle >= 0.98
    assert oracle - 0.2 > snapkv > random + 0.3
    assert random < 0.1
    for task in ("niah", "multikey(keys=16)"):
        assert mean(results, SNAPKV, task) >= 0.9  # the question's votes find what it asks for


def test_streaming_fails_on_needles_outside_its_window(results):
    (streaming,) = {a.recipe for a in results.answers if a.recipe.startswith("streaming_llm")}
    assert all(mean(results, streaming, task) == 0 for task in ("niah", "multikey(keys=16)", "copy"))
    assert mean(results, f"h2o(budget={BUDGET})", "niah") <= 0.25  # so does what counts votes of the past


def test_oracle_reads_and_evictors_hold_what_they_may(results):
    for cell in results.cells():
        if cell.recipe.startswith("oracle"):
            assert cell.read == pytest.approx(BUDGET, rel=0.05)
            assert cell.held > 1
        elif cell.recipe in (SNAPKV, f"random(budget={BUDGET})"):
            assert cell.held < BUDGET + 0.12  # 64 slots of slack weigh much in 768


def test_selectors_answer_from_a_quarter_and_need_their_scores(loaded, broken):
    """On tasks whose answers take several steps, so that selectors choose for most of them."""

    @dataclass(frozen=True)
    class Backwards(kvlib.policies.Quest):
        """Read the pages that promise least."""

        name: ClassVar[str] = "broken_quest"

        def logits(self, q, index):
            return -super().logits(q, index)

    methods = ["quest", "clusterkv", "tokenselect", "double_sparsity", broken(Backwards)]
    recipes = [f"{name}(budget=0.25, dense_layers=0)" for name in methods]
    model, tokenizer = loaded
    tasks = "niah, multikey(keys=16)"
    found = evaluate(model, ["full", *recipes], tasks, tokenizer=tokenizer, baselines=False, **FIXED)
    *good, bad = (mean(found, str(kvlib.Recipe.parse(recipe))) for recipe in recipes)
    assert mean(found, "full") == 1
    assert min(good) >= 0.95
    assert bad <= 0.5
    reads = [cell.read for cell in found.cells() if cell.recipe != "full"]
    assert reads == pytest.approx([0.25] * len(reads), rel=0.03)


@pytest.fixture
def broken():
    """Register methods for one test."""
    names = []

    def add(cls):
        kvlib.register(cls)
        names.append(cls.name)
        return cls.name

    yield add
    for name in names:
        del _METHODS[name]


def test_keeping_the_wrong_heads_tokens_is_caught(loaded, results, broken):
    @dataclass(frozen=True)
    class Wrong(DuoAttention):
        """Let the heads that retrieve stream, and the others keep everything."""

        name: ClassVar[str] = "wrong_heads"

        def split(self, table, layers):
            return super().split(dataclasses.replace(table, gates=1 - table.gates), layers)

    model, tokenizer = loaded
    recipe = DUO.replace("duo_attention", broken(Wrong))
    found = evaluate(model, [recipe], TASKS, tokenizer=tokenizer, baselines=False, **FIXED)
    assert mean(results, DUO) >= 0.9
    assert mean(found, found.answers[0].recipe) <= 0.2


def test_giving_a_head_what_another_keeps_is_caught(loaded, results, monkeypatch):
    model, tokenizer = loaded
    plain = Candidates.gather

    def mixed_up(self, keep, **more):
        tiles = plain(self, keep, **more)
        if tiles is None:
            return None
        k, v = (x.view(*tiles.counts.shape, *x.shape[1:]).roll(1, 1).reshape(x.shape) for x in (tiles.k, tiles.v))
        return dataclasses.replace(tiles, k=k, v=v)

    monkeypatch.setattr(Candidates, "gather", mixed_up)
    found = evaluate(model, [SNAPKV], "niah, multikey(keys=16)", tokenizer=tokenizer, baselines=False, **FIXED)
    assert mean(found, SNAPKV) <= 0.2


def test_keeping_what_another_row_asks_for_is_caught(loaded, broken):
    @dataclass(frozen=True)
    class Wrong(SnapKV):
        """Rank by the votes of the row before."""

        name: ClassVar[str] = "wrong_row"

        def score(self, view):
            return torch.roll(super().score(view), 1, dims=0)

    model, tokenizer = loaded
    recipe = SNAPKV.replace("snapkv", broken(Wrong))
    found = evaluate(model, [recipe], "niah, multikey(keys=16)", tokenizer=tokenizer, baselines=False, **FIXED)
    assert mean(found, found.answers[0].recipe) <= 0.3
