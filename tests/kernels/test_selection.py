"""From scores of units to the tokens that are read: the order, the votes, and what fits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.listing import cut_lists, written_units
from kvlib.kernels.rank import HELD, fits, ranked
from kvlib.kernels.selection import (
    Listing,
    _cut,
    _list_units,
    _number,
    cut,
    gathered_cut,
    launched_rank,
    launched_top,
    list_runs,
    list_units,
    rank,
    sorted_top,
    taken,
    top,
    vote,
    voted_rank,
)
from tests.kernels.poison import DEVICE, poisoned

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


# --------------------------------------------------------------------------------------------------------------- rank
UNITS = (1, 15, 16, 17, 63, 64, 65, 300)


def run_rank(logits, k, heads, **options):
    """The order that the kernels give; its votes, and that it is exactly theirs, are checked on the way."""
    there = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    logits = logits.to(DEVICE)
    with poisoned():
        order = launched_rank(logits, k, heads, **there)
        votes = ranked(logits, k, heads, **there, select=False)
    assert torch.equal(order, sorted_top(votes, k))
    wanted = plain_votes(logits.cpu(), heads, **options)
    torch.testing.assert_close(votes.cpu().double(), wanted, atol=1e-6, rtol=1e-5, equal_nan=True)
    return order.cpu()


def plain_votes(logits, heads, scale=1.0, softcap=0.0, loudest=False, rest=None, count=None, size=None, always=None):
    """Float64, one query head at a time."""
    batch, q_heads, units = logits.shape
    s = logits.double() * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    votes = torch.zeros(batch, heads or q_heads, units, dtype=torch.float64)
    for b in range(batch):
        for g in range(q_heads):
            hidden = torch.arange(units) >= (units if count is None else int(count[b]))
            if size is not None:
                hidden = hidden | (size[b, g * size.shape[1] // q_heads] == 0)
            s[b, g, hidden] = -INF
            if not heads:
                votes[b, g] = s[b, g]
                continue
            own = g * heads // q_heads
            total = s[b, g].logsumexp(0)
            total = total if rest is None else torch.logaddexp(total, rest[b, g].double())
            p = torch.exp(s[b, g] - total) if total > -INF else torch.zeros(units, dtype=torch.float64)
            votes[b, own] = torch.maximum(votes[b, own], p) if loudest else votes[b, own] + p
            if always is not None and g == (own + 1) * q_heads // heads - 1:
                votes[b, own, always[b, own] & ~hidden] = INF
    return votes


@pytest.mark.parametrize("scope", [0, 1, 2])
@pytest.mark.parametrize("units", UNITS)
def test_ranking_of_every_count_of_units(units, scope):
    """Each query head for itself, a layer's list and a list per KV head."""
    logits = 3 * torch.randn(1 + (units == 17), 4, units)
    for k in {1, units // 3, units if units < 300 or scope == 1 else 5} - {0}:
        order = run_rank(logits, k, scope, scale=0.5)
        assert order.shape == (len(logits), scope or 4, k) and order.dtype == torch.int64
        assert torch.equal(order, voted_rank(logits, k, scope, 0.5))


@settings(max_examples=20)
@given(st.data())
def test_ranking_with_everything_that_may_hide_or_lift_a_unit(data):
    batch, heads, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 3))
    units = data.draw(st.sampled_from(UNITS[:-1]))
    kv = heads * data.draw(st.sampled_from([1, 2])) if heads == 1 and group == 2 else heads
    logits = torch.randint(-2, 3, (batch, heads * group, units)).float()  # many ties
    if data.draw(st.booleans()):
        logits[torch.rand(logits.shape) < 0.3] = -INF
    options = {
        "softcap": data.draw(st.sampled_from([0.0, 1.5])),
        "loudest": data.draw(st.booleans()),
        "rest": data.draw(st.sampled_from([None, torch.tensor([[-INF, 2.0, 0.0, -3.0, 1.0, INF]]).repeat(batch, 1)])),
        "count": data.draw(st.sampled_from([None, torch.randint(0, units + 1, (batch,))])),
        "size": data.draw(st.sampled_from([None, torch.randint(0, 2, (batch, kv, units), dtype=torch.int32)])),
        "always": data.draw(st.sampled_from([None, torch.rand(batch, heads, units) < 0.2])) if kv == heads else None,
    }
    if options["rest"] is not None:
        options["rest"] = options["rest"][:, : heads * group].contiguous()
    k = data.draw(st.integers(1, units))
    order = run_rank(logits, k, data.draw(st.sampled_from([heads, 0])), **options)
    assert all(len(set(row)) == k and set(row) <= set(range(units)) for row in order.flatten(0, 1).tolist())


