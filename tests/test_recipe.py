import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import Recipe, RecipeError
from kvlib.policies import H2O, DuoAttention, H2OPrefill, SnapKV, StreamingLLM

budgets = st.one_of(st.integers(64, 10**6), st.floats(0.01, 1.0))
evictors = st.one_of(
    st.none(),
    st.builds(H2O, budgets, st.booleans()),
    st.builds(H2OPrefill, budgets, st.booleans()),
    st.builds(
        SnapKV,
        budget=budgets,
        adaptive=st.booleans(),
        window=st.integers(1, 99),
        kernel=st.sampled_from([1, 5, 7]),
        pooling=st.sampled_from(["avg", "max"]),
    ),
    st.builds(StreamingLLM, st.integers(0, 99), st.integers(1, 9999), st.booleans()),
)
paths = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
splits = st.one_of(st.none(), st.builds(DuoAttention, st.floats(0, 1), paths, st.integers(0, 99), st.integers(1, 999)))


@given(splits, evictors, st.one_of(st.none(), st.integers(0, 16)))
def test_text_and_dataclass_are_the_same_thing(heads, evict, sink):
    if evict is None or isinstance(evict, StreamingLLM):
        sink = None
    recipe = Recipe(heads=heads, evict=evict, sink=sink)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse(recipe) is recipe


def test_spacing_tier_and_sizes():
    recipe = Recipe.parse(" duo_attention( sparsity = 0.5 )+h2o(budget=256)+ sink=2 + block = 8 @ device ")
    assert recipe == Recipe(DuoAttention(0.5), H2O(256), sink=2, block=8)
    assert Recipe.parse("full") == Recipe()
    assert str(Recipe()) == "full"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h20(budget=1)", ["h20", "did you mean 'h2o'"]),
        ("h2o(budgit=64)", ["h2o", "budgit", "64", "did you mean 'budget'"]),
        ("h2o(budget=0)", ["h2o", "budget=0"]),
        ("h2o(budget=-5)", ["h2o", "budget=-5"]),
        ("h2o(budget=2)", ["h2o", "budget=2", "at least 4"]),
        ("h2o(budget=1.5)", ["h2o", "budget=1.5", "(0, 1]"]),
        ("h2o(budget=0.0)", ["budget=0.0"]),
        ("h2o(budget=nan)", ["budget=nan"]),
        ("h2o(budget=inf)", ["budget=inf"]),
        ("h2o(budget=1e999)", ["budget=1e999"]),
        ("h2o(budget=True)", ["budget=True"]),
        ("h2o(budget=2x6)", ["budget=2x6", "whole number"]),
        ("h2o(budget=1_0e2)", ["budget=1_0e2"]),
        ("h2o(budget=[1)", ["budget=[1"]),
        ("h2o(budget=64, budget=65)", ["budget=65", "twice"]),
        ("h2o(64)", ["h2o", "64", "argument=value"]),
        ("h2o(budget=64", ["h2o(budget=64", "cannot read"]),
        ("snapkv(kernel=4)", ["snapkv", "kernel=4", "odd"]),
        ("snapkv(window=0)", ["window=0"]),
        ("snapkv(pooling=min)", ["pooling=min", "'avg' or 'max'"]),
        ("streaming_llm(recent=0)", ["recent=0"]),
        ("streaming_llm() + sink=4", ["sink=4", "streaming_llm(sink=4)"]),
        ("duo_attention(sparsity=1.2)", ["sparsity=1.2", "0 to 1"]),
        ("h2o(adaptive=1)", ["adaptive=1", "True or False"]),
        ("h2o + snapkv", ["h2o and snapkv", "takes one"]),
        ("duo_attention + duo_attention", ["takes one"]),
        ("snapkv + block=4", ["block=4", "snapkv"]),
        ("full + recent=4", ["recent=4"]),
        ("h2o(budget=64) + sink=60 + recent=60", ["budget=64", "120"]),
        ("h2o + sinc=4", ["sinc", "did you mean 'sink'"]),
        ("h2o + sink=-1", ["sink=-1"]),
        ("host", ["it is a tier", "@ host"]),
        ("h2o @ host(slots=0.5)", ["slots=0.5", "1 or more"]),
        ("full @ host(attend=True, slots=3)", ["slots=3", "leave it out"]),
        ("streaming_llm @ host", ["streaming_llm keeps nothing between", "leave '@ host' out"]),
        ("quest(scope=query_head) @ host", ["scope=query_head", "leave scope out"]),
        ("tokenselect @ host(attend=True)", ["attend=True", "its keys stay on the device"]),
        ("oracle @ host(attend=True)", ["attend=True", "its keys stay on the device"]),
        ("h2o + quest", ["h2o drops single tokens", "h2o_prefill"]),
        ("snapkv(adaptive=True) + clusterkv", ["adaptive=True", "leave it out"]),
        ("snapkv + quest", ["neighbouring tokens", "clusterkv"]),
        ("snapkv + tokenselect", ["scope=layer", "give scope=kv_head"]),
        ("h2o_prefill + sentencekv(r=inf, scope=layer)", ["scope=layer", "give scope=kv_head"]),
        ("snapkv + double_sparsity", ["calibrates on the whole prompt"]),
        ("snapkv + sentencekv(r=2)", ["evicts by itself", "r=inf"]),
        ("quest(budget=40)", ["budget=40", "at least 48"]),
        ("quest(budget=100) + sink=90", ["sink=90", "68 at most"]),
        ("quest(budget=96) + block=10", ["block=10", "multiple"]),
        ("clusterkv(backend=scikit)", ["backend=scikit", "torch"]),
        ("clusterkv(scope=layer)", ["scope=layer", "kv_head"]),
        ("double_sparsity(channels=nowhere.tsv)", ["channels=nowhere.tsv", "kvlib channels identify"]),
        ("quest + lserve", ["selectors", "one choice"]),
        ("h2o @ moon", ["tier", "moon", "device"]),
        ("h2o @ device @ device", ["two tiers"]),
        ("full(budget=3)", ["full", "budget=3"]),
        ("", ["cannot read"]),
        (7, ["7", "string"]),
    ],
)
def test_bad_recipes_name_method_argument_value_and_remedy(text, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_what_exists_is_listed():
    rows = {row["name"]: row for row in kvlib.methods()}
    assert {"full", "h2o", "h2o_prefill", "snapkv", "streaming_llm", "duo_attention"} <= set(rows)
    assert rows["h2o"]["paper"] == "2306.14048"
    assert rows["h2o"]["lossy"]
    assert not rows["full"]["lossy"]
    assert rows["duo_attention"]["role"] == "heads"


def test_roles_take_only_their_own_kind():
    with pytest.raises(RecipeError, match="evict"):
        Recipe(evict=DuoAttention())
    with pytest.raises(RecipeError, match="tier"):
        Recipe(tier="host")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().sink = 4


def test_lossy_is_declared():
    assert not Recipe.parse("full").lossy
    assert not Recipe.parse("h2o(budget=1.0)").lossy
    assert Recipe.parse("h2o(budget=0.99)").lossy
    assert Recipe.parse("duo_attention").lossy
    assert not Recipe.parse("duo_attention(sparsity=0)").lossy


def test_a_name_belongs_to_one_method():
    with pytest.raises(ValueError, match="belongs to H2O"):
        kvlib.register(type("Other", (H2O,), {}))
