import numpy as np
import pytest
import torch

from kvlib.segment import Spec
from tests.driver import feed, group_for, held

CARD = [
    [1],
    [0.5, 0.5],
    [0.6, 0.1, 0.3],
    [0.1, 0.1, 0.7, 0.1],
    [0.2, 0.05, 0.6, 0.05, 0.1],
    [0.1, 0.1, 0.5, 0.1, 0.1, 0.1],
]


def test_known_answer_of_the_prompt():
    group = group_for("h2o(budget=5) + sink=0 + recent=2 + block=1")
    feed(group, CARD)
    assert held(group) == [0, 2, 4, 5]
    mass = torch.cat([group.body.fields["mass"][0], group.tail.fields["mass"][0, 0, group.tail.begin : group.tail.end]])
    torch.testing.assert_close(mass, torch.tensor([2.5, 2.1, 0.2, 0.1]), atol=1e-5, rtol=1e-5)


def test_known_answer_of_a_step_shows_accumulation_bias():
    group = group_for("h2o(budget=5) + sink=0 + recent=2 + block=1")
    feed(group, CARD)
    out = feed(group, [[0.05, 0.15, 0.6, 0.1, 0.1]], first=6, positions=[0, 2, 4, 5, 6])
    torch.testing.assert_close(out[0, 0, 0, [0, 2, 4, 5, 6]], torch.tensor([0.05, 0.15, 0.6, 0.1, 0.1]))
    assert held(group) == [0, 2, 5, 6]  # 4 drew most attention in this step, and goes
    torch.testing.assert_close(group.body.fields["mass"][0], torch.tensor([2.55, 2.25]), atol=1e-5, rtol=1e-5)


def test_the_prompt_itself_is_attended_in_full():
    group = group_for("h2o(budget=5) + sink=0 + recent=2 + block=1")
    out = feed(group, CARD)
    for i, row in enumerate(CARD):
        torch.testing.assert_close(out[0, 0, i, : len(row)], torch.tensor(row, dtype=torch.float32))


def test_one_shot_variant_keeps_everything_until_the_prompt_ends_and_all_that_follows():
    group = group_for("h2o_prefill(budget=4) + sink=0 + recent=2")
    feed(group, CARD)
    assert held(group) == [0, 1, 2, 3, 4, 5]
    group.finish_prefill()
    assert held(group) == [0, 2, 4, 5]
    for i in range(6, 30):
        feed(group, [[0.5, 0.5]], first=i, positions=[0, i])
    assert held(group) == [0, 2, *range(4, 30)]


@pytest.mark.parametrize("recipe", ["h2o(budget=16)", "h2o(budget=16) + block=1", "h2o(budget=16, adaptive=True)"])
def test_a_step_never_attends_more_than_the_budget(recipe):
    group = group_for(recipe)
    feed(group, [[1.0 / (i + 1)] * (i + 1) for i in range(30)])
    for i in range(30, 60):
        before = len(held(group))
        assert before + 1 <= 16
        feed(group, [[1.0]], first=i, positions=[i])
        assert held(group)[-1] == i
    assert held(group)[:2] == [0, 1]  # sink = budget / 8


def test_a_fraction_is_frozen_when_the_prompt_ends():
    group = group_for("h2o(budget=0.5)")
    feed(group, [[1.0 / (i + 1)] * (i + 1) for i in range(40)])
    for i in range(40, 64):
        feed(group, [[1.0]], first=i, positions=[i])
        assert len(held(group)) <= 20


def test_queries_of_padding_inside_a_chunk_do_not_vote():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    spec, plain, padded = Spec(0.3), group_for("h2o(budget=64)"), group_for("h2o(budget=64)")
    for group, columns, new in ((plain, 6, None), (padded, 10, np.array([6]))):
        group.forward(q[:, :, :30], k[:, :, :30], v[:, :, :30], None, spec, recording=False)
        last = slice(40 - columns, 40)  # the chunk with padding starts with four columns that are no tokens
        group.forward(q[:, :, last], k[:, :, last], v[:, :, last], new, spec, recording=False)
    masses = [group.tail.fields["mass"][0, 0, group.tail.begin : group.tail.end] for group in (plain, padded)]
    torch.testing.assert_close(masses[1], masses[0])