def test_on_a_cpu_the_operator_is_one_torch_operation_after_the_other():
    logits, rest = torch.randn(2, 6, 50), torch.randn(2, 6)
    count, size = torch.tensor([50, 31]), torch.randint(0, 3, (2, 3, 50), dtype=torch.int32)
    always = torch.rand(2, 3, 50) < 0.2
    kept = logits.clone()
    s = logits.mul(0.3).div_(2.0).tanh_().mul_(2.0)
    hidden = (torch.arange(50) >= count.view(-1, 1, 1)) | (size == 0)
    s = s.masked_fill(hidden.repeat_interleave(2, 1), -INF)
    for loudest in (False, True):
        votes = vote(s, 3, rest, loudest).masked_fill(always & ~hidden, INF)
        assert torch.equal(rank(logits, 40, 3, 0.3, 2.0, loudest, rest, count, size, always), top(votes, 40))
    assert torch.equal(rank(logits, 50, 0, 0.3, 2.0, count=count, size=size), top(s, 50))
    assert torch.equal(logits, kept)


def test_operators_say_what_they_give():
    logits = torch.randn(1, 4, 20, device=DEVICE)
    torch.library.opcheck(top, (logits, 5))
    torch.library.opcheck(rank, (logits, 5, 2, 0.5), {"count": torch.tensor([17], device=DEVICE)})
    torch.library.opcheck(rank, (logits, 5, 0))
    order, size = rank(logits, 8, 2), torch.full((1, 2, 20), 3, device=DEVICE)
    start = size.cumsum(-1) - size
    torch.library.opcheck(_list_units, (order, start, size, None, 10, 10, 3))
    listing = list_units(order, start, size, 10, 10, 3)
    q, k = torch.randn(1, 4, 16, device=DEVICE), torch.randn(1, 2, 60, 16, device=DEVICE)
    torch.library.opcheck(_cut, (q, k, *listing, 0, 0, 0.25, 0.0, 10, 3))


def test_more_units_than_have_a_vote_come_by_index():
    logits = torch.full((1, 2, 20), -INF)
    logits[0, 0, 7], logits[0, 1, 3] = 0.0, 1.0
    rest = [0, 1, 2, 4, 5, 6, 8, 9]
    assert run_rank(logits, 10, 1).tolist() == [[[3, 7, *rest]]]
    assert run_rank(logits, 10, 1, rest=torch.tensor([[0.0, 9.0]])).tolist() == [[[7, 3, *rest]]]
    assert run_rank(logits, 4, 0).tolist() == [[[7, 0, 1, 2], [3, 0, 1, 2]]]


def test_logits_that_are_no_numbers_or_infinite_rank_as_in_torch():
    for kind in (NAN, INF):
        logits = torch.randn(1, 4, 30)
        logits[0, 0, 5] = kind
        for heads in (0, 1, 2, 4):
            with poisoned():
                found = launched_rank(logits.to(DEVICE), 30, heads)
            assert torch.equal(found.cpu(), voted_rank(logits, 30, heads))


def test_strided_tensors():
    logits = torch.full((5, 3, 40), NAN)[1:, :, 2:37].transpose(0, 1)
    logits.copy_(torch.randn(3, 4, 35))
    size = torch.zeros(2, 3, 50, dtype=torch.int32)[:, :, :35].transpose(0, 1)
    size.copy_(torch.randint(0, 3, (3, 2, 35)))
    always = (torch.rand(3, 2, 60) < 0.1)[..., :35]
    rest = torch.full((3, 4, 5), NAN)[:, :, 2]  # of one of several query rows
    rest.copy_(torch.randn(3, 4) + 3)
    run_rank(logits, 9, 2, size=size, always=always, rest=rest)


def test_rows_that_no_program_holds():
    """In pieces, whose best are ranked again; many ties cross their borders."""
    units = 2 * HELD + 5
    logits = torch.randint(-3, 4, (1, 2, units)).float()
    logits[0, :, HELD - 3 : HELD + 40] = 4.0
    options = {"rest": torch.tensor([[1.0, 2.0]]), "count": torch.tensor([units - 3])}
    for heads, k in ((1, 30), (0, 100)):
        order = run_rank(logits, k, heads, **options)
        assert torch.equal(order[0, :, :30], torch.arange(HELD - 3, HELD + 27).expand(len(order[0]), -1))


def test_several_rounds_and_more_than_one_program_sorts():
    score = torch.randint(0, 5000, (1, 4 * HELD + 100)).float()
    k = HELD // 4 - 10
    assert 5 * k > HELD  # what the first round leaves is again too much for one program
    assert torch.equal(launched_top(score.to(DEVICE), k).cpu(), score.argsort(dim=-1, descending=True, stable=True)[:, :k])
    many = HELD // 2 + 1
    assert not fits(score.shape[1], many)
    assert torch.equal(launched_top(score.to(DEVICE), many).cpu(), sorted_top(score, many))
    found = launched_rank(score[None].to(DEVICE), many, 1, 1e-3)
    assert torch.equal(found.cpu()[0, 0, :1000].sort().values, sorted_top(score, 1000)[0].sort().values)


