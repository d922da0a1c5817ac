"""Double Sparsity: tokens ranked by a few key channels, which a table or each row's own prompt has ranked."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.hf import Prompt
from kvlib.policies import RecipeError
from kvlib.policies.heads.table import HeadTable
from kvlib.policies.select.channels import ChannelTable
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.testing import prompts, tiny_model
from tests.reading import Reader, best_first, positions, shares

HEADS, GROUP, D, SCALE = 2, 2, 16, 16**-0.5


def saved(order, path):
    """A table file of channels order [layers, kv_heads, d], the most important first."""
    order = np.asarray(order)
    weight = np.take_along_axis(np.broadcast_to(np.arange(order.shape[2], 0, -1.0), order.shape), order.argsort(-1), -1)
    ChannelTable(order, "test", weight).save(path)
    return str(path)


def tensors(seed, rows, tokens, heads=HEADS, group=GROUP):
    """Random queries and keys whose channels differ in size, by row and head in another order."""
    make = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, h, tokens, D, generator=make) for h in (heads * group, heads))
    order = torch.rand(rows, heads, 1, D, generator=make).argsort(-1)
    return q, k * 1.25 ** (order - D // 2)


def ranks(q, k):
    """Channels by the sum over tokens of |sum over the group of q * k|: one row's q [Hq, n, d], k [H, n, d] -> [H, d]."""
    group = len(q) // len(k)
    summed = torch.stack([sum(q[h * group + g].double() * k[h].double() for g in range(group)) for h in range(len(k))])
    return summed.abs().sum(1).sort(descending=True, stable=True).indices


def ranked(q, k, channels, inside, scope="kv_head"):
    """Positions of the body, of which `inside` [n] marks the tokens, best first for each query head: q [Hq, d] the newest
    query, k [H, n, d], channels [H, c]."""
    group, c = len(q) // len(k), channels.shape[1]
    kv = [h // group for h in range(len(q))]
    label = torch.stack([k[h][:, channels[h]] @ q_head[channels[h]] for h, q_head in zip(kv, q, strict=True)])
    logits = SCALE * (D / c) ** 0.5 * label
    true = SCALE * (k[kv] @ q.unsqueeze(-1)).squeeze(-1)
    together = {"layer": len(q), "kv_head": group, "query_head": 1}[scope]
    body, found = inside.nonzero().flatten(), []
    for i in range(0, len(q), together):
        voters = slice(i, i + together)
        order = best_first(shares(logits[voters, inside], true[voters, ~inside]))
        found += [body[order].tolist()] * together
    return found


def check_step(reader, q, k, channels, budget, scope="kv_head", row=0, **feeding):
    """Feed the last of some tokens q [Hq, n, d], k [H, n, d], all of them of one row, and compare what it reads."""
    sinks, sealed, n = int(reader.sinks[row]), int(reader.sealed[row]), k.shape[1]
    out = reader.feed(q[None, :, -1:], k[None, :, -1:], **feeding)[row, :, 0]
    inside = (torch.arange(n) >= sinks) & (torch.arange(n) < sealed)
    always = (~inside).nonzero().flatten().tolist()
    order = ranked(q[:, -1], k, channels, inside, scope)
    assert inside.any()
    assert [positions(head) for head in out] == [sorted(always + head[: budget - len(always)]) for head in order]


# ------------------------------------------------------------------------------------------------------- known answers
def known(room, channels, path, factor):
    """Which of the card's four keys are read where there is room for so many."""
    table, recent = saved([[channels]], path), 9 - room
    recipe = f"double_sparsity(budget=10, factor={factor}, channels='{table}') + sink=0 + recent={recent} + block=1"
    reader = Reader(recipe, places=np.array([0]), scale=0.5)
    k = torch.tensor([(5, 0, 0, 0), (0, 2, 9, 0), (0, 1, 0, -3), (1, 0, 3, 2), *(recent + 1) * [(0, 0, 0, 0)]]).float()[
        None, None
    ]
    q = torch.tensor([1.0, 2, 0, -1]).expand(1, 1, k.shape[2], 4)
    reader.feed(q[:, :, :-1], k[:, :, :-1])
    return [p for p in positions(reader.feed(q[:, :, -1:], k[:, :, -1:])[0, 0, 0]) if p < 4]


def test_known_answer_of_two_channels_of_four(tmp_path):
    """Labels 0, 4, 5, -2; the true products are 5, 4, 5, -1."""
    for channels in ([1, 3, 0, 2], [3, 1, 2, 0]):
        for room, wanted in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2])):
            assert known(room, channels, tmp_path / "channels.tsv", 2) == wanted
    for room, wanted in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2])):
        assert known(room, [1, 3, 0, 2], tmp_path / "channels.tsv", 1) == wanted
    assert (
        known(1, [1, 3, 0, 2], tmp_path / "channels.tsv", 4) == known(1, [1, 3, 0, 2], tmp_path / "channels.tsv", 3) == [1]
    )
    assert known(2, [1, 3, 0, 2], tmp_path / "channels.tsv", 99) == [1, 2]  # one channel at least


