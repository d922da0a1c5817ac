"""From scores of units to the tokens that are read: the order, the votes, and what fits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.selection import list_runs, list_units, taken, top, vote

INF, NAN = float("inf"), float("nan")
# Of the card of TokenSelect: two heads of one group.
SCORES = torch.tensor([[[10.0, 0, 0, 9], [0, 1, 1.2, 0]]])
VOTES = torch.tensor([[[0.8554, 0.3382, 0.4131, 0.3933]]])


# ---------------------------------------------------------------------------------------------------------------- top
scores = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**127, -(2.0**127), -INF, NAN]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@settings(max_examples=300)
@given(st.data())
def test_the_best_are_those_of_a_stable_sort(data):
    """NaN counts as -inf."""
    units = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(scores, min_size=units, max_size=units), min_size=1, max_size=3))
    k = data.draw(st.integers(0, units))
    wanted = [sorted(range(units), key=lambda i: INF if math.isnan(row[i]) else -row[i])[:k] for row in rows]
    assert top(torch.tensor(rows), k).tolist() == wanted


def test_ties_go_to_the_lower_index_whatever_the_sign_of_zero():
    assert top(torch.tensor([0.0, -0.0, 0.0, -0.0]), 4).tolist() == [0, 1, 2, 3]
    assert top(torch.tensor([-0.0, 0.0, 1.0, 1.0]), 3).tolist() == [2, 3, 0]
    assert top(torch.full((1000,), 0.1), 999).tolist() == list(range(999))


def test_what_is_hidden_and_what_is_no_number_comes_last():
    assert top(torch.tensor([NAN, -3e38, -INF, -1.0]), 2).tolist() == [3, 1]
    assert top(torch.tensor([-INF, NAN, -INF]), 3).tolist() == [0, 1, 2]
    assert top(torch.tensor([1.0, INF, 2.0]), 3).tolist() == [1, 2, 0]


def test_every_row_by_itself_in_any_shape_and_precision():
    score = torch.randn(2, 3, 50)
    found = top(score, 50)
    assert found.dtype == torch.int64
    assert torch.equal(found, score.argsort(-1, descending=True))
    assert torch.equal(top(score.transpose(0, 1), 7).transpose(0, 1), found[..., :7])
    half = score.bfloat16()
    assert torch.equal(top(half, 50), half.float().argsort(dim=-1, descending=True, stable=True))


def test_scores_are_left_as_they_were():
    score = torch.tensor([-0.0, NAN, -INF, 2.0])
    before = score.clone()
    top(score, 2)
    assert torch.equal(score.view(torch.int32), before.view(torch.int32))


# --------------------------------------------------------------------------------------------------------------- vote
def test_known_answer_of_the_vote():
    torch.testing.assert_close(vote(SCORES, 1), VOTES, atol=5e-5, rtol=0)
    alone = vote(SCORES, 2)
    torch.testing.assert_close(alone, SCORES.softmax(-1))


def test_a_constant_added_to_one_head_changes_nothing():
    for shift in (-300.0, 3.0, 300.0):
        torch.testing.assert_close(vote(SCORES + torch.tensor([[[shift], [0.0]]]), 1), vote(SCORES, 1))
    assert vote(SCORES, 1)[0, 0].argmax() == 0
    assert vote(SCORES.mul(torch.tensor([[[0.01], [1.0]]])), 1)[0, 0].argmax() == 2  # the sum of raw scores says 0


def test_heads_of_a_group_may_stand_in_any_order():
    logits = torch.randn(2, 6, 11)
    order = [2, 0, 1, 4, 3, 5]
    torch.testing.assert_close(vote(logits[:, order], 2), vote(logits, 2))
    other = vote(logits[:, [3, 1, 2, 0, 4, 5]], 2)  # a head that changes its group changes both
    assert not torch.isclose(other, vote(logits, 2)).any()


def test_a_head_that_stands_twice_votes_twice():
    logits = torch.randn(1, 4, 9)
    torch.testing.assert_close(vote(logits.repeat_interleave(2, 1), 2), 2 * vote(logits, 2))


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (1, 4), (2, 3), (4, 2), (6, 1)])
def test_query_head_h_votes_for_its_own_kv_head(heads, group):
    logits, rest = torch.randn(2, heads * group, 7), torch.randn(2, heads * group)
    owner = torch.arange(heads).repeat_interleave(group)
    everything = torch.cat([logits, rest.unsqueeze(-1)], -1).softmax(-1)[..., :-1]
    wanted = torch.stack([everything[:, owner == h].sum(1) for h in range(heads)], 1)
    torch.testing.assert_close(vote(logits, heads, rest), wanted)


def test_a_head_that_looks_elsewhere_has_little_to_say():
    """Without the rest the first head decides; with it, it has found what it looks for already."""
    logits = torch.tensor([[[5.0, 0, 0], [0, 0, 1.0]]])
    nothing, much = torch.full((1, 2), -INF), torch.tensor([[12.0, -INF]])
    torch.testing.assert_close(vote(logits, 1, nothing), vote(logits, 1))
    assert vote(logits, 1, nothing)[0, 0].argmax() == 0
    assert vote(logits, 1, much)[0, 0].argmax() == 2
    shares = vote(logits, 2, torch.tensor([[math.log(math.exp(5) + 2), 0.0]])).sum(-1)[0]  # half of what there is
    torch.testing.assert_close(shares, torch.tensor([0.5, (math.e + 2) / (math.e + 3)]))


def test_absent_units_get_no_vote_and_take_none():
    logits = torch.randn(1, 4, 6)
    absent = logits.clone()
    absent[:, :, [1, 4]] = -INF
    found = vote(absent, 2)
    assert (found[:, :, [1, 4]] == 0).all()
    torch.testing.assert_close(found[:, :, [0, 2, 3, 5]], vote(logits[:, :, [0, 2, 3, 5]], 2))


@pytest.mark.parametrize("rest", [None, torch.tensor([[-INF, -INF]]), torch.tensor([[1.0, -INF]])])
def test_a_head_that_sees_nothing_says_nothing(rest):
    logits = torch.tensor([[[-INF, -INF, -INF], [0.0, 1.0, -INF]]])
    found = vote(logits, 1, rest)
    torch.testing.assert_close(found, vote(logits[:, 1:], 1))
    assert (vote(torch.full((1, 2, 3), -INF), 1, rest) == 0).all()


def test_votes_leave_logits_and_rest_as_they_were():
    logits, rest = torch.tensor([[[-INF, -INF], [0.0, 1.0]]]), torch.tensor([[-INF, 2.0]])
    kept = logits.clone(), rest.clone()
    vote(logits, 1, rest)
    vote(logits, 1)
    assert torch.equal(logits, kept[0])
    assert torch.equal(rest, kept[1])


# ------------------------------------------------------------------------------------------------------------ listing
def listed(order, start, size, room):
    """A list of units written out: the tokens listed, how many belong to units that fit, and how many are read of each."""
    tokens, read = [], [0] * len(size)
    for u in order:
        if len(tokens) + size[u] > room:
            before = len(tokens)
            if before < room:
                read[u] = room - before
                tokens += range(start[u], start[u] + size[u])
            return tokens, before, read
        tokens += range(start[u], start[u] + size[u])
        read[u] = size[u]
    return tokens, len(tokens), read


def check_listing(listing, r, h, wanted):
    tokens, before, _ = wanted
    lists = listing.ids.shape[1]

    def at(x):
        return x if isinstance(x, int) else int(x.expand(-1, lists, -1)[r, h, 0])

    assert listing.ids[r, h, : len(tokens)].tolist() == tokens
    assert (at(listing.before), at(listing.length)) == (before, len(tokens))
    valid = listing.valid()
    valid = torch.ones_like(listing.ids, dtype=torch.bool) if valid is None else valid.expand_as(listing.ids)
    assert valid[r, h].tolist() == [i < len(tokens) for i in range(listing.ids.shape[-1])]


@st.composite
def rooms(draw, totals):
    """A room of each row, at most its total, as a tensor or, where all have the same, perhaps as a number."""
    room = [draw(st.one_of(st.sampled_from([0, total]), st.integers(0, total))) for total in totals]
    if draw(st.booleans()):
        room = [min(room)] * len(room)
        return room, room[0], room[0]
    return room, torch.tensor(room).view(-1, 1, 1), max(room) + draw(st.integers(0, 5))


@settings(max_examples=200)
@given(st.data())
def test_runs_fill_the_room(data):
    batch, heads, run = (data.draw(st.integers(1, most)) for most in (3, 2, 5))
    units = data.draw(st.integers(1, 8))
    order = [[data.draw(st.permutations(range(units))) for _ in range(heads)] for _ in range(batch)]
    room, space, most = data.draw(rooms([units * run] * batch))
    most = min(most, units * run)
    listing = list_runs(torch.tensor(order), run, space, most)
    start, size = [u * run for u in range(units)], [run] * units
    for r in range(batch):
        for h in range(heads):
            check_listing(listing, r, h, listed(order[r][h], start, size, room[r]))
    assert listing.ids.shape[-1] == -(-most // run) * run  # no more than may be needed


@settings(max_examples=300)
@given(st.data())
def test_units_of_any_size_fill_the_room(data):
    batch, heads, units = (data.draw(st.integers(1, most)) for most in (3, 2, 7))
    sizes = [
        [data.draw(st.lists(st.integers(0, 5), min_size=units, max_size=units)) for _ in range(heads)] for _ in range(batch)
    ]
    k = data.draw(st.integers(1, units))
    order = [[data.draw(st.permutations(range(units)))[:k] for _ in range(heads)] for _ in range(batch)]
    totals = [max(sum(sizes[r][h]) for h in range(heads)) for r in range(batch)]  # more than another head has
    room, space, most = data.draw(rooms(totals))
    size = torch.tensor(sizes, dtype=torch.int32)
    start = (size.cumsum(-1) - size).int() + torch.arange(batch).view(-1, 1, 1) * 100  # not from slot 0 on
    longest = int(size.max()) + data.draw(st.integers(0, 2))
    if longest:
        listing = list_units(torch.tensor(order), start, size, space, most, longest)
    found = taken(torch.tensor(order), size, space)
    for r in range(batch):
        for h in range(heads):
            wanted = listed(order[r][h], start[r, h].tolist(), sizes[r][h], room[r])
            assert found[r, h].tolist() == wanted[2]
            if longest:
                check_listing(listing, r, h, wanted)
                assert (listing.ids[r, h, len(wanted[0]) :] == 0).all()  # slots that every body has


def test_known_answer_of_clusters():
    """Labels, sizes and scores of the card of ClusterKV, the cut cluster read from its first token on."""
    labels, score = torch.tensor([1, 0, 1, 2, 0, 2, 2]), torch.tensor([[[0.1, 0.9, 0.4]]])
    tokens = labels.argsort(stable=True)
    size = labels.bincount()
    assert tokens.tolist() == [1, 4, 0, 2, 3, 5, 6]
    assert size.tolist() == [2, 2, 3]
    size = size.view(1, 1, -1)
    order = top(score, 3)
    listing = list_units(order, size.cumsum(-1) - size, size, 4, 4, 3)
    assert sorted(tokens[listing.ids[0, 0, :4]].tolist()) == [0, 2, 3, 5]
    assert (int(listing.before), int(listing.length)) == (2, 5)
    assert taken(order, size, 4).tolist() == [[[0, 2, 2]]]


def test_runs_of_one_token_are_the_order_itself():
    order = torch.tensor([[[3, 1, 0, 2]]])
    listing = list_runs(order, 1, 2, 2)
    assert listing.ids.tolist() == [[[3, 1]]]
    assert (listing.before, listing.length, listing.valid()) == (2, 2, None)
