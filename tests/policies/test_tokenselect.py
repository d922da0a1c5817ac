"""TokenSelect: all heads of a layer vote for one list of tokens, and a list serves while the query stays the same."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.policies import RecipeError, TokenSelect
from kvlib.policies.heads.table import HeadTable
from kvlib.policies.selection import Selector
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.testing import prompts, tiny_model
from tests.reading import Reader, best_first, positions, shares

HEADS, GROUP, D, SCALE = 2, 2, 8, 8**-0.5


# ------------------------------------------------------------------------------------------------------- known answers
def known(products, room, recipe="", heads=1, scale=0.125):
    """Which of the first tokens each query head reads where there is room for so many: one query whose heads have these
    products [Hq][tokens] with their keys, and all but none with the tail's."""
    products = torch.tensor(products)
    tokens, recent = products.shape[1], 9 - room
    reader = Reader(f"tokenselect(budget=10{recipe}) + sink=0 + recent={recent} + block=1", scale=scale)
    k = torch.eye(64)[: tokens + recent + 1].expand(1, heads, -1, -1)
    q = torch.full((1, len(products), 1, 64), -480.0)
    q[0, :, 0, :tokens] = products
    reader.feed(torch.zeros(1, len(products), tokens + recent, 64), k[:, :, :-1])
    return [positions(head) for head in reader.feed(q, k[:, :, -1:])[0, :, 0, :tokens]]


CARD = [[10.0, 0.0, 0.0, 9.0], [0.0, 1.0, 1.2, 0.0]]
SCALED = (8 * torch.tensor(CARD)).tolist()  # products that are the card's scores once they are scaled


def test_known_answer_of_the_soft_vote():
    """Votes 0.86, 0.34, 0.41, 0.39; the sums of the scores would rank 0, 3, 2, 1."""
    for room, wanted in ((1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        assert known(SCALED, room) == [wanted, wanted]


def test_the_heads_of_a_layer_share_one_list_or_have_their_own():
    assert known(SCALED, 2, heads=2) == [[0, 2], [0, 2]]
    assert known(SCALED, 2, ", scope=kv_head", heads=2) == [[0, 3], [1, 2]]
    assert known(SCALED, 2, ", scope=kv_head") == [[0, 2], [0, 2]]
    assert known(SCALED, 2, ", scope=query_head") == [[0, 3], [1, 2]]


def test_raw_votes_leave_out_the_scale():
    """Scores an eighth as far apart vote for 0 and 3."""
    assert known(CARD, 2) == [[0, 3], [0, 3]]
    assert known(CARD, 2, ", raw=True") == [[0, 2], [0, 2]]
    assert known(SCALED, 2) == known(CARD, 2, ", raw=True")


def test_a_head_that_looks_at_what_is_read_anyway_has_little_to_say_but_in_raw_votes():
    """As far as the first head is concerned, everything is in the newest token."""
    reads = {}
    for raw in (False, True):
        reader = Reader(f"tokenselect(budget=10, raw={raw}) + sink=0 + recent=7 + block=1", scale=0.125)
        k, q = torch.eye(64)[:12].expand(1, 1, -1, -1), torch.zeros(1, 2, 1, 64)
        q[0, :, 0, :4] = torch.tensor(CARD if raw else SCALED)
        q[0, 0, 0, 11] = 200
        reader.feed(torch.zeros(1, 2, 11, 64), k[:, :, :-1])
        reads[raw] = positions(reader.feed(q, k[:, :, -1:])[0, 1, 0, :4])
    assert reads == {False: [1, 2], True: [0, 2]}


def test_raw_votes_do_not_depend_on_a_models_scale():
    assert known(CARD, 2, ", raw=True", scale=0.02) == [[0, 2], [0, 2]]


def test_ties_go_to_the_lower_position():
    assert known([[1.0, 1.0, 1.0, 1.0]], 2) == [[0, 1]]


# --------------------------------------------------------------------------------------------- against the definition
def tensors(seed, rows, tokens, pace=1.0, heads=HEADS, group=GROUP):
    """Keys at random, and queries that go on from each other, at a pace from 0 (none) to 1 (at random)."""
    make = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, h, tokens, D, generator=make) for h in (heads * group, heads))
    for i in range(1, tokens):
        q[:, :, i] = pace * q[:, :, i] + (1 - pace**2) ** 0.5 * q[:, :, i - 1]
    return 2 * q, k