# --------------------------------------------------------------------------------------------- against the definition
@pytest.mark.parametrize(
    ("budget", "scope", "factor"),
    [(24, "kv_head", 4), (24, "kv_head", 1), (8, "kv_head", 16), (40, "layer", 4), (0.4, "query_head", 2)],
)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**20), pad=st.integers(0, 20), chunk=st.sampled_from([11, 64]))
def test_a_step_reads_what_the_prompts_own_channels_rank_highest(budget, scope, factor, seed, pad, chunk):
    """Each row of a batch by its own prompt without padding, in chunks as at once; factor=1 is the true top-k."""
    prompt, steps = 64, 8
    q, k = tensors(seed, 2, prompt + steps)
    q[1, :, :pad], k[1, :, :pad] = 1e3, -1e3
    reader = Reader(f"double_sparsity(budget={budget}, scope={scope}, factor={factor})", 2, scale=SCALE)
    for i in range(0, prompt, chunk):
        columns = min(chunk, prompt - i)
        new = [columns, min(columns, max(0, i + columns - pad))]
        reader.feed(q[:, :, i : i + columns], k[:, :, i : i + columns], new)
    reader.group.finish_prefill()
    channels = [ranks(q[r, :, begin:prompt], k[r, :, begin:prompt])[:, : D // factor] for r, begin in ((0, 0), (1, pad))]
    for i in range(prompt, prompt + steps):
        sinks, sealed = reader.sinks.copy(), reader.sealed.copy()
        out = reader.feed(q[:, :, i : i + 1], k[:, :, i : i + 1])[:, :, 0]
        for row, begin in ((0, 0), (1, pad)):
            n, total = i + 1 - begin, budget if isinstance(budget, int) else round(budget * (prompt - begin))
            place = torch.arange(n)
            inside = (place >= int(sinks[row])) & (place < int(sealed[row]))
            always = (~inside).nonzero().flatten().tolist()
            order = ranked(q[row, :, i], k[row, :, begin : i + 1], channels[row], inside, scope)
            wanted = [sorted(always + head[: total - len(always)]) for head in order]
            assert [positions(head) for head in out[row]] == wanted
            assert {len(x) for x in wanted} == {min(total, n)}


def test_the_statistic_sums_the_group_before_the_size_is_taken():
    """Two query heads that cancel on the first channel leave it last, although each alone would put it first."""
    q, k = torch.ones(1, 2, 50, D), torch.randn(1, 1, 50, D)
    k[..., 0] = 9 * k[..., 1]
    q[0, 0, :, 0], q[0, 1, :, 0] = 5, -5
    reader = Reader("double_sparsity(budget=24, factor=1)")
    reader.feed(q, k)
    reader.group.finish_prefill()
    assert reader.group.body.fixed["channels"][0, 0, -1] == 0


def test_channels_are_ranked_by_the_prompt_alone_and_stay():
    q, k = tensors(0, 1, 140)
    reader = Reader("double_sparsity(budget=24)", scale=SCALE)
    reader.feed(q[:, :, :90], k[:, :, :90])
    reader.group.finish_prefill()
    first = reader.group.body.fixed["channels"].clone()
    assert first[0].tolist() == ranks(q[0, :, :90], k[0, :, :90])[:, :4].tolist()
    q[:, :, 90:], k[:, :, 90:] = 100 * q[:, :, 90:].flip(-1), k[:, :, 90:].flip(-1)
    assert ranks(q[0], k[0])[:, :4].tolist() != first[0].tolist()
    reader.steps(q[:, :, 90:110], k[:, :, 90:110])
    reader.feed(q[:, :, 110:130], k[:, :, 110:130])  # a second turn
    reader.steps(q[:, :, 130:], k[:, :, 130:])
    assert torch.equal(reader.group.body.fixed["channels"], first)


def test_a_short_prompt_ranks_the_channels_of_what_is_indexed_later():
    q, k = tensors(0, 1, 60)
    q[:, :, 20:], k[:, :, 20:] = 100 * q[:, :, 20:].flip(-1), k[:, :, 20:].flip(-1)
    reader = Reader("double_sparsity(budget=24)", scale=SCALE)
    reader.feed(q[:, :, :20], k[:, :, :20])
    reader.steps(q[:, :, 20:], k[:, :, 20:])
    wanted = ranks(q[0, :, :20], k[0, :, :20])[:, :4]
    assert torch.equal(reader.group.body.fixed["channels"][0], wanted)
    assert not torch.equal(ranks(q[0], k[0])[:, :4], wanted)


@pytest.mark.parametrize("tokens", [90, 170])
def test_rejected_drafts_of_an_open_prompt_leave_no_trace(tokens):
    """Of a prompt that came while tokens were provisional; in 170 some are final before the crop."""
    q, k = tensors(0, 1, tokens + 1)
    for rejected in (0, 1, 20):
        wrong = [100 * torch.randn(1, h, rejected, D) for h in (HEADS * GROUP, HEADS)]
        for said in ({}, {"drafts": rejected}):
            reader = Reader("double_sparsity(budget=24)", scale=SCALE)
            both = [torch.cat([x[:, :, :tokens], w], 2) for x, w in zip((q, k), wrong, strict=True)]
            reader.feed(*both, recording=True, **said)
            reader.group.crop(rejected)
            channels = ranks(q[0, :, :tokens], k[0, :, :tokens])[:, :4]
            check_step(reader, q[0], k[0], channels, 24)
            assert torch.equal(reader.group.body.fixed["channels"][0], channels)


def test_accepted_drafts_are_part_of_the_prompt_only_where_nobody_said_they_are_drafts():
    q, k = tensors(0, 1, 101)
    q[:, :, 90:], k[:, :, 90:] = 100 * q[:, :, 90:].flip(-1), k[:, :, 90:].flip(-1)
    for said, counted in (({}, 97), ({"drafts": 10}, 90)):
        reader = Reader("double_sparsity(budget=24)", scale=SCALE)
        reader.feed(q[:, :, :100], k[:, :, :100], recording=True, **said)
        reader.group.crop(3)
        wanted = ranks(q[0, :, :counted], k[0, :, :counted])[:, :4]
        assert reader.group.body.fixed["channels"][0].tolist() == wanted.tolist()
    assert ranks(q[0, :, :97], k[0, :, :97])[:, :4].tolist() != wanted.tolist()


def test_only_accepted_drafts_are_indexed():
    q, k = tensors(0, 1, 160)
    plain, drafted = (Reader("double_sparsity(budget=24)", scale=SCALE) for _ in range(2))
    for reader in (plain, drafted):
        reader.feed(q[:, :, :100], k[:, :, :100])
        reader.group.finish_prefill()
    wanted, at = plain.steps(q[:, :, 100:], k[:, :, 100:]), 100
    for accepted, rejected in ((3, 4), (0, 1), (1, 0), (0, 9), (7, 7), (12, 1), (1, 3), (2, 8), (20, 0), (14, 5)):
        wrong = [20 * torch.randn(1, h, rejected, D) for h in (HEADS * GROUP, HEADS)]
        both = [torch.cat([x[:, :, at : at + accepted], w], 2) for x, w in zip((q, k), wrong, strict=True)]
        out = drafted.feed(*both, recording=True)[:, :, :accepted]
        drafted.group.crop(rejected)
        here = wanted[:, :, at - 100 : at - 100 + accepted]
        assert torch.equal(out > 0, here > 0)
        at += accepted
    assert at == 160


def test_rows_change_places_with_their_channels():
    q, k = tensors(0, 2, 130)
    still, moved = (Reader("double_sparsity(budget=24)", 2, scale=SCALE) for _ in range(2))
    for reader in (still, moved):
        reader.feed(q[:, :, :100], k[:, :, :100], [100, 83])
        reader.steps(q[:, :, 100:107], k[:, :, 100:107])
    moved.group.reorder(torch.tensor([1, 0]))
    wanted = still.steps(q[:, :, 107:], k[:, :, 107:])
    assert torch.equal(moved.steps(q[:, :, 107:].flip(0), k[:, :, 107:].flip(0)).flip(0) > 0, wanted > 0)


# ------------------------------------------------------------------------------------------------------------ the channels
@pytest.mark.parametrize("table", [False, True])
def test_the_order_of_the_channels_in_memory_does_not_matter(table, tmp_path):
    q, k = tensors(0, 1, 120)
    order, shuffle = np.stack([np.random.default_rng(i).permutation(D) for i in (1, 2)]), torch.randperm(D)
    inverse = shuffle.argsort().numpy()  # where a channel has gone
    outs = []
    for name, columns, channels in (("a", slice(None), order), ("b", shuffle, inverse[order])):
        given = f", channels='{saved(channels[None], tmp_path / name)}'" if table else ""
        reader = Reader(f"double_sparsity(budget=24, factor=4{given})", places=np.arange(2), scale=SCALE)
        reader.feed(q[:, :, :100, columns], k[:, :, :100, columns])
        outs.append(reader.steps(q[:, :, 100:, columns], k[:, :, 100:, columns]))
    assert torch.equal(outs[0] > 0, outs[1] > 0)


def test_recall_rises_with_the_channels_and_is_complete_with_all():
    q, k = tensors(0, 4, 230)
    outs, recall = {}, []
    for factor in (1, 2, 4, 8, 16):
        reader = Reader(f"double_sparsity(budget=30, factor={factor}) + sink=0 + recent=9 + block=1", 4, scale=SCALE)
        reader.feed(q[:, :, :200], k[:, :, :200])
        outs[factor] = reader.steps(q[:, :, 200:], k[:, :, 200:]) > 0
        newest = torch.stack([(torch.arange(384) >= i - 9) & (torch.arange(384) <= i) for i in range(200, 230)])
        chosen = outs[factor] & ~newest
        assert (chosen.sum(-1) == 20).all()
        recall.append(float((chosen & outs[1]).sum(-1).float().mean()) / 20)
    assert recall[0] == 1
    assert all(more > less + 0.02 for more, less in itertools.pairwise(recall))
    oracle = Reader("tokenselect(budget=30, scope=kv_head, theta=2) + sink=0 + recent=9 + block=1", 4, scale=SCALE)
    oracle.feed(q[:, :, :200], k[:, :, :200])
    assert torch.equal(oracle.steps(q[:, :, 200:], k[:, :, 200:]) > 0, outs[1])


@torch.no_grad()
def test_a_table_gives_every_row_the_channels_of_its_own_head(tmp_path):
    """Under a head split too: in layer 1 only the second KV head selects."""
    HeadTable(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), "test").save(tmp_path / "heads.tsv")
    order = np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]).reshape(3, 2, 16)
    select = f"double_sparsity(budget=24, factor=4, channels='{saved(order, tmp_path / 'channels.tsv')}')"
    split = f"duo_attention(sparsity=0.5, heads='{tmp_path}/heads.tsv', sink=4, recent=8)"
    q, k = tensors(0, 2, 101, group=4)
    v = torch.eye(101).expand(2, HEADS, -1, -1)
    for recipe, selecting in ((select, (0, 1)), (f"{split} + {select}", (1,))):
        layer = kvlib.Cache(tiny_model(), recipe).managed[1].store
        layer.forward(q[:, :, :100], k[:, :, :100], v[:, :, :100], None, Spec(SCALE))
        layer.finish_prefill()
        group = layer.groups[0]
        sealed = int((group.tokens - group.tail.lengths)[0])
        out = layer.forward(q[:, :, 100:], k[:, :, 100:], v[:, :, 100:], None, Spec(SCALE))[:, :, 0]
        inside = (torch.arange(101) >= int(group.sink.counts[0, 0])) & (torch.arange(101) < sealed)
        always = (~inside).nonzero().flatten().tolist()
        for row in range(2):
            for head in selecting:
                channels = torch.from_numpy(order[1, head, :4].copy())[None]
                (wanted, *_) = ranked(q[row, 4 * head : 4 * head + 4, 100], k[row, head : head + 1], channels, inside)
                found = [positions(x) for x in out[row, 4 * head : 4 * head + 4]]
                assert found == 4 * [sorted(always + wanted[: 24 - len(always)])]


