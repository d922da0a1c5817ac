"""Every method passes the public suite, and the suite catches methods that do not deserve it."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kvlib
from kvlib.policies import BudgetedEvictor
from kvlib.policies.base import _METHODS, Needs
from kvlib.testing import CHECKS, check_policy, tiny_model

RECIPES = [
    "full",
    "h2o(budget=32)",
    "h2o(budget=0.25)",
    "h2o(budget=32, adaptive=True)",
    "h2o(budget=32) + block=1 + sink=0",
    "h2o_prefill(budget=32)",
    "h2o_prefill(budget=0.3, adaptive=True)",
    "snapkv(budget=32, window=8)",
    "snapkv(budget=0.3, window=8, adaptive=True)",
    "random(budget=32)",
    "random(budget=0.25, adaptive=True)",
    "oracle(budget=0.25)",
    "streaming_llm(sink=4, recent=24)",
    "streaming_llm(sink=4, recent=24, exact=True)",
    "duo_attention(sparsity=0.5, sink=4, recent=16)",
    "duo_attention(sparsity=0.5, sink=4, recent=16, exact=True) + h2o(budget=32)",
    "duo_attention(sparsity=0.34, sink=4, recent=16) + snapkv(budget=32, window=8, adaptive=True)",
    "duo_attention(sparsity=1.0, sink=4, recent=16) + streaming_llm(sink=1, recent=9)",
]


SELECTORS = [
    "oracle(budget=16)",
    "quest(budget=24, page=4)",
    "clusterkv(budget=24, cluster=6)",
    "sentencekv(budget=24, r=inf)",
    "tokenselect(budget=24)",
    "double_sparsity(budget=24, factor=2)",
]
SPLIT = "duo_attention(sparsity=0.5, sink=4, recent=16)"
TIERS = ["", " @ host", " @ host(attend=True)"]
RECIPES += [split + selector + tier for selector in SELECTORS for split in ("", SPLIT + " + ") for tier in TIERS]
RECIPES = [r for r in RECIPES if not ("attend" in r and ("oracle" in r or "tokenselect" in r))]  # refused: test_recipe.py
RECIPES += [
    evictor + tier
    for evictor in ("full", SPLIT, "h2o(budget=24)", "h2o(budget=24, adaptive=True)", "snapkv(budget=24, window=8)")
    for tier in TIERS[1:]
]
RECIPES += [
    "quest(budget=0.25, page=4, every=3)",
    "oracle(budget=0.3) @ host",  # rows of different length have different room
    "tokenselect(budget=0.25) @ host",
    "clusterkv(budget=0.3, cluster=6) @ host",
    "sentencekv(budget=0.3, r=inf) @ host(attend=True)",
    "quest(budget=24, page=8, logical=2, scope=query_head)",
    "quest(budget=24, page=4, scope=layer, bounds=meanstd)",
    "lserve(budget=24, page=8, logical=2, sink=4, recent=16)",
    "lserve(budget=24, page=8, logical=2, sink=4, recent=16) @ host",
    "clusterkv(budget=0.25, cluster=6, estimate=True) @ host",
    "clusterkv(budget=0.25, cluster=6, scope=query_head)",
    "sentencekv(budget=24)",
    "sentencekv(budget=0.25, r=2, theta=0.8) @ host",
    "tokenselect(budget=24, theta=0.5, scope=kv_head)",
    "snapkv(budget=0.6, window=8) + clusterkv(budget=24, cluster=6) @ host",
    "h2o_prefill(budget=0.6) + oracle(budget=16)",
    "clusterkv(budget=24, cluster=6) + sink=2 + recent=5 + block=7",
    "full + sink=2 + recent=9 + block=5 @ host",
]

RECIPES += [  # segments merge while decoding; pages are picked
    "gear_l(bits=2, group=2, recent=8) + block=2",
    "gear(bits=4, group=2, s=0.25, recent=8) + block=8 @ host",
    "quest(budget=40, page=2) + gear_l(bits=2, group=2) + block=2 @ host",
    "quest(budget=24, page=4) + lossless(page=4) @ host",
    "landmarks(budget=32, chunk=2, outliers=3)",
]
RECIPES += [  # codecs of single tokens under evictors that go on evicting
    "h2o(budget=32) + kv4",
    "h2o(budget=32, adaptive=True) + rotated(bits=3) @ host",
    "h2o(budget=32) + kv(k='kv8', v='rotated(bits=2, levels=lloyd_max)')",
    f"{SPLIT} + h2o(budget=32) + kv8 @ host(attend=True)",
    "window(budget=0.3)",
    "window(budget=32) + mustafar",
    "accllm(sink=2, window=30)",
]
RECIPES += [  # codecs, under every kind of selector and evictor, on every tier
    "kv4(recent=8) + block=8",
    "kv4(recent=8, smooth=0.5) + block=8",
    "kivi(bits=2, group=8, recent=16) + block=8",
    "kivi(k_bits=2, v_bits=4, group=8, recent=16) + block=8 @ host",
    "gear(bits=2, group=8, recent=16, s=0.2) + block=8",
    "gear(bits=4, recent=16, s=0.2) + block=64 @ host",
    "gear_l(bits=2, group=8, recent=8) + block=8 @ host(attend=True)",
    "rotated(bits=3, recent=8) + block=8",
    "rotated(bits=2, levels=lloyd_max, recent=8) + block=8",
    "mustafar(recent=8) + block=8",
    "hierarchical(group=8, recent=8) + block=8 @ host",
    "clusterkv(budget=24, cluster=6) + kv4 @ host",
    "clusterkv(budget=24, cluster=6) + kivi(group=4)",
    f"{SPLIT} + clusterkv(budget=48, cluster=6) + gear(bits=4, group=4, s=0.1) @ host",
    "quest(budget=24, page=4) + rotated(bits=3) @ host(attend=True)",
    "snapkv(budget=40, window=8) + kivi(group=8)",
    "h2o_prefill(budget=40) + gear(bits=2, group=8, s=0.2) @ host",
    "oracle(budget=24) + kivi(group=4)",
    "tokenselect(budget=24) + mustafar @ host",
    "sentencekv(budget=24, r=inf) + kv8",
    "quest(budget=24, page=8, logical=2, scope=query_head) + gear(bits=2, group=8, s=0.2)",
    "quest(budget=24, page=4, scope=layer) + kivi(group=8)",
    'kv(k="kivi(bits=2, group=8)", v="kv4", where="0: full; 1.1: kv8", recent=8) + block=8',
    "lossless(page=8, recent=8) + block=8 @ host",
    'kv(k="lossless(page=8)", v="kivi(bits=4)", recent=8) + block=8 @ host',
    "low_rank(rank=12, chunk=4, recent=8) + block=8",
    "shadowkv(budget=32, rank=16, chunk=4, outliers=2)",
    f"{SPLIT} + shadowkv(budget=32, rank=12, chunk=4, outliers=2)",
    "landmarks(budget=24, chunk=4, outliers=1) + kv4 @ host(attend=True)",
    'kv(k="low_rank(rank=12, chunk=4)", v="gear(bits=4, s=0.2)", recent=8) + block=24 @ host(attend=True)',
    "quest(budget=24, page=4) + low_rank(rank=16, chunk=4)",
    "clusterkv(budget=24, cluster=6) + low_rank(rank=16, chunk=4)",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_passes(recipe):
    assert check_policy(recipe) == [check.__name__ for check in CHECKS]


def test_every_registered_method_is_in_the_list():
    written = " ".join(RECIPES)
    assert all(row["name"] in written for row in kvlib.methods() if not row["name"].startswith("broken"))


@pytest.fixture
def broken():
    """Register a method for one test."""

    def add(cls):
        kvlib.register(cls)
        return cls

    before = dict(_METHODS)
    yield add
    _METHODS.clear()
    _METHODS.update(before)


@dataclass(frozen=True)
class Norms(BudgetedEvictor):
    """Keep the keys of smallest norm."""

    name: ClassVar[str] = "broken_norms"

    def score(self, view):
        return -view.keys.norm(dim=-1)


def test_a_newcomers_method_passes(broken):
    broken(Norms)
    check_policy("broken_norms(budget=32)")


def test_a_method_that_looks_at_its_neighbours_is_caught(broken):
    @dataclass(frozen=True)
    class Gossip(Norms):
        """Score by the whole batch."""

        name: ClassVar[str] = "broken_gossip"

        def score(self, view):
            return super().score(view).sum(0, keepdim=True).expand_as(view.positions)

    broken(Gossip)
    with pytest.raises(AssertionError, match="contract 3"):
        check_policy("broken_gossip(budget=32)")


def test_a_method_that_claims_chunks_do_not_matter_is_caught(broken):
    @dataclass(frozen=True)
    class Claims(kvlib.policies.H2O):
        """H2O that says chunks do not matter."""

        name: ClassVar[str] = "broken_claims"
        chunk_invariant: ClassVar[bool] = True

    broken(Claims)
    with pytest.raises(AssertionError, match="chunk"):
        check_policy("broken_claims(budget=32)")


def test_a_method_that_evicts_at_full_budget_is_caught(broken):
    @dataclass(frozen=True)
    class Greedy(Norms):
        """Evicts whatever the budget."""

        name: ClassVar[str] = "broken_greedy"

        def unlimited(self):
            return dataclasses.replace(self, budget=0.9)

    broken(Greedy)
    with pytest.raises(AssertionError, match="contract 1"):
        check_policy("broken_greedy(budget=32)")


def test_a_method_that_remembers_is_caught(broken):
    calls = []

    @dataclass(frozen=True)
    class Remembers(Norms):
        """Scores by how often it was asked."""

        name: ClassVar[str] = "broken_remembers"
        needs: ClassVar[Needs] = Needs()

        def score(self, view):
            calls.append(1)
            return torch.rand(view.positions.shape, generator=torch.Generator().manual_seed(len(calls)))

    broken(Remembers)
    with pytest.raises(AssertionError):
        check_policy("broken_remembers(budget=32)")


def test_a_budget_that_evicts_nothing_is_no_test():
    with pytest.raises(ValueError, match="evicts nothing"):
        check_policy("snapkv(budget=500)")


def test_another_model_can_be_given():
    check_policy("h2o(budget=32)", tiny_model("Qwen2", num_attention_heads=6, num_key_value_heads=3))
