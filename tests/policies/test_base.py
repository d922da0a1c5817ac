import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvlib.policies import H2O, SnapKV
from kvlib.policies.base import Sizes, shares

size = st.one_of(st.none(), st.integers(0, 50))


@given(
    st.lists(st.integers(4, 300), min_size=1, max_size=4),
    size,
    size,
    st.one_of(st.none(), st.integers(1, 50)),
    st.booleans(),
)
def test_shares_add_up_to_the_budget_and_are_never_negative(budget, sink, recent, block, online):
    budget = np.array(budget)
    split = shares(budget, Sizes(sink, recent, block if online else None), block=16 if online else 0)
    assert (split.total == budget).all()
    for part in (split.sink, split.recent, split.block, split.body):
        assert (part >= 0).all()
    assert (split.block >= 1).all() == online


@given(st.integers(8, 5000))
def test_the_house_rule(budget):
    for method in (H2O(budget), SnapKV(budget)):
        split = method.split(np.array([777]), Sizes())
        assert split.sink[0] <= budget / 8
        assert split.recent[0] <= budget / 2
        assert split.block[0] <= budget / 4
        assert split.total[0] == budget
    assert SnapKV(budget).split(np.array([777]), Sizes()).recent[0] == min(32, budget // 2)


def test_a_fraction_is_of_each_row_and_never_below_the_minimum():
    assert H2O(0.25).tokens(np.array([400, 1000, 3])).tolist() == [100, 250, 4]
    assert H2O(64).tokens(np.array([400, 1000, 3])).tolist() == [64, 64, 64]