@settings(max_examples=40)
@given(st.data())
def test_the_kernels_best_are_those_of_a_stable_sort(data):
    units = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(scores, min_size=units, max_size=units), min_size=1, max_size=3))
    k = data.draw(st.integers(0, units))
    with poisoned():
        found = launched_top(torch.tensor(rows).to(DEVICE), k)
    assert torch.equal(found.cpu(), sorted_top(torch.tensor(rows), k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_takes_any_shape_and_precision(dtype):
    score = torch.randn(2, 50, 3).to(dtype).transpose(1, 2)
    for part in (score, score[:, 1], score[0, 0], score[:, :0]):
        assert torch.equal(launched_top(part.to(DEVICE), 7).cpu(), sorted_top(part, 7))


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


@settings(max_examples=150)
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
    listings = []
    if longest:
        listings = [list_units(torch.tensor(order), start, size, space, most, longest)]
        there = [
            x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (torch.tensor(order), start, size, *_number(space))
        ]
        with poisoned():
            listings.append(Listing(*written_units(*there, most, longest)))
    found = taken(torch.tensor(order), size, space)
    for r in range(batch):
        for h in range(heads):
            wanted = listed(order[r][h], start[r, h].tolist(), sizes[r][h], room[r])
            assert found[r, h].tolist() == wanted[2]
            for listing in listings:
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


def plain_cut(q, k, listing, scale, softcap, most, longest, r, h):
    """Float64: what one list reads, or None where it has nothing to cut."""
    lists, q_heads, heads = listing.ids.shape[1], q.shape[1], k.shape[1]
    before, length = (x if isinstance(x, int) else int(x.expand(-1, lists, -1)[r, h, 0]) for x in listing[1:])
    slots = listing.ids[r, h, before:length].tolist()
    votes = torch.zeros(len(slots), dtype=torch.float64)
    for head in range(h * q_heads // lists, (h + 1) * q_heads // lists):
        s = k[r, head * heads // q_heads, slots].double() @ q[r, head].double() * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        votes += s if lists == q_heads else s.softmax(0)
    best = votes.argsort(descending=True, stable=True)[: most - before].tolist()
    return listing.ids[r, h, :before].tolist() + [slots[i] for i in best]


@pytest.mark.parametrize(("lists", "heads", "group"), [(2, 2, 3), (1, 2, 2), (4, 2, 2), (2, 2, 1), (1, 1, 5)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_unit_that_is_cut_gives_its_best_tokens(lists, heads, group, softcap):
    """Lists of a KV head, a layer and a query head; units of 0 to 20 tokens."""
    batch, d = 2, 24
    size = torch.randint(0, 21, (batch, lists, 12), dtype=torch.int32)
    start = size.cumsum(-1).int() - size
    order = torch.stack([torch.randperm(12) for _ in range(batch * lists)]).view(batch, lists, 12)
    room = torch.tensor([37, int(size.sum(-1).min())]).view(-1, 1, 1).clamp(max=int(size.sum(-1).min()))
    most = int(room.max())
    listing = list_units(order, start, size, room, most, 20)
    q, k = torch.randn(batch, heads * group, d), torch.randn(batch, heads, 250, d + 4)[..., :d]
    check_cut(q, k, listing, 0.3, softcap, most, 20, room.expand(-1, lists, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", [3, 16, 70])
def test_a_page_is_cut_by_numbers_alone(dtype, run):
    """Where every row has the same room, its length is no tensor."""
    order = torch.randperm(9).view(1, 1, 9).repeat(1, 2, 1)
    room = 2 * run + run // 2
    listing = list_runs(order, run, room, room)
    q, k = torch.randn(1, 4, 40).to(dtype), torch.randn(1, 9 * run, 2, 40).to(dtype).transpose(1, 2)
    check_cut(q, k, listing, 0.2, 0.0, room, run, torch.full((1, 2, 1), room))


def check_cut(q, k, listing, scale, softcap, most, longest, room):
    there = Listing(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in listing))
    (before, fit), (length, listed) = _number(there.before), _number(there.length)
    arguments = (there.ids, before, length, fit, listed, scale, softcap, most, longest)
    with poisoned():
        found = cut_lists(q.to(DEVICE), k.to(DEVICE), *arguments)
    # Also what nobody reads: slots that there are.  A CPU rounds products of bf16 to bf16.
    assert torch.equal(found.cpu(), cut(q.float(), k.float(), listing, scale, softcap, most, longest))
    if DEVICE == "cuda":
        assert torch.equal(found, gathered_cut(q.to(DEVICE), k.to(DEVICE), *arguments))
    for r in range(len(q)):
        for h in range(listing.ids.shape[1]):
            wanted = plain_cut(q, k, listing, scale, softcap, most, longest, r, h)
            assert found[r, h, : int(room[r, h])].tolist() == wanted[: int(room[r, h])]