@torch.no_grad()
def test_a_report_says_where_the_channels_come_from_and_the_index_is_counted(tmp_path):
    model, (ids, mask) = tiny_model(), prompts(2, 96, 17)
    table = saved(np.tile(np.arange(16), (3, 2, 1)), tmp_path / "channels.tsv")
    for ranked_by, source in (("", "each row's own prompt"), (f", channels='{table}'", table)):
        cache = kvlib.Cache(model, f"double_sparsity(budget=24, factor=8{ranked_by})")
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False)
        assert f"channels ranked by {source}" in cache.report()
        body = sum(int(layer.store.groups[0].body.counts.sum()) for layer in cache.managed)
        labels, lists = body * 2 * 2 * 4, 3 * 2 * 2 * 2 * 8
        assert cache.nbytes(by="part", used=True)["index"] == labels + lists
        assert cache.nbytes(by="part")["index"] >= labels + lists
        assert cache.nbytes(by="part", used=True)["body"] == body * 2 * 2 * 16 * 4


@torch.no_grad()
@pytest.mark.parametrize("split", [False, True])
def test_a_prompt_that_is_read_once_has_the_same_statistic(split, tmp_path):
    """Whichever of the heads select: one of each layer, or both."""
    model, (ids, mask), recipe = tiny_model(), prompts(2, 96, 17), "double_sparsity(budget=24, factor=4)"
    if split:
        HeadTable(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), "test").save(tmp_path / "heads.tsv")
        recipe = f"duo_attention(sparsity=0.5, heads='{tmp_path}/heads.tsv', sink=4, recent=8) + {recipe}"
    shared, own = Prompt(model, ["full", recipe]), kvlib.Cache(model, recipe)
    shared.read(ids[:, :50], mask[:, :50])
    shared.read(ids[:, 50:], mask)
    adopted = shared.cache(recipe)
    model(ids, attention_mask=mask, past_key_values=own, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for cache in (adopted, own):
        cache.finish_prefill()
    for a, b in zip(adopted.managed, own.managed, strict=True):
        x, y = (layer.store.groups[0].body.fixed["channels"] for layer in (a, b))
        assert x.shape == (2, 1 if split else 2, 4)
        assert torch.equal(x, y)


@torch.no_grad()
def test_a_long_prompt_in_host_memory_has_the_channels_of_its_table(tmp_path):
    """Prompts leave the device as they come, before they end."""
    table = saved(np.stack([np.random.default_rng(i).permutation(D) for i in range(2)])[None], tmp_path / "channels.tsv")
    recipe = f"double_sparsity(budget=24, factor=4, channels='{table}')"
    q, k = tensors(0, 1, 8400, group=1)
    v, outs = k.flip(-1), []
    for tier in ("", " @ host"):
        group = Reader(recipe + tier, places=np.arange(2)).group
        for i in range(0, 8390, 1000):
            stop = min(i + 1000, 8390)
            group.forward(q[:, :, i:stop], k[:, :, i:stop], v[:, :, i:stop], None, Spec(SCALE), recording=False)
        steps = [x[:, :, 8390:8391] for x in (q, k, v)]
        outs.append(group.forward(*steps, None, Spec(SCALE), recording=False))
    assert torch.allclose(*outs, atol=1e-5)


def test_tables_that_cannot_serve_are_refused_by_name(tmp_path):
    good = saved(np.tile(np.arange(16), (3, 2, 1)), tmp_path / "good.tsv")
    assert Recipe.parse(str(Recipe.parse(f"double_sparsity(budget=24, channels='{good}')"))).select.channels == good
    with pytest.raises(RecipeError, match=r"double_sparsity\(channels=missing.tsv\): no such file: make one with `kvlib"):
        Recipe.parse("double_sparsity(channels=missing.tsv)")
    for text in ("", "hello\n", '# {"format": "other"}\n0:1\n', good_but(good, 1)):
        bad = tmp_path / "bad.tsv"
        bad.write_text(text)
        with pytest.raises(
            RecipeError, match=r"double_sparsity\(channels=.*bad.tsv'?\): .*make one with `kvlib channels identify`"
        ):
            Recipe.parse(f"double_sparsity(channels='{bad}')")
    other = saved(np.tile(np.arange(16), (3, 4, 1)), tmp_path / "other.tsv")
    with pytest.raises(
        RecipeError, match=r"channels=.*other.tsv'?\): its shape is \(3, 4, 16\), .* = \(3, 2, 16\): give its own"
    ):
        kvlib.Cache(tiny_model(), f"double_sparsity(channels='{other}')")
    kvlib.Cache(tiny_model(), f"double_sparsity(channels='{good}')")
    with pytest.raises(RecipeError, match=r"double_sparsity\(factor=0\): give a whole number, 1 or more"):
        Recipe.parse("double_sparsity(factor=0)")
    with pytest.raises(RecipeError, match=r"double_sparsity\(channels=7\): give the path"):
        Recipe.parse("double_sparsity(channels=7)")


def good_but(path, lines):
    """A table with some lines cut off."""
    with open(path) as file:
        return "".join(file.readlines()[:-lines])