def ranked(q, k, inside, scope):
    """Positions of the body, of which `inside` [n] marks the tokens, best first for each query head: q [Hq, d] the newest
    query, k [H, n, d]."""
    group = len(q) // len(k)
    logits = SCALE * (k.repeat_interleave(group, 0) @ q.unsqueeze(-1)).squeeze(-1)
    together = {"layer": len(q), "kv_head": group, "query_head": 1}[scope]
    body, found = inside.nonzero().flatten(), []
    for voters in logits.split(together):
        order = best_first(shares(voters[:, inside], voters[:, ~inside]))
        found += [body[order].tolist()] * together
    return found


def cosine(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(
    ("budget", "scope", "theta"),
    [
        (24, "layer", 0.8),
        (24, "layer", 0.9),
        (40, "layer", -1),
        (24, "layer", 1.01),
        (0.4, "kv_head", 0.9),
        (8, "query_head", 0.9),
    ],
)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**20),
    pace=st.sampled_from([0.2, 0.4, 0.6]),
    pad=st.integers(0, 20),
    chunk=st.sampled_from([11, 64]),
)
def test_a_step_reads_sinks_tail_and_the_winners_up_to_the_budget(budget, scope, theta, seed, pace, pad, chunk):
    """Each row of a batch as by the definition for that row alone, its last choice included."""
    prompt, steps = 64, 24
    q, k = tensors(seed, 2, prompt + steps, pace)
    reader = Reader(f"tokenselect(budget={budget}, scope={scope}, theta={theta})", 2, scale=SCALE)
    for i in range(0, prompt, chunk):
        columns = min(chunk, prompt - i)
        new = [columns, min(columns, max(0, i + columns - pad))]
        reader.feed(q[:, :, i : i + columns], k[:, :, i : i + columns], new)
    reader.group.finish_prefill()
    last = {}
    for i in range(prompt, prompt + steps):
        sinks, sealed = reader.sinks.copy(), reader.sealed.copy()
        out = reader.feed(q[:, :, i : i + 1], k[:, :, i : i + 1])[:, :, 0]
        for row, begin in ((0, 0), (1, pad)):
            n, total = i + 1 - begin, budget if isinstance(budget, int) else round(budget * (prompt - begin))
            read = [positions(head) for head in out[row]]
            assert {len(x) for x in read} == {min(total, n)}
            place = torch.arange(n)
            inside = (place >= int(sinks[row])) & (place < int(sealed[row]))
            if inside.any():
                query = q[row, :, i]
                order, of, at = last.get(row, (None, query, -1))
                if order is None or at != sealed[row] or cosine(query, of) < theta:
                    order, of = ranked(query, k[row, :, begin : i + 1], inside, scope), query
                    last[row] = order, of, sealed[row]
                always = (~inside).nonzero().flatten().tolist()
                assert read == [sorted(always + head[: total - len(always)]) for head in order]


def reads(q, k, recipe="tokenselect(budget=24)"):
    """What the last of some tokens reads, the others being the prompt: [Hq][24]."""
    reader = Reader(recipe, scale=SCALE)
    reader.feed(q[:, :, :-1], k[:, :, :-1])
    return [positions(head) for head in reader.feed(q[:, :, -1:], k[:, :, -1:])[0, :, 0]]


@given(st.integers(0, 2**20))
@settings(max_examples=10)
def test_every_head_has_one_vote_whatever_its_scores_and_its_place(seed):
    q, k = tensors(seed, 1, 90)
    q[..., 0], k[..., 0] = 0, 1  # what is added to this channel of a query is added to all scores of its head
    wanted = reads(q, k)
    assert len({tuple(x) for x in wanted}) == 1 and len(wanted[0]) == 24
    louder = q.clone()
    louder[:, 1, :, 0] = 30
    assert reads(louder, k) == wanted
    assert reads(q.flip(1), k.flip(1)) == wanted
    assert reads(torch.cat([q, q], 1), torch.cat([k, k], 1)) == 2 * wanted


