import torch

from kvlib.policies.evict.snapkv import pooled
from tests.driver import SIZE, feed, group_for, held

VOTES = torch.tensor([[[5.0, 0, 0, 0, 8, 0, 0, 0, 0, 3]]])


def test_known_answers_of_the_pooling():
    average = pooled(VOTES, 3, "avg")[0, 0]
    expected = torch.tensor([5, 5, 0, 8, 8, 8, 0, 0, 3, 3]) / 3
    torch.testing.assert_close(average, expected)
    assert pooled(VOTES, 3, "max")[0, 0].tolist() == [5, 5, 0, 8, 8, 8, 0, 0, 3, 3]


def prompt(window_rows, n):
    """n prompt queries that look at themselves, but for the last, which vote as told."""
    plain = [[1e-6] * i + [1.0] for i in range(n - len(window_rows))]
    return plain + window_rows


def test_known_answer_of_the_choice():
    votes = [5 / 16, 1e-9, 1e-9, 1e-9, 8 / 16, 1e-9, 1e-9, 1e-9, 1e-9, 3 / 16]
    for pooling in ("avg", "max"):
        group = group_for(f"snapkv(budget=6, window=2, kernel=3, pooling={pooling}) + sink=0")
        feed(group, prompt([[*votes, 1e-9], [*votes, 1e-9, 1e-9]], 12))
        group.finish_prefill()
        assert held(group) == [0, 3, 4, 5, 10, 11]  # 0 beats 1 by the tie rule


def test_first_generated_token_sees_the_whole_prompt_only_before_the_cut():
    group = group_for("snapkv(budget=6, window=2, kernel=1) + sink=0")
    out = feed(group, prompt([[0.1] * 10, [0.05] * 20], 20))
    assert (out[0, 0, -1, :20] > 0.04).all()
    feed(group, [[1.0]], first=20, positions=[20])
    assert len(held(group)) == 7


def test_a_short_prompt_is_left_alone():
    group = group_for("snapkv(budget=20, window=4)")
    feed(group, prompt([], 20))
    group.finish_prefill()
    assert held(group) == list(range(20))
    assert group.body is None


def test_needle_that_only_the_window_sees_is_kept_at_any_depth():
    for depth in range(3, SIZE - 8, 7):
        group = group_for("snapkv(budget=13, window=6, kernel=5) + sink=0")
        row = [1e-6] * 58
        row[depth] = 1.0
        feed(group, prompt([row + [1e-6] * i for i in range(6)], SIZE))
        group.finish_prefill()
        assert depth in held(group)


def test_window_queries_come_from_several_chunks():
    rows = prompt([[0.5 if j == 7 else 1e-6 for j in range(i + 1)] for i in range(40, 48)], 48)
    whole, parts = (group_for("snapkv(budget=16, window=8)") for _ in range(2))
    feed(whole, rows)
    for i in range(0, 48, 5):
        feed(parts, rows[i : i + 5], first=i)
    for group in (whole, parts):
        group.finish_prefill()
    assert held(whole) == held(parts)
    assert 7 in held(parts)


def test_no_more_queries_vote_than_are_kept():
    """A small budget halves the window: recent <= budget / 2, and only those queries vote."""
    rows = prompt([[0.5 if j == i % 9 else 1e-6 for j in range(i + 1)] for i in range(20, 52)], 52)
    wide, narrow = group_for("snapkv(budget=16, window=32)"), group_for("snapkv(budget=16, window=8)")
    for group in (wide, narrow):
        feed(group, rows)
        group.finish_prefill()
    assert held(wide) == held(narrow)
