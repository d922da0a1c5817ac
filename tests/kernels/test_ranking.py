import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.kernels.ranking import best, best_shared


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 25), st.integers(0, 2**20 - 1))
def test_higher_scores_then_lower_positions(scores, budget, bits):
    valid = [bool(bits >> i & 1) for i in range(len(scores))]
    keep = best(torch.tensor([[scores]]), torch.tensor([[valid]]), torch.tensor([budget]))[0, 0].tolist()
    order = sorted((i for i in range(len(scores)) if valid[i]), key=lambda i: (-scores[i], i))
    assert keep == [i in order[:budget] for i in range(len(scores))]


def test_rows_have_their_own_budgets():
    score = torch.arange(6.0).expand(2, 1, 6)
    keep = best(score, torch.ones(2, 1, 6, dtype=torch.bool), torch.tensor([1, 4]))
    assert keep.sum(-1).flatten().tolist() == [1, 4]


def test_heads_share_by_score_above_a_floor():
    score = torch.tensor([[[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0], [-1.0] * 10]])
    valid = torch.ones(1, 2, 10, dtype=torch.bool)
    keep = best_shared(score, valid, torch.tensor([5]), floor=0.2)
    assert keep.sum(-1).tolist() == [[9, 1]]  # ten tokens in all, one of them sure for the second head
    assert keep[0, 1].tolist() == [True] + [False] * 9
    few = valid.clone()
    few[0, 0, 3:] = False
    assert best_shared(score, few, torch.tensor([5])).sum(-1).tolist() == [[3, 7]]