def test_query_heads_vote_with_the_keys_of_their_own_kv_head():
    """Hq=4, Hkv=2: heads 0 and 1 read the first keys, 2 and 3 the second; h mod Hkv would pair 1 with the second."""
    q, k = torch.zeros(1, 4, 41, D), torch.randn(1, 2, 41, D) / 8
    k[0, 0, 10, 0], k[0, 0, 20, 1], k[0, 1, 15, 0], k[0, 1, 25, 1] = 12, 12, 12, 12
    q[0, [0, 1], -1, 0], q[0, [2, 3], -1, 1] = 9, 9
    for scope, wanted in (("layer", 4 * [{10, 25}]), ("kv_head", [{10}, {10}, {25}, {25}])):
        found = reads(q, k, f"tokenselect(budget=10, scope={scope}) + sink=0 + recent=7 + block=1")
        special = [{10, 15, 20, 25} & set(head) for head in found]
        assert special == wanted


@torch.no_grad()
def test_streaming_heads_do_not_vote(tmp_path):
    """Head split: the second KV head of the first layer streams, so its query heads' queries are nobody's business."""
    HeadTable(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), "test").save(tmp_path / "heads.tsv")
    recipe = f"duo_attention(sparsity=0.5, heads='{tmp_path}/heads.tsv', sink=4, recent=8) + tokenselect(budget=24)"
    q, k = tensors(0, 1, 101, group=4)
    v = torch.eye(101).expand(1, HEADS, -1, -1)
    found = []
    for streaming in (q[:, 4:], 5 * torch.randn(1, 4, 101, D)):
        layer = kvlib.Cache(tiny_model(), recipe).managed[0].store
        both = torch.cat([q[:, :4], streaming], 1)
        layer.forward(both[:, :, :100], k[:, :, :100], v[:, :, :100], None, Spec(SCALE))
        out = layer.forward(both[:, :, 100:], k[:, :, 100:], v[:, :, 100:], None, Spec(SCALE))[0, :, 0]
        found.append([positions(head) for head in out])
    alone = reads(q[:, :4], k[:, :1])
    assert [found[0][:4], found[1][:4]] == [alone, alone]
    assert found[0][4:] == 4 * [[*range(4), *range(93, 101)]]
    assert reads(q, k) != 2 * alone  # they would have made a difference


# --------------------------------------------------------------------------------------- the choice that serves again
def fed(recipe, q, k, prompt, rows=1, **more):
    reader = Reader(recipe, rows, scale=SCALE, **more)
    reader.feed(q[:, :, :prompt], k[:, :, :prompt])
    return reader


def test_a_threshold_above_one_chooses_at_every_step_to_the_bit():
    @dataclass(frozen=True)
    class Forgetful(TokenSelect):
        """No reuse at all."""

        name: ClassVar[str] = "forgetful"
        remembers: ClassVar[bool] = False
        reuse = Selector.reuse

    q, k = tensors(0, 1, 130, pace=0.1)
    outs = []
    for select in (TokenSelect(24, theta=1.01), Forgetful(24)):
        reader = Reader("full", scale=SCALE)
        reader.group.__init__(selector=select)
        reader.feed(q[:, :, :100], k[:, :, :100])
        outs.append(reader.steps(q[:, :, 100:], k[:, :, 100:]))
    assert torch.equal(*outs)


def test_the_cosine_is_of_all_heads_together():
    """One head of little weight turns about: cosine (100 - 1) / 101, and the mean of the heads' own would be 0."""
    q, k = tensors(0, 1, 102, group=1)
    q[0, 0, 101] = q[0, 0, 100] = 10 * q[0, 0, 100] / q[0, 0, 100].norm()
    q[0, 1, 100] /= q[0, 1, 100].norm()
    q[0, 1, 101] = -q[0, 1, 100]
    for theta, again in ((0.97, True), (0.99, False)):
        reader = fed(f"tokenselect(budget=24, theta={theta}, scope=kv_head)", q, k, 100)
        first, second = (set(positions(head)) for head in reader.steps(q[:, :, 100:], k[:, :, 100:])[0, 1])
        assert (second - {101} <= first) == again


