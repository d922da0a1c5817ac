"""SentenceKV: sentences by their mean keys, the mean query of the open one, and what r gives up for good."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib import census
from kvlib.policies import RecipeError
from kvlib.policies.select.sentences import borders
from kvlib.recipe import Recipe
from kvlib.testing import TinyTokenizer, prompts, tiny_model
from tests.reading import COMMA, LETTER, MOST, STOP, Reader, best_first, positions, shares

HEADS, GROUP, D, SCALE = 2, 2, 8, 8**-0.5


# ------------------------------------------------------------------------------------------------------- known answers
def known(budget, queries, ids, r="inf"):
    """Three sentences of four keys, of means (2, 0), (0, 4) and (1, 1), and what the last of some queries reads of them,
    the tokens `ids` having been generated."""
    keys = [(1, 0), (3, 0), (1, 0), (3, 0), (0, 2), (0, 4), (0, 6), (0, 4), *4 * [(1, 1)], *len(ids) * [(0, 0)]]
    text = torch.tensor([[*3 * [LETTER, LETTER, LETTER, STOP], *ids]])
    reader = Reader(f"sentencekv(budget={budget}, r={r}) + sink=0 + recent=0 + block=6", ids=text)
    k, q = (torch.tensor(x).float()[None, None] for x in (keys, [*12 * [(0, 0)], *queries]))
    reader.feed(q[:, :, :12], k[:, :, :12])
    return [p for p in positions(reader.steps(q[:, :, 12:], k[:, :, 12:])[0, 0, -1]) if p < 12]


S0, S1, S2 = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]


@pytest.mark.parametrize("r", ["inf", "3"])
def test_known_answer_of_the_mean_query(r):
    """(0, 1) and (2, 1) have the mean (1, 1): products 2, 4 and 2, so s1, s0, s2; (2, 1) says what is read of a part."""
    queries, ids = [(0, 1), (2, 1)], [LETTER, LETTER]
    assert known(8, queries, ids, r) == [1, 3, *S1]
    assert known(10, queries, ids, r) == [*S0, *S1]
    assert known(12, queries, ids, r) == [*S0, *S1, 8, 9]


def test_known_answer_of_the_last_query_alone():
    """Products 4, 4 and 3, so s0, s1, s2."""
    assert known(7 + 1, [(2, 1)], [LETTER]) == [*S0, 5, 6, 7]
    assert known(8 + 1, [(2, 1)], [LETTER]) == [*S0, *S1]
    assert known(9 + 1, [(2, 1)], [LETTER]) == [*S0, *S1, 8]


def test_at_a_terminator_the_query_itself_scores():
    assert known(8, [(0, 1), (2, 1)], [LETTER, STOP]) == [*S0, 5, 6]
    assert known(8, [(0, 1), (2, 1)], [LETTER, COMMA]) == [1, 3, *S1]


def test_no_query_of_a_sentence_that_has_ended_counts():
    """Any of (0, 6) in the mean would put s2 before s0."""
    assert known(8, [(0, 6), (2, 1)], [STOP, LETTER]) == [*S0, 5, 6]
    assert known(10, [(0, 6), (0, 6), (0, 1), (2, 1)], [LETTER, STOP, LETTER, LETTER]) == [1, 3, *S1]
    assert known(10, [(0, 6), (0, 6), (0, 1), (2, 1)], [LETTER, LETTER, LETTER, LETTER]) == [*S1, 8, 9]


# --------------------------------------------------------------------------------------------- against the definition
def text(seed, tokens, stops=0.15, commas=0.07):
    """Random ids with such shares of full stops and commas."""
    draw = np.random.default_rng(seed).random(tokens)
    return torch.from_numpy(np.select([draw < stops, draw < stops + commas], [STOP, COMMA], LETTER))


def tensors(seed, rows, tokens):
    """Queries and keys of random texts."""
    make = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, h, tokens, D, generator=make) for h in (HEADS * GROUP, HEADS))
    return 2 * q, k


def reader_of(recipe, ids, rows=1):
    return Reader(recipe, rows, ids, scale=SCALE)


def borders_of(ids, first, sealed, most):
    """Borders of the sentences of a text ids [n], the first of them at `first`, up to that at `sealed`."""
    part = ids[first:]
    found = first + borders((part == STOP).numpy(), min(4, most), most, (part == COMMA).numpy())
    return [first, *found[found <= sealed].tolist()]


def longest(reader, row=0):
    """The longest a sentence may be: whole before the tail has outgrown its share of the budget."""
    block = int(reader.group.split.block[row])
    return max(min(4, block), min(64, block // 2))


def expected(ids, q, k, since, always, units, room, scope="kv_head"):
    """What each query head reads besides `always` when the last of the tokens ids [n] arrives: q [Hq, n, d], k [H, n, d],
    units[h] lists the positions of every sentence that KV head h holds, and no query before `since` counts."""
    n, group = len(ids), len(q) // len(k)
    stops = [p for p in range(since, n - 1) if ids[p] == STOP]
    begin = n - 1 if ids[n - 1] == STOP else stops[-1] + 1 if stops else since
    mean, newest = q[:, begin:].mean(1), q[:, -1]
    kv = [h // group for h in range(len(q))]
    own = SCALE * (k[kv] @ newest.unsqueeze(-1)).squeeze(-1)
    together = {"kv_head": group, "layer": len(q), "query_head": 1}[scope]
    found = []
    for i in range(0, len(q), together):
        voters, chosen = slice(i, i + together), []
        means = torch.stack([torch.stack([k[kv[j], at].mean(0) for at in units[kv[i]]]) for j in range(i, i + together)])
        logits = SCALE * (means @ mean[voters].unsqueeze(-1)).squeeze(-1)
        score = shares(logits, own[voters][:, always])
        for u in best_first(score).tolist():
            at, left = units[kv[i]][u], room - len(chosen)
            if len(at) > left:
                within = shares(own[voters][:, at], own[voters, :0])
                at = [at[j] for j in best_first(within)[:left].tolist()]
            chosen += at
        found += [sorted(always + chosen)] * together
    return found


@pytest.mark.parametrize(
    ("budget", "sizes", "scope"),
    [
        (24, "", "kv_head"),
        (40, " + recent=8 + block=24", "kv_head"),  # room for sentences that are cut at commas
        (0.4, "", "kv_head"),
        (24, "", "layer"),
        (16, "", "query_head"),
    ],
)
@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**20),
    stops=st.sampled_from([0.0, 0.1, 0.3]),
    pad=st.integers(0, 20),
    chunk=st.sampled_from([11, 64]),
)
def test_a_step_reads_sinks_tail_and_the_best_sentences_up_to_the_budget(budget, sizes, scope, seed, stops, pad, chunk):
    """Each row of a batch as by the definition for that row alone."""
    prompt, steps = 64, 24
    ids = torch.stack([text(seed + row, MOST, stops) for row in range(2)])
    q, k = tensors(seed, 2, prompt + steps)
    reader = reader_of(f"sentencekv(budget={budget}, r=inf, scope={scope}){sizes}", ids, 2)
    for i in range(0, prompt, chunk):
        columns = min(chunk, prompt - i)
        new = [columns, min(columns, max(0, i + columns - pad))]
        reader.feed(q[:, :, i : i + columns], k[:, :, i : i + columns], new)
    reader.group.finish_prefill()
    for i in range(prompt, prompt + steps):
        sinks, sealed = reader.sinks.copy(), reader.sealed.copy()
        out = reader.feed(q[:, :, i : i + 1], k[:, :, i : i + 1])[:, :, 0]
        for row, begin in ((0, 0), (1, pad)):
            n, total = i + 1 - begin, budget if isinstance(budget, int) else round(budget * (prompt - begin))
            read = [positions(head) for head in out[row]]
            assert {len(x) for x in read} == {min(total, n)}
            if sealed[row]:
                ends = borders_of(ids[row, :n], int(sinks[row]), int(sealed[row]), longest(reader, row))
                assert ends[-1] == sealed[row]
                always = [*range(ends[0]), *range(ends[-1], n)]
                units = [[list(range(a, b)) for a, b in itertools.pairwise(ends)]] * HEADS
                own_q, own_k = q[row, :, begin : i + 1], k[row, :, begin : i + 1]
                room = total - len(always)
                assert read == expected(ids[row, :n], own_q, own_k, prompt - begin, always, units, room, scope)


def units_of(reader, row, head):
    """Positions of the tokens of each unit of the body."""
    body = reader.group.body
    count = int(body.units.counts[row])
    size, start = (body.units.parts[name][row, head, :count].tolist() for name in ("size", "start"))
    held = body.positions(row, head).tolist()
    assert start == [sum(size[:u]) for u in range(count)]
    assert sum(size) == len(held)
    return [held[a : a + n] for a, n in zip(start, size, strict=True)]


@pytest.mark.parametrize("recipe", ["sentencekv(budget=24, r=inf)", "sentencekv(budget=24, r=2)"])
def test_every_token_of_the_body_is_in_exactly_one_unit_and_closed_means_stay(recipe):
    ids = torch.stack([text(row, MOST) for row in range(2)])
    q, k = tensors(0, 2, 160)
    reader = reader_of(recipe, ids, 2)
    reader.feed(q[:, :, :96], k[:, :, :96], [96, 79])
    reader.group.finish_prefill()
    before, counts = reader.group.body.units.parts["mean"].clone(), reader.group.body.units.counts
    for i in range(96, 160):
        reader.feed(q[:, :, i : i + 1], k[:, :, i : i + 1])
    after = reader.group.body.units
    held = census.positions(reader.group)
    for row, begin in ((0, 0), (1, 17)):
        assert after.counts[row] >= counts[row] + 4
        assert torch.equal(after.parts["mean"][row, :, : counts[row]], before[row, :, : counts[row]])
        for head in range(HEADS):
            units = units_of(reader, row, head)
            inside = [p for unit in units for p in unit]
            outside = [*range(reader.sinks[row]), *range(reader.sealed[row], reader.group.tokens[row])]
            assert sorted(inside + outside) == held[row][head].tolist()
            for u, at in enumerate(units):
                mean = k[row, head, [begin + p for p in at]].mean(0) if at else torch.zeros(D)
                assert torch.allclose(after.parts["mean"][row, head, u], mean, atol=1e-6)


def test_an_open_sentence_is_read_however_far_it_reaches_behind_the_newest_tokens():
    ids = text(3, MOST, stops=0.06, commas=0)[None]
    q, k = tensors(0, 1, 220)
    reader = reader_of("sentencekv(budget=40, r=inf) + sink=0 + recent=2 + block=32", ids)
    reader.feed(q[:, :, :100], k[:, :, :100])
    reader.group.finish_prefill()
    reach = 0
    for i in range(100, 220):
        out = reader.feed(q[:, :, i : i + 1], k[:, :, i : i + 1])[0, :, 0]
        begin = borders_of(ids[0, :i], 0, i, 16)[-1]
        assert (out[:, begin : i + 1] > 0).all()
        reach = max(reach, i + 1 - begin)
    assert reach == 16


@pytest.mark.parametrize(
    "recipe", ["sentencekv(budget=8, r=inf)", "sentencekv(budget=20, r=inf) + sink=4 + recent=14 + block=1"]
)
def test_the_least_budgets_are_kept_too(recipe):
    q, k = tensors(0, 1, 100)
    reader = reader_of(recipe, text(0, MOST)[None])
    reader.feed(q[:, :, :60], k[:, :, :60])
    reads = (reader.steps(q[:, :, 60:], k[:, :, 60:]) > 0).sum(-1)
    assert (reads == Recipe.parse(recipe).select.budget).all()


@pytest.mark.parametrize(
    ("recipe", "prompt"), [("sentencekv(budget=60)", 250), ("sentencekv(budget=200, r=inf) @ host", 70)]
)
def test_a_prompt_of_which_no_whole_sentence_is_due_waits(recipe, prompt):
    """Two tokens after an observation window, or six after the sinks, are no sentence."""
    q, k = tensors(0, 1, prompt + 40)
    reader = reader_of(recipe, torch.full((1, MOST), LETTER))
    reader.feed(q[:, :, :prompt], k[:, :, :prompt])
    reads = (reader.steps(q[:, :, prompt:], k[:, :, prompt:]) > 0).sum(-1)
    seen = torch.arange(prompt + 1, prompt + 41)
    assert (reads == seen.clamp(max=Recipe.parse(recipe).select.budget)).all()


# ------------------------------------------------------------------------------------------------------------ what r means
def test_r_is_written_inf_and_read_back():
    recipe = Recipe.parse("sentencekv(budget=64, r=inf)")
    assert recipe.select.r == math.inf
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse("sentencekv(r='inf')") == Recipe.parse("sentencekv(r=inf)")
    assert str(Recipe.parse("sentencekv(budget=64, r=3.0)")) == "sentencekv(budget=64)"
    for bad in ("0.5", "nan", "-inf", "True", "many"):
        with pytest.raises(RecipeError, match=f"sentencekv.r={bad}.: give a number, 1 or more, or inf"):
            Recipe.parse(f"sentencekv(r={bad})")
    with pytest.raises(RecipeError, match="theta=near"):
        Recipe.parse("sentencekv(theta=near)")
    with pytest.raises(RecipeError, match=r"heads keep different tokens.*r=inf"):
        Recipe.parse("sentencekv(scope=layer)")


@torch.no_grad()
def test_r_says_how_much_of_the_prompt_is_given_up_for_good():
    model, ids = tiny_model(), prompts(1, 96, 0)[0]
    for budget, r, kept in (
        (24, 1, 24),
        (24, 1.5, 36),
        (24, 3, 72),
        (24, 4, 96),
        (24, "inf", 96),
        (0.25, 2, 48),
        (0.5, 2, 96),
        (0.5, 4, 96),
    ):
        cache = kvlib.Cache(model, f"sentencekv(budget={budget}, r={r})", TinyTokenizer())
        model(ids, past_key_values=cache)
        cache.finish_prefill()
        assert (cache.kept() == kept).all()
        assert cache.recipe.lossy == (r != "inf" and budget != 0.5)
        assert ("lossy" in cache.report()) == cache.recipe.lossy
        model(ids[:, :1], past_key_values=cache)
        assert (cache.kept() == kept + 1).all()
        assert (cache.attended() == (48 if budget == 0.5 else 24)).all()


@pytest.mark.parametrize("r", ["1", "inf"])
def test_a_needle_that_no_prompt_query_looked_at_is_lost_for_good_unless_r_is_inf(r):
    """Two needles, sentences of eight tokens; the last prompt queries look at one of them only."""
    ids = torch.tensor([([LETTER] * 7 + [STOP]) * 15])
    k = torch.zeros(1, 1, 120, 4)
    k[..., 0] = 1
    seen, unseen = range(40, 48), range(64, 72)
    k[0, 0, seen] = torch.tensor([0.0, 1, 0, 0])
    k[0, 0, unseen] = torch.tensor([-1.0, 0, 1, 0])
    asks = {"seen": torch.tensor([0.0, 9, 0, 0]), "unseen": torch.tensor([0.0, 0, 9, 0])}
    for name, needle in (("seen", seen), ("unseen", unseen)):
        reader = Reader(f"sentencekv(budget=40, r={r})", ids=ids.repeat(1, 2))
        reader.feed((asks["seen"] + torch.tensor([1.0, 0, 0, 0])).expand(1, 1, 120, 4), k)
        read = positions(reader.feed(asks[name].view(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))[0, 0, 0])
        found = set(needle) <= set(read)
        assert found == (name == "seen" or r == "inf")
        assert not (name == "unseen" and r == "1" and set(needle) & set(read))
        held = census.positions(reader.group)[0][0].tolist()
        assert set(needle) <= set(held) if found else not set(needle) & set(held)


def test_what_an_evictor_leaves_is_grouped_by_the_sentences_of_the_whole_text():
    for seed in range(6):
        ids = text(seed, MOST, commas=0)[None]
        q, k = tensors(seed, 1, 97)
        reader = reader_of("sentencekv(budget=24, r=2)", ids)
        reader.feed(q[:, :, :96], k[:, :, :96])
        reader.group.finish_prefill()
        cut = 96 - 24  # the observation window has sentences of its own
        ends = [*borders_of(ids[0, :cut], 4, cut, longest(reader)), cut]
        ends += borders_of(ids[0, :96], cut, int(reader.sealed[0]), longest(reader))[1:]
        held, units = census.positions(reader.group)[0], []
        for head in range(HEADS):
            of_text = [[p for p in held[head].tolist() if a <= p < b] for a, b in itertools.pairwise(ends)]
            units.append([at for at in of_text if at])
            assert [at for at in units_of(reader, 0, head) if at] == units[head]


def test_a_step_reads_the_best_of_what_an_evictor_has_left():
    """A sentence of which a head has kept nothing has no share of its votes."""
    ids, (q, k) = text(2, MOST, stops=0.2)[None], tensors(2, 1, 116)
    reader, gaps = reader_of("sentencekv(budget=24, r=1.5)", ids), 0
    reader.feed(q[:, :, :96], k[:, :, :96])
    reader.group.finish_prefill()
    for i in range(96, 116):
        every = [units_of(reader, 0, head) for head in range(HEADS)]
        gaps += sum(not at for units in every for at in units)
        always = [*range(reader.sinks[0]), *range(reader.sealed[0], i + 1)]
        out = reader.feed(q[:, :, i : i + 1], k[:, :, i : i + 1])[0, :, 0]
        units = [[at for at in units if at] for units in every]
        wanted = expected(ids[0, : i + 1], q[0, :, : i + 1], k[0, :, : i + 1], 96, always, units, 24 - len(always))
        assert [positions(head) for head in out] == wanted
    assert gaps > 20


def test_more_than_any_prompt_is_everything():
    assert Recipe.parse("sentencekv(budget=24, r=1e30)").evictor is None


def test_no_tokenizer_is_a_clear_error():
    with pytest.raises(RecipeError, match=r"sentencekv: it reads text: give kvlib.Cache\(model, recipe, tokenizer=...\)"):
        kvlib.Cache(tiny_model(), "sentencekv(budget=64)")


# --------------------------------------------------------------------------------------- what is remembered, and when
def remembered(theta, queries):
    """As `known`, with a threshold: what each step reads of the three sentences."""
    keys = [(1, 0), (3, 0), (1, 0), (3, 0), (0, 2), (0, 4), (0, 6), (0, 4), *4 * [(1, 1)], *len(queries) * [(0, 0)]]
    ids = torch.tensor([[*3 * [LETTER, LETTER, LETTER, STOP], *len(queries) * [LETTER]]])
    reader = Reader(f"sentencekv(budget=12, r=inf, theta={theta}) + sink=0 + recent=0 + block=8", ids=ids)
    k, q = (torch.tensor(x).float()[None, None] for x in (keys, [*12 * [(0, 0)], *queries]))
    reader.feed(q[:, :, :12], k[:, :, :12])
    return [[p for p in positions(row) if p < 12] for row in reader.steps(q[:, :, 12:], k[:, :, 12:])[0, 0]]


def test_theta_is_a_cosine_of_mean_queries():
    """Those of (0, 1) and of (0, 1), (2, 1) have the cosine 0.71; those of the queries themselves 0.45."""
    fresh, again = [*S0, *S1, 8, 9], [1, 3, *S1, *S2]
    assert remembered(None, [(0, 1), (2, 1)])[1] == fresh
    assert remembered(1.01, [(0, 1), (2, 1)])[1] == fresh
    assert remembered(0.72, [(0, 1), (2, 1)])[1] == fresh
    assert remembered(0.70, [(0, 1), (2, 1)])[1] == again
    assert remembered(0.5, [(0, 1), (2, 1)])[1] == again
    assert remembered(-1, [(0, 1), (-8, -9)])[1] == [0, 2, *S1, *S2]


def test_a_kept_choice_ends_with_what_is_sealed_next():
    """Eight tokens make a block; the order s1, s2, s0 serves until it leaves the tail."""
    queries = [(0, 1), *9 * [(8, 0)]]
    reads = remembered(-1, queries)
    assert reads[:4] == [[0, 1, 2, *S1, *S2], [1, 3, *S1, *S2], [1, *S1, *S2], [*S1, *S2]]
    assert reads[4:8] == [[*S1, 8, 9, 10], [*S1, 8, 9], [*S1, 8], S1]
    assert reads[8:] == [[*S0, 4, 5, 6, *S2], [*S0, 4, 5, *S2]]
    assert remembered(None, queries)[1] == [*S0, 4, 5, *S2]


def test_a_threshold_that_is_never_reached_is_none_to_the_bit():
    ids, (q, k) = text(0, MOST)[None], tensors(0, 1, 140)
    outs = []
    for theta in ("None", "1.5"):
        reader = reader_of(f"sentencekv(budget=24, theta={theta})", ids)
        reader.feed(q[:, :, :100], k[:, :, :100])
        outs.append(reader.steps(q[:, :, 100:], k[:, :, 100:]))
    assert torch.equal(*outs)


def test_a_new_prompt_chunk_ends_the_open_sentence():
    ids = text(5, MOST)[None]
    ids[0, 90:130] = LETTER
    q, k = tensors(0, 1, 130)
    q[:, :, 100:110] *= 10  # a mean that held any of them would be theirs
    reader = reader_of("sentencekv(budget=24, r=inf)", ids)
    reader.feed(q[:, :, :100], k[:, :, :100])
    reader.steps(q[:, :, 100:110], k[:, :, 100:110])
    chunk = reader.feed(q[:, :, 110:120], k[:, :, 110:120])[0]
    assert torch.equal(chunk[..., :120] > 0, torch.ones(10, 120).tril(110).bool().expand(4, -1, -1))
    for i in range(120, 130):
        sinks, sealed = int(reader.sinks[0]), int(reader.sealed[0])
        out = reader.feed(q[:, :, i : i + 1], k[:, :, i : i + 1])[0, :, 0]
        ends = borders_of(ids[0, : i + 1], sinks, sealed, longest(reader))
        always = [*range(sinks), *range(sealed, i + 1)]
        units = [[list(range(a, b)) for a, b in itertools.pairwise(ends)]] * HEADS
        wanted = expected(ids[0, : i + 1], q[0, :, : i + 1], k[0, :, : i + 1], 120, always, units, 24 - len(always))
        assert [positions(head) for head in out] == wanted


@pytest.mark.parametrize("theta", ["None", "0.8"])
@pytest.mark.parametrize("r", ["inf", "2"])
def test_only_accepted_drafts_count(theta, r):
    """Rejected queries are long and at full stops, and blocks fall due among them."""
    ids = text(1, MOST)[None]
    q, k = tensors(0, 1, 160)
    plain, drafted = (reader_of(f"sentencekv(budget=24, r={r}, theta={theta})", ids.clone()) for _ in range(2))
    for reader in (plain, drafted):
        reader.feed(q[:, :, :100], k[:, :, :100])
        reader.group.finish_prefill()
    wanted, at = plain.steps(q[:, :, 100:], k[:, :, 100:]), 100
    for accepted, rejected in ((3, 4), (0, 1), (1, 0), (0, 9), (7, 7), (12, 1), (1, 3), (2, 8), (20, 0), (14, 5)):
        wrong_q, wrong_k = (20 * torch.randn(1, h, rejected, D) for h in (HEADS * GROUP, HEADS))
        drafted.ids[0, at + accepted : at + accepted + rejected] = torch.tensor([STOP, LETTER])[torch.arange(rejected) % 2]
        both_q = torch.cat([q[:, :, at : at + accepted], wrong_q], 2)
        both_k = torch.cat([k[:, :, at : at + accepted], wrong_k], 2)
        out = drafted.feed(both_q, both_k, recording=True)[:, :, :accepted]
        drafted.group.crop(rejected)
        drafted.ids = ids.clone()
        here = wanted[:, :, at - 100 : at - 100 + accepted]
        assert torch.equal(out > 0, here > 0)
        assert torch.allclose(out, here, atol=1e-6)
        at += accepted
    assert at == 160
    assert all(torch.equal(a, b) for a, b in zip(plain.group.past.tensors(), drafted.group.past.tensors(), strict=True))


@pytest.mark.parametrize("r", ["inf", "2"])
def test_a_row_that_takes_a_break_goes_on_as_if_there_had_been_none(r):
    ids = torch.stack([text(row, MOST) for row in (3, 4)])
    q, k = tensors(0, 2, 130)
    lone, both = reader_of(f"sentencekv(budget=24, r={r})", ids[1:]), reader_of(f"sentencekv(budget=24, r={r})", ids, 2)
    lone.feed(q[1:, :, :100], k[1:, :, :100])
    both.feed(q[:, :, :100], k[:, :, :100])
    for i in range(100, 130):
        if i % 3 == 0:  # columns that are padding in row 1: another's step, or its next turn
            n = 4 if i % 2 else 1
            both.feed(10 * torch.randn(2, HEADS * GROUP, n, D), torch.randn(2, HEADS, n, D), [n, 0])
        one, two = (reader.feed(q[-n:, :, i : i + 1], k[-n:, :, i : i + 1]) for n, reader in ((1, lone), (2, both)))
        assert torch.equal(two[1:] > 0, one > 0)
        assert torch.allclose(two[1:], one, atol=1e-6)


def test_padding_before_a_rows_drafts_is_none_of_them():
    ids = torch.stack([text(row, MOST) for row in (3, 4)])
    q, k = tensors(0, 2, 130)
    lone, both = reader_of("sentencekv(budget=24)", ids[1:]), reader_of("sentencekv(budget=24)", ids, 2)
    for n, reader in ((1, lone), (2, both)):
        reader.feed(q[-n:, :, :100], k[-n:, :, :100])
        reader.group.finish_prefill()
    for i in range(100, 130, 2):
        one = lone.feed(q[1:, :, i : i + 2], k[1:, :, i : i + 2], recording=True)
        first = 10 * torch.randn(2, HEADS * GROUP, 1, D), torch.randn(2, HEADS, 1, D)
        chunk = [torch.cat([x, y[:, :, i : i + 2]], 2) for x, y in zip(first, (q, k), strict=True)]
        two = both.feed(*chunk, [3, 2], recording=True)[1:, :, 1:]
        for reader in (lone, both):
            reader.group.crop(0)
        assert torch.equal(two > 0, one > 0)
        assert torch.allclose(two, one, atol=1e-6)


def test_rows_change_places_with_their_open_sentences():
    ids = torch.stack([text(row, MOST) for row in (3, 4)])
    q, k = tensors(0, 2, 130)
    still, moved = (reader_of("sentencekv(budget=24, theta=0.9)", ids, 2) for _ in range(2))
    for reader in (still, moved):
        reader.feed(q[:, :, :100], k[:, :, :100], [100, 83])
        reader.steps(q[:, :, 100:107], k[:, :, 100:107])
    moved.group.reorder(torch.tensor([1, 0]))
    moved.ids = ids.flip(0)
    wanted = still.steps(q[:, :, 107:], k[:, :, 107:])
    got = moved.steps(q[:, :, 107:].flip(0), k[:, :, 107:].flip(0))
    assert torch.equal(got.flip(0) > 0, wanted > 0)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["sentencekv(budget=24)", "sentencekv(budget=24, r=inf, theta=0.9) @ host"])
def test_assisted_decoding_gives_the_tokens_of_plain_decoding(recipe):
    model, ids = tiny_model(), prompts(1, 60, 0)[0].repeat(1, 2)
    outs = []
    for more in ({}, {"prompt_lookup_num_tokens": 6}):
        cache = kvlib.Cache(model, recipe, TinyTokenizer())
        outs.append(model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False, **more))
    assert torch.equal(*outs)
