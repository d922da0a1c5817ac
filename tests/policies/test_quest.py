"""Quest reads the pages that promise most; LServe ranks them by finer ones, keeps a choice, and lets other heads stream."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import census
from kvlib.kernels.selection import top
from kvlib.policies import DuoAttention, LServe, Quest, RecipeError
from kvlib.policies.select.quest import KINDS
from kvlib.policies.selection import Block, Index
from kvlib.segment import Spec
from kvlib.testing import CHECKS, check_policy, prompts, tiny_model
from tests.reader import SPEC, Reader, attention_over, check_read, cloud, lists_of, places, ranked, together

kinds = pytest.mark.parametrize("bounds", KINDS)


def index_of(quest, k):
    """The pages of keys k [B, H, n, d] that make a body."""
    positions = torch.arange(k.shape[2]).expand(k.shape[:3])
    first, heads = np.zeros(len(k), dtype=np.int64), np.arange(k.shape[1])
    block = Block(k, k, positions, first, heads, limit=quest.page, fixed={}, ids=lambda *_: k)
    units = quest.build(block)
    return Index(summary=units.summary, size=units.size, fixed={}, products=None)


def promised(quest, q, k):
    """Score of every page of k [B, H, n, d] by every query head of q [B, Hq, d]."""
    return quest.logits(q, index_of(quest, k))


def best_in_page(q, k, page):
    """The largest true product of each page, [B, Hq, pages]."""
    true = torch.einsum("bhd,bhnd->bhn", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return true.unflatten(-1, (-1, page)).amax(-1)


def formula(q, keys, bounds):
    """What a page of keys [n, d] promises q [d]."""
    high, low = keys.amax(0), keys.amin(0)
    if bounds == "minmax":
        return torch.maximum(q * high, q * low).sum()
    centre, around = (high + low) / 2, None
    around = (keys - centre).abs().mean(0)
    if bounds == "meanstd":
        centre, around = keys.mean(0), keys.std(0, correction=0)
    return torch.maximum(q * (centre + around), q * (centre - around)).sum()


# --------------------------------------------------------------------------------------------------------- the bounds
@given(
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([(1, 1), (2, 3), (3, 1)]),
    st.integers(1, 20),
    st.integers(0, 1000),
)
def test_no_key_exceeds_what_its_page_promises(page, shape, d, seed):
    heads, group = shape
    q, k = cloud(seed, 2, heads * group, d), cloud(seed + 1, 2, heads, 5 * page, d)
    found, true = promised(Quest(48, page=page), q, k), best_in_page(q, k, page)
    assert found.shape == true.shape
    assert (found >= true - 1e-4).all()
    if page == 1:
        torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)


@given(st.sampled_from([(4, 1), (4, 2), (12, 3)]), st.integers(1, 12), st.integers(0, 1000))
def test_a_finer_ranking_promises_less_and_still_enough(sizes, d, seed):
    page, logical = sizes
    q, k = cloud(seed, 2, 4, d), cloud(seed + 1, 2, 2, 6 * page, d)
    flat, fine = (promised(Quest(48, page=page, logical=x), q, k) for x in (0, logical))
    assert (flat >= fine - 1e-5).all()
    assert (fine >= best_in_page(q, k, page) - 1e-4).all()
    if d > 1:
        assert (flat > fine + 1e-3).any()
    small = promised(Quest(48, page=logical), q, k).unflatten(-1, (-1, page // logical)).amax(-1)
    torch.testing.assert_close(fine, small)


@kinds
@pytest.mark.parametrize("logical", [0, 4])
def test_a_page_promises_what_its_formula_says(bounds, logical):
    q, k = cloud(0, 2, 6, 5), cloud(1, 2, 2, 40, 5)
    found = promised(Quest(24, page=8, bounds=bounds, logical=logical), q, k)
    for row in range(2):
        for h in range(6):
            for page in range(5):
                keys = k[row, h // 3, 8 * page : 8 * page + 8].split(logical or 8)
                wanted = max(formula(q[row, h], part, bounds) for part in keys)
                torch.testing.assert_close(found[row, h, page], wanted, atol=1e-5, rtol=1e-5)


@kinds
def test_known_answer_of_a_loose_box(bounds):
    """The page of the largest score has no key of a large product; of two keys, mean and spread say the same as the box."""
    k = torch.tensor([[[[1.0, 0], [0, 1], [3, -3], [-3, 3], [2, 2], [2, 1]]]])
    q = torch.ones(1, 1, 2)
    assert promised(Quest(48, page=2, bounds=bounds), q, k).tolist() == [[[2, 6, 4]]]
    assert best_in_page(q, k, 2).tolist() == [[[1, 0, 4]]]


def test_an_outlier_widens_a_box_more_than_a_spread():
    k = torch.zeros(1, 1, 16, 4)
    k[0, 0, 0] = torch.tensor([8.0, -8, 8, -8])
    q = torch.ones(1, 1, 4)
    box, spread, cuboid = (promised(Quest(48, bounds=bounds), q, k).item() for bounds in KINDS)
    assert box == 16
    assert spread == pytest.approx(4 * 8 * (15 / 256) ** 0.5)
    assert cuboid == pytest.approx(4 * 4)  # every key of the page is as far from the centre as the outlier


def test_known_answer_of_pages_in_pages():
    one, other = [[3.0, 0], [2.9, 0.1], [0, 3], [0.1, 2.9]], [[2.0, 2]] * 4
    k, q = torch.tensor([[one + other]]), torch.ones(1, 1, 2)
    torch.testing.assert_close(promised(Quest(48, page=4), q, k), torch.tensor([[[6.0, 4]]]))
    torch.testing.assert_close(promised(Quest(48, page=4, logical=2), q, k), torch.tensor([[[3.1, 4]]]))
    torch.testing.assert_close(best_in_page(q, k, 4), torch.tensor([[[3.0, 4]]]))


def test_as_many_pages_as_a_long_text_has():
    """More than a CPU multiplies in the usual way."""
    q, k = cloud(0, 2, 6, 8), cloud(1, 2, 2, 2 * 8200, 8)
    torch.testing.assert_close(promised(Quest(48, page=1), q, k), best_in_page(q, k, 1), atol=1e-5, rtol=1e-5)
    assert (promised(Quest(48, page=2), q, k) >= best_in_page(q, k, 2) - 1e-5).all()


def test_what_a_page_is_known_by_costs_two_vectors_of_the_keys_type():
    for bounds in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            summary = index_of(Quest(48, bounds=bounds, logical=4), cloud(0, 1, 2, 48, 8).to(dtype)).summary
            assert sum(x.numel() for x in summary.values()) == 2 * (48 // 4) * 2 * 8
            assert {x.dtype for x in summary.values()} == {dtype}


def test_smaller_pages_find_more():
    """Average share of the true best that is in the pages taken, equally many tokens of random keys."""
    q, k = cloud(0, 40, 4, 8), cloud(1, 40, 2, 512, 8)
    true = best_in_page(q, k, 1)
    best = torch.zeros_like(true).scatter_(-1, top(true, 64), 1.0)
    found = []
    for page in (32, 16, 8, 4, 2, 1):
        taken = top(promised(Quest(512, page=page), q, k), 64 // page)
        taken = (taken.unsqueeze(-1) * page + torch.arange(page)).flatten(2)
        found.append(best.gather(-1, taken).mean().item())
    assert found == sorted(found)
    assert found[0] > 64 / 512
    assert found[-1] == 1


# -------------------------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize(
    "recipe",
    [
        "quest(budget=48)",
        "quest(budget=40, page=8)",
        "quest(budget=40, page=8, bounds=meanstd)",
        "quest(budget=40, page=8, bounds=cuboid)",
        "quest(budget=40, page=8, logical=2)",
        "quest(budget=40, page=8, scope=query_head)",
        "quest(budget=40, page=8, scope=layer)",
        "quest(budget=40, page=8) + sink=0 + recent=1",
        "quest(budget=48) + recent=32",
        "quest(budget=24, page=1)",
        "quest(budget=3, page=1)",
        "quest(budget=40, page=8) @ host",
        "quest(budget=40, page=8, scope=layer) @ host",
        "quest(budget=40, page=8) @ host(attend=True)",
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_every_step_reads_its_budget_of_the_best_pages(recipe, group):
    """Against the whole method written out, from the attention that each token really got."""
    quest, heads, prompt = kvlib.Recipe.parse(recipe).select, 2, 70
    q, k = cloud(3, 1, 2 * group, 110, 8), cloud(4, 1, heads, 110, 8)
    seen = k[0].repeat_interleave(group, 0)
    reader = Reader(recipe, heads)
    reader.feed(q[:, :, :prompt], k[:, :, :prompt])
    reader.group.finish_prefill()
    for t in range(prompt, 110):
        sinks, body, _ = reader.split()
        assert body == (t - int(reader.group.split.recent[0]) - sinks) // quest.page * quest.page
        assert all(torch.equal(held, torch.arange(t, dtype=torch.int32)) for held in census.positions(reader.group)[0])
        p = reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])[0, :, 0]
        assert (p > 0).sum(-1).tolist() == [quest.budget] * 2 * group
        always = [*range(sinks), *range(sinks + body, t + 1)]
        units = [list(range(at, at + quest.page)) for at in range(sinks, sinks + body, quest.page)]
        now = q[0, :, t]
        score = [[page_score(now[h], seen[h, unit], quest) for unit in units] for h in range(2 * group)]
        for sharing in lists_of(quest.scope, 2 * group, heads):
            order = ranked(score, now, seen, always, sharing)
            for h in sharing:
                check_read(p[h] > 0, order, units, always, quest.budget - len(always), now, seen, sharing)
                torch.testing.assert_close(p[h], attention_over(p[h] > 0, now[h], seen[h]), atol=1e-6, rtol=1e-5)


def page_score(q, keys, quest):
    return max(formula(q, part, quest.bounds).item() for part in keys.split(quest.logical or quest.page))


@pytest.mark.parametrize("spec", [Spec(0.25, softcap=0.6), Spec(0.25, sinks=torch.tensor([4.0, -9.0, -9.0, 0.5]))])
def test_a_models_softcap_and_its_own_sinks_count_in_the_vote(spec):
    recipe, heads = "quest(budget=40, page=8)", 2
    q, k = cloud(5, 1, 4, 110, 8), cloud(6, 1, heads, 110, 8)
    seen = k[0].repeat_interleave(2, 0)
    reader = Reader(recipe, heads, spec=spec)
    reader.feed(q[:, :, :70], k[:, :, :70])
    reader.group.finish_prefill()
    changed = 0
    for t in range(70, 110):
        sinks, body, _ = reader.split()
        p = reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])[0, :, 0]
        always = [*range(sinks), *range(sinks + body, t + 1)]
        units = [list(range(at, at + 8)) for at in range(sinks, sinks + body, 8)]
        score = [[formula(q[0, h, t], seen[h, unit], "minmax").item() for unit in units] for h in range(4)]
        for sharing in lists_of("kv_head", 4, heads):
            order = ranked(score, q[0, :, t], seen, always, sharing, spec)
            changed += order[:2] != ranked(score, q[0, :, t], seen, always, sharing)[:2]
            for h in sharing:
                check_read(p[h] > 0, order, units, always, 40 - len(always), q[0, :, t], seen, sharing, spec)
    assert changed  # else they would not have been needed


@pytest.mark.parametrize("tier", [" @ host", " @ host(attend=True)"])
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_a_tier_changes_nothing_of_what_is_read(tier, scope):
    q, k = cloud(3, 1, 4, 110, 8), cloud(4, 1, 2, 110, 8)
    here, there = (Reader(f"quest(budget=40, page=8, scope={scope}){where}", 2) for where in ("", tier))
    for reader in (here, there):
        reader.feed(q[:, :, :70], k[:, :, :70])
    one, other = here.steps(q, k, 70), there.steps(q, k, 70)
    assert torch.equal(one > 0, other > 0)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_pages_of_one_token_are_an_exact_choice():
    q, k = cloud(0, 1, 1, 130, 8), cloud(1, 1, 1, 130, 8)
    reader = Reader("quest(budget=24, page=1) + sink=0 + recent=1")
    reader.feed(q[:, :, :90], k[:, :, :90])
    for t in range(90, 130):
        p = reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])[0, 0, 0]
        older = k[0, 0, : t - 1] @ q[0, 0, t]
        assert places(p > 0) == sorted([*older.topk(22).indices.tolist(), t - 1, t])


def test_more_budget_reads_more_and_finds_more():
    q, k = cloud(2, 1, 4, 220, 8), cloud(3, 1, 2, 220, 8)
    true = torch.einsum("htd,hsd->hts", q[0], k[0].repeat_interleave(2, 0)) * SPEC.scale
    shares, before = [], None
    for budget in (48, 64, 80, 96, 128, 136, 153, 160, 176, 200):
        reader = Reader(f"quest(budget={budget})", 2)
        reader.feed(q[:, :, :200], k[:, :, :200])
        read = reader.steps(q, k, 200)[0] > 0
        found = []
        for i, t in enumerate(range(200, 220)):
            best = true[:, t, : t + 1].softmax(-1).view(2, 2, -1).sum(1).topk(budget).indices
            found.append(read[::2, i].gather(1, best).float().mean().item())
        shares.append(np.mean(found))
        if budget > 128:  # the same sinks and newest tokens as before
            assert (before <= read).all()
        before = read
    assert shares == sorted(shares)
    assert 48 / 210 < shares[0] < 0.6 < 0.95 < shares[-1]


def test_a_fraction_is_of_the_prompt_and_never_less_than_three_pages():
    q, k = cloud(0, 1, 2, 240, 8), cloud(1, 1, 1, 240, 8)
    for recipe, budget in (("quest(budget=0.3)", 60), ("quest(budget=0.05)", 48), ("quest(budget=0.05, page=4)", 12)):
        reader = Reader(recipe)
        reader.feed(q[:, :, :200], k[:, :, :200])
        assert ((reader.steps(q, k, 200) > 0).sum(-1) == budget).all()


def test_all_is_read_until_there_is_more_than_the_budget():
    q, k = cloud(0, 1, 2, 120, 8), cloud(1, 1, 1, 120, 8)
    for prompt in (5, 47, 48, 49, 63, 64, 65, 80):
        reader = Reader("quest(budget=64)")
        reader.feed(q[:, :, :prompt], k[:, :, :prompt])
        read = (reader.steps(q, k, prompt) > 0).sum(-1)[0]
        assert read.tolist() == [[min(t + 1, 64) for t in range(prompt, 120)]] * 2


@pytest.mark.parametrize("recipe", ["quest(budget=48)", "quest(budget=48, every=4)", "quest(budget=48) @ host"])
def test_a_chunk_of_another_turn_reads_everything_and_ends_what_was_chosen(recipe):
    q, k = cloud(0, 1, 2, 120, 8), cloud(1, 1, 1, 120, 8)
    for steps in range(1, 9):
        reader, fresh = Reader(recipe), Reader("quest(budget=48)")
        for each in (reader, fresh):
            each.feed(q[:, :, :90], k[:, :, :90])
            each.steps(q[:, :, : 90 + steps], k[:, :, : 90 + steps], 90)
            chunk = each.feed(q[:, :, 90 + steps : 92 + steps], k[:, :, 90 + steps : 92 + steps]) > 0
            assert chunk.sum(-1)[0].tolist() == [[91 + steps, 92 + steps]] * 2
        one, other = (each.steps(q[:, :, : 93 + steps], k[:, :, : 93 + steps], 92 + steps) for each in (reader, fresh))
        assert ((one > 0).sum(-1) == 48).all()
        assert torch.equal(one > 0, other > 0)


def test_the_first_and_the_newest_page_are_read_in_any_case():
    k = cloud(0, 1, 1, 300, 8)
    for budget, page, sinks in ((200, 16, 16), (256, 32, 32), (64, 16, 8), (200, 4, 4)):
        reader = Reader(f"quest(budget={budget}, page={page})")
        reader.fill(k)
        held, body, tokens = reader.split()
        assert held == sinks  # an eighth of the budget, at most
        assert page <= tokens - held - body < 2 * page


@pytest.mark.parametrize("scope", ["kv_head", "query_head", "layer"])
def test_who_shares_a_choice(scope):
    """Each head seeks another page: alone it finds it, with others the strongest wishes win."""
    d, page = 16, 8
    k = torch.zeros(1, 2, 100, d)
    for at in range(8):
        k[:, :, 16 + page * at, at] = 20.0 + at  # one key of each page
    q = torch.zeros(1, 4, 1, d)
    for h, wish in enumerate((1, 4, 5, 2)):
        q[0, h, 0, wish] = 1.0
    reader = Reader(f"quest(budget=32, page=8, scope={scope}) + sink=0 + recent=8", 2)
    reader.feed(torch.zeros(1, 4, 100, d), k)
    read = [set(places(row > 0)) for row in reader.feed(q, torch.zeros(1, 2, 1, d))[0, :, 0]]
    wished = {h: {16 + page * at} for h, at in enumerate((1, 4, 5, 2))}
    assert all(len(row) == 32 for row in read)
    if scope == "query_head":
        assert all(wished[h] <= read[h] for h in range(4))
        assert not wished[1] <= read[0]
    if scope == "kv_head":
        assert read[0] == read[1] != read[2] == read[3]
        assert wished[0] | wished[1] <= read[0]
        assert not wished[2] <= read[0]
    if scope == "layer":
        assert read[0] == read[1] == read[2] == read[3]
        assert wished[1] | wished[2] <= read[0]


# ---------------------------------------------------------------------------------------------------------- the index
@kinds
@pytest.mark.parametrize("recipe", ["quest(budget=48, bounds={})", "quest(budget=40, page=8, logical=2, bounds={})"])
def test_an_index_that_grew_is_the_one_made_at_once(bounds, recipe):
    q, k = cloud(0, 2, 2, 151, 8), cloud(1, 2, 1, 151, 8)
    whole = Reader(recipe.format(bounds))
    whole.feed(q[:, :, :150], k[:, :, :150])
    whole.group.finish_prefill()
    last = whole.feed(q[:, :, 150:], k[:, :, 150:])
    for prompt in (7, 48, 90, 149):
        grown = Reader(recipe.format(bounds))
        for at in range(0, prompt, 37):
            stop = min(prompt, at + 37)
            grown.feed(q[:, :, at:stop], k[:, :, at:stop])
        grown.steps(q[:, :, :150], k[:, :, :150], prompt)
        torch.testing.assert_close(grown.feed(q[:, :, 150:], k[:, :, 150:]), last, atol=1e-6, rtol=1e-5)
        for one, other in (
            (grown.group.body.units, whole.group.body.units),
            (grown.group.body.store.rows[1], whole.group.body.store.rows[1]),
        ):
            assert one.counts.tolist() == other.counts.tolist()
            assert one.parts.keys() == other.parts.keys()
            assert all(torch.equal(one.live(name), other.live(name)) for name in one.parts)
    pages = whole.group.body.units.live("first")
    assert pages.shape[2] == whole.split()[1] // (16 if "logical" not in recipe else 8)


@pytest.mark.parametrize(
    ("recipe", "lengths"),
    [
        ("quest(budget=48)", (70, 131, 96)),
        ("quest(budget=64, page=8)", (20, 140, 61)),
        ("quest(budget=0.25, page=8)", (150, 90, 30)),
        ("quest(budget=48, every=4)", (70, 131, 96)),
        ("quest(budget=64, every=4)", (57, 150, 64)),
        ("quest(budget=48, every=3, scope=layer)", (70, 131, 96)),
        ("quest(budget=40, page=8, every=4, scope=query_head)", (70, 131, 39)),
        ("quest(budget=64) @ host", (57, 150, 64)),
        ("quest(budget=64, every=4) @ host", (57, 150, 64)),
    ],
)
def test_a_row_reads_what_it_would_read_alone(recipe, lengths):
    q, k = cloud(7, 3, 4, 190, 8), cloud(8, 3, 2, 190, 8)
    batch, _ = together(recipe, q, k, lengths, [0, 1, 2], 40, heads=2)
    for row in range(3):
        alone, _ = together(recipe, q, k, lengths, [row], 40, heads=2)
        assert torch.equal(batch[row] > 0, alone[0] > 0)
        torch.testing.assert_close(batch[row], alone[0], atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ choices that are kept
@pytest.mark.parametrize("every", [1, 2, 4, 7])
def test_a_choice_serves_some_steps_and_no_longer(every):
    """Pages are ranked by the query of the last choice; a full page calls for a new one; what is newer is read anyway."""
    q, k = cloud(3, 1, 2, 130, 8), cloud(4, 1, 1, 130, 8)
    seen = k[0].repeat_interleave(2, 0)
    reader = Reader(f"quest(budget=48, every={every})")
    reader.feed(q[:, :, :90], k[:, :, :90])
    reader.group.finish_prefill()
    chosen_at, of_body, order, fresh = -every, 0, None, 0
    for t in range(90, 130):
        sinks, body, _ = reader.split()
        p = reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])[0, :, 0]
        always = [*range(sinks), *range(sinks + body, t + 1)]
        units = [list(range(at, at + 16)) for at in range(sinks, sinks + body, 16)]
        if t - chosen_at >= every or body != of_body:
            score = [[formula(q[0, h, t], seen[h, unit], "minmax").item() for unit in units] for h in range(2)]
            order, chosen_at, of_body, fresh = ranked(score, q[0, :, t], seen, always, [0, 1]), t, body, fresh + 1
        assert set(range(chosen_at, t + 1)) <= set(places(p[0] > 0))
        for h in range(2):
            check_read(p[h] > 0, order, units, always, 48 - len(always), q[0, :, t], seen, [0, 1])
    assert fresh == 40 if every == 1 else fresh < 40 / every + 4


def test_the_cut_page_is_cut_by_the_query_that_reads_it():
    q, k = cloud(0, 1, 1, 120, 8), cloud(1, 1, 1, 120, 8)
    reader = Reader("quest(budget=48, every=4)")
    reader.feed(q[:, :, :96], k[:, :, :96])
    for t in range(96, 120):
        sinks, body, _ = reader.split()
        read = set(places(reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])[0, 0, 0] > 0)) if t > 96 else set()
        for at in range(sinks, sinks + body, 16) if t > 96 else ():
            page = set(range(at, at + 16))
            if 0 < (n := len(read & page)) < 16:
                s = k[0, 0, at : at + 16] @ q[0, 0, t]
                assert read & page == {at + i for i in s.topk(n).indices.tolist()}
        if t == 96:
            reader.feed(q[:, :, t : t + 1], k[:, :, t : t + 1])


def test_rows_that_change_places_keep_their_choices():
    q, k = cloud(7, 3, 2, 190, 8), cloud(8, 3, 1, 190, 8)
    recipe, lengths = "quest(budget=48, every=4)", (90, 90, 90)
    for stop in range(1, 6):
        still, _ = together(recipe, q, k, lengths, [0, 1, 2], stop)
        moved, reader = together(recipe, q, k, lengths, [0, 1, 2], stop)
        assert torch.equal(still, moved)
        order = [2, 0, 0]
        reader.group.reorder(torch.tensor(order))
        follow = reader.steps(q[order, :, : 90 + stop + 4], k[order, :, : 90 + stop + 4], 90 + stop)
        for i, row in enumerate(order):
            alone, _ = together(recipe, q, k, lengths, [row], stop + 4)
            torch.testing.assert_close(follow[i], alone[0, :, stop:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["quest(budget=64)", "quest(budget=64, every=4)"])
def test_tokens_taken_back_leave_no_choice_behind(recipe):
    q, k, wrong = cloud(0, 1, 2, 130, 8), cloud(1, 1, 1, 130, 8), cloud(2, 1, 3, 130, 8)
    refused = 0
    for steps in range(4, 12):
        results = []
        for back in (0, 1, 3):
            reader = Reader(recipe)
            reader.feed(q[:, :, :100], k[:, :, :100])
            reader.steps(q[:, :, : 100 + steps], k[:, :, : 100 + steps], 100)
            if back:
                reader.steps(wrong[:, :2, :back], wrong[:, 2:, :back], 0)
                try:
                    reader.group.crop(back)
                except ValueError:  # some have left their mark
                    refused += 1
                    continue
            results.append(reader.steps(q[:, :, : 106 + steps], k[:, :, : 106 + steps], 100 + steps))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-5)
    assert refused < 8 or "every" in recipe


@pytest.mark.parametrize("recipe", ["quest(budget=48)", "quest(budget=48, every=4)"])
def test_a_step_without_a_token_chooses_nothing(recipe):
    """A row that has no token in a step goes on as if the step had not been."""
    q, k = cloud(0, 2, 2, 150, 8), cloud(1, 2, 1, 150, 8)
    wanted, _ = together(recipe, q, k, (100, 100), [1], 30)
    for gap in (0, 1, 2, 7, 17, 18, 19):
        reader, found = Reader(recipe), []
        reader.feed(q[:, :, :100], k[:, :, :100])
        for t in range(100, 131):
            own = t - (t - 100 > gap)  # the second row is one token behind after the gap
            chunk = [torch.stack([x[0, :, t : t + 1], x[1, :, own : own + 1]]) for x in (q, k)]
            if t - 100 == gap:
                chunk[0][1], chunk[1][1] = 3.0, 7.0
                reader.feed(*chunk, [1, 0])
            else:
                found.append(reader.feed(*chunk)[1])
        torch.testing.assert_close(torch.cat(found, 1), wanted[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe", ["quest(budget=64)", "quest(budget=64, every=4)", "quest(budget=64, every=4, scope=layer)"]
)
def test_a_draft_reads_what_its_tokens_would_read_alone(recipe):
    q, k, wrong = cloud(0, 1, 4, 150, 8), cloud(1, 1, 2, 150, 8), cloud(2, 1, 6, 10, 8)
    plain = Reader(recipe, 2)
    plain.feed(q[:, :, :100], k[:, :, :100])
    wanted = plain.steps(q, k, 100)
    drafted, at = Reader(recipe, 2), 100
    drafted.feed(q[:, :, :100], k[:, :, :100])
    drafted.group.finish_prefill()
    for good, bad in ((3, 2), (1, 4), (5, 0), (2, 5), (7, 1), (20, 3), (0, 3), (9, 2)):
        qs = torch.cat([q[:, :, at : at + good], wrong[:, :4, :bad]], 2)
        ks = torch.cat([k[:, :, at : at + good], wrong[:, 4:, :bad]], 2)
        got = drafted.feed(qs, ks, recording=True)[:, :, :good]
        drafted.group.crop(bad)
        torch.testing.assert_close(got, wanted[:, :, at - 100 : at - 100 + good], atol=1e-6, rtol=1e-5)
        at += good


# ------------------------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quest(budget=47)", "quest(budget=47): quest needs at least 48 tokens: give budget=48 or more"),
        ("quest(budget=90, page=32)", "quest(budget=90): quest needs at least 96 tokens: give budget=96 or more"),
        ("quest(budget=0)", "quest(budget=0): give a whole number of tokens"),
        ("quest(bounds=box)", "quest(bounds=box): give one of minmax, meanstd, cuboid"),
        ("quest(logical=5)", "quest(logical=5): give a divisor of page=16"),
        ("quest(page=8, logical=16)", "quest(logical=16): give a divisor of page=8"),
        ("quest(page=0)", "quest(page=0): give a whole number, 1 or more"),
        ("quest(every=0)", "quest(every=0): give a whole number, 1 or more"),
        ("quest(scope=head)", "quest(scope=head): give one of kv_head, layer, query_head"),
        ("quest(scope=query_head) @ host", "quest(scope=query_head): the query heads of a KV head would each fetch"),
        ("snapkv(budget=64) + quest(budget=48)", "quest: its pages need neighbouring tokens, and snapkv leaves gaps"),
        ("h2o(budget=64) + quest(budget=48)", "quest: it chooses among units that stay, and h2o drops single tokens"),
        ("lserve(budget=191)", "quest(budget=191): quest needs at least 192 tokens: give budget=192 or more"),
        ("lserve(logical=48)", "quest(logical=48): give a divisor of page=64"),
        ("lserve(sparsity=2)", "duo_attention(sparsity=2): give a number from 0 to 1"),
    ],
)
def test_errors_name_the_value_and_the_remedy(recipe, message):
    with pytest.raises(RecipeError) as error:
        kvlib.Recipe.parse(recipe)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("lserve", {}),
        ("lserve(budget=256, sparsity=0.25, every=2)", {"budget": 256, "sparsity": 0.25, "every": 2}),
        ("lserve(sink=4, recent=8, page=16, logical=4) @ host", {"sink": 4, "recent": 8, "page": 16, "logical": 4}),
        ("lserve(budget=0.5, sparsity=0)", {"budget": 0.5, "sparsity": 0}),
    ],
)
def test_lserve_is_its_two_parts(text, settings):
    recipe, method = kvlib.Recipe.parse(text), LServe(**settings)
    assert kvlib.Recipe.parse(str(recipe)) == recipe
    assert recipe.heads == DuoAttention(method.sparsity, "", method.sink, method.recent)
    wanted = {"page": method.page, "logical": method.logical, "every": method.every, "dense_layers": 0}
    assert recipe.select == Quest(method.budget, **wanted)
    assert (recipe.tier is not None) == ("@ host" in text)
    assert recipe.lossy == (method.sparsity > 0)


def test_the_defaults_are_the_papers():
    recipe = kvlib.Recipe.parse("lserve")
    assert recipe.heads == DuoAttention(sparsity=0.5, sink=128, recent=256)
    assert recipe.select == Quest(budget=4096, dense_layers=0, page=64, logical=16, every=4)
    quest = Quest()
    assert (quest.budget, quest.page, quest.dense_layers, quest.bounds, quest.every) == (1024, 16, 2, "minmax", 1)


def test_the_contracts_are_kept():
    assert check_policy("lserve(budget=48, page=16, logical=4, sink=4, recent=16)") == [check.__name__ for check in CHECKS]


@torch.no_grad()
def test_lserve_that_limits_nothing_is_full_to_the_bit():
    model = tiny_model()
    ids, mask = prompts()
    outs = []
    for recipe in ("full", "lserve(budget=1.0, sparsity=0, page=16, logical=4)"):
        cache = kvlib.Cache(model, recipe)
        out = [model(ids, attention_mask=mask, past_key_values=cache).logits]
        for i in range(8):
            longer = torch.nn.functional.pad(mask, (0, i + 1), value=1)
            out.append(model(ids[:, i : i + 1], attention_mask=longer, past_key_values=cache).logits)
        outs.append(torch.cat(out, 1))
    assert torch.equal(*outs)


@torch.no_grad()
def test_half_of_lserves_heads_stream_and_the_others_choose():
    cache = kvlib.Cache(tiny_model(), "lserve(budget=48, page=16, logical=4, sink=4, recent=12)")
    assert cache.streaming.sum() == cache.streaming.size // 2
    q, k, v = cloud(0, 1, 8, 120, 16), cloud(1, 1, 2, 120, 16), torch.eye(120).expand(1, 2, -1, -1)
    for layer, streaming in zip(cache.managed, cache.streaming, strict=True):
        store = layer.store
        store.forward(q[:, :, :100], k[:, :, :100], v[:, :, :100], None, SPEC)
        for t in range(100, 120):
            p = store.forward(*(x[:, :, t : t + 1] for x in (q, k, v)), None, SPEC)[0, :, 0]
            wanted = np.where(streaming, 16, 48).repeat(4)
            assert (p > 0).sum(-1).tolist() == wanted.tolist()
            for h in np.flatnonzero(streaming.repeat(4)):
                assert places(p[h] > 0) == [0, 1, 2, 3, *range(t - 11, t + 1)]