def test_whatever_was_just_sealed_can_be_read_at_once():
    """Nothing that leaves the tail is out of reach, even where the last choice would serve for ever."""
    q, k = tensors(0, 1, 180)
    reader = fed("tokenselect(budget=32, theta=-1)", q, k, 100)
    reader.group.finish_prefill()
    new, seals = range(0), 0
    for i in range(100, 180):
        before = int(reader.sealed[0])
        # The step after a block has left the tail asks for one of its tokens.
        query = 20 * k[:, :, new[:1]].repeat_interleave(GROUP, 1) if new else q[:, :, i : i + 1]
        out = reader.feed(query, k[:, :, i : i + 1])[0, :, 0]
        assert (out[:, new[:1]] > 0).all()
        seals += bool(new)
        new = range(before, int(reader.sealed[0]))
    assert seals >= 9


@pytest.mark.parametrize("theta", ["-1", "0.9"])
def test_only_accepted_drafts_count(theta):
    """Rejected queries lie far off, and blocks fall due among them."""
    q, k = tensors(0, 1, 160, pace=0.4)
    plain, drafted = (fed(f"tokenselect(budget=24, theta={theta})", q, k, 100) for _ in range(2))
    for reader in (plain, drafted):
        reader.group.finish_prefill()
    wanted, at = plain.steps(q[:, :, 100:], k[:, :, 100:]), 100
    for accepted, rejected in ((3, 4), (0, 1), (1, 0), (0, 9), (7, 7), (12, 1), (1, 3), (2, 8), (20, 0), (14, 5)):
        wrong = [20 * torch.randn(1, h, rejected, D) for h in (HEADS * GROUP, HEADS)]
        right = [x[:, :, at : at + accepted] for x in (q, k)]
        both = [torch.cat(pair, 2) for pair in zip(right, wrong, strict=True)]
        out = drafted.feed(*both, recording=True)[:, :, :accepted]
        drafted.group.crop(rejected)
        here = wanted[:, :, at - 100 : at - 100 + accepted]
        assert torch.equal(out > 0, here > 0)
        assert torch.allclose(out, here, atol=1e-6)
        at += accepted
    assert at == 160
    assert all(torch.equal(a, b) for a, b in zip(plain.group.past.tensors(), drafted.group.past.tensors(), strict=True))


def test_a_new_sequence_and_a_new_prompt_chunk_choose_afresh():
    q, k = tensors(0, 1, 103)
    other, others = tensors(1, 1, 103)
    used, fresh = (
        fed("tokenselect(budget=24, theta=-1)", q, k, 100),
        fed("tokenselect(budget=24, theta=-1)", other, others, 100),
    )
    used.steps(q[:, :, 100:101], k[:, :, 100:101])
    used.group.clear()
    used.feed(other[:, :, :100], others[:, :, :100])
    last = slice(100, 101)
    assert torch.equal(used.feed(other[:, :, last], others[:, :, last]), fresh.feed(other[:, :, last], others[:, :, last]))
    reader = fed("tokenselect(budget=40, theta=-1)", q, k, 98)
    reader.steps(q[:, :, 98:99], k[:, :, 98:99])
    sealed = int(reader.sealed[0])
    reader.feed(q[:, :, 99:101], k[:, :, 99:101])
    assert reader.sealed[0] == sealed  # too little for a block
    out = reader.feed(q[:, :, 101:102], k[:, :, 101:102])[0, :, 0]
    place = torch.arange(102)
    inside = (place >= int(reader.sinks[0])) & (place < sealed)
    always = (~inside).nonzero().flatten().tolist()
    order = ranked(q[0, :, 101], k[0, :, :102], inside, "layer")
    assert [positions(head) for head in out] == [sorted(always + head[: 40 - len(always)]) for head in order]


def test_rows_change_places_with_their_choices():
    q, k = tensors(0, 2, 130, pace=0.4)
    recipe = "tokenselect(budget=24, theta=0.8)"
    still, moved = (Reader(recipe, 2, scale=SCALE) for _ in range(2))
    for reader in (still, moved):
        reader.feed(q[:, :, :100], k[:, :, :100], [100, 83])
        reader.steps(q[:, :, 100:107], k[:, :, 100:107])
    moved.group.reorder(torch.tensor([1, 0]))
    wanted = still.steps(q[:, :, 107:], k[:, :, 107:])
    assert torch.equal(moved.steps(q[:, :, 107:].flip(0), k[:, :, 107:].flip(0)).flip(0) > 0, wanted > 0)


def test_a_row_that_takes_a_break_goes_on_as_if_there_had_been_none():
    q, k = tensors(0, 2, 130, pace=0.4)
    lone = fed("tokenselect(budget=24, theta=0.8)", q[1:], k[1:], 100)
    both = fed("tokenselect(budget=24, theta=0.8)", q, k, 100, rows=2)
    for i in range(100, 130):
        if i % 3 == 0:  # columns that are padding in row 1: another's step, or its next turn
            n = 4 if i % 2 else 1
            both.feed(10 * torch.randn(2, HEADS * GROUP, n, D), torch.randn(2, HEADS, n, D), [n, 0])
        one, two = (reader.feed(q[-n:, :, i : i + 1], k[-n:, :, i : i + 1]) for n, reader in ((1, lone), (2, both)))
        assert torch.equal(two[1:] > 0, one > 0)


# ------------------------------------------------------------------------------------------------------ in host memory
@torch.no_grad()
def test_on_the_host_values_move_and_keys_stay():
    model, (ids, mask) = tiny_model(), prompts(2, 96, 17)
    host, device = (kvlib.Cache(model, f"tokenselect(budget=24){tier}") for tier in (" @ host", ""))
    tokens = [
        model.generate(ids, attention_mask=mask, past_key_values=c, max_new_tokens=24, do_sample=False)
        for c in (host, device)
    ]
    assert torch.equal(*tokens)
    body = 0
    for layer in host.managed:
        (group,) = layer.store.groups
        assert group.body.store.host == {"v.x"}
        body += int(group.body.counts.sum())
    one = body * 2 * 16 * 4
    used = host.nbytes(used=True)
    assert used["host"] == one
    assert host.nbytes()["host"] >= one
    assert device.nbytes()["host"] == 0
    assert host.nbytes(by="part", used=True)["body"] == 2 * one
    hits, misses, moved = host.traffic()
    assert moved == misses * 16 * 4  # a value each
    assert hits > 0 and misses > 0


def test_the_defaults_are_the_papers():
    select = TokenSelect()
    split = select.split(np.array([100_000]), Recipe().sizes)
    assert (select.theta, select.scope, select.raw) == (0.9, "layer", False)
    assert [int(x[0]) for x in (split.sink, split.recent, split.block + split.body)] == [128, 512, 2048]


def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(RecipeError, match=r"host\(attend=True\): tokenselect reads every key at every step.*'@ host'"):
        Recipe.parse("tokenselect(budget=64) @ host(attend=True)")
    with pytest.raises(RecipeError, match=r"tokenselect\(theta=high\): give a cosine"):
        Recipe.parse("tokenselect(theta=high)")
    with pytest.raises(RecipeError, match=r"tokenselect\(raw=1\): give True or False"):
        Recipe.parse("tokenselect(raw=1)")
    with pytest.raises(RecipeError, match=r"tokenselect\(scope=model\): give one of kv_head, layer, query_head"):
        Recipe.parse("tokenselect(scope=model)")
    recipe = Recipe.parse("tokenselect(budget=64, scope=kv_head, theta=-1, raw=True) @ host")
    assert Recipe.parse(str(recipe)) == recipe
    assert dataclasses.replace(recipe.select, budget=2688) == TokenSelect(scope="kv_head", theta=-1, raw=True)
