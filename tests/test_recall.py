"""What a head group does under a selector and in host memory: what leaves its tail, what a query reads, what is moved."""

import numpy as np
import pytest
import torch

import kvlib
from kvlib import census
from kvlib.group import HeadGroup
from kvlib.policies.selection import SEGMENT
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.testing import TinyTokenizer, prompts, tiny_model

HEADS, GROUP, D = 2, 4, 16
SPEC = Spec(D**-0.5)
METHODS = [
    "oracle(budget=40)",
    "quest(budget=40, page=4)",
    "clusterkv(budget=40, cluster=6)",
    "sentencekv(budget=40, r=inf)",
    "tokenselect(budget=40)",
    "double_sparsity(budget=40, factor=2)",
]


def group_of(recipe):
    recipe = Recipe.parse(recipe)
    ids = torch.arange(10**5) % 256
    return HeadGroup(
        recipe.evictor,
        recipe.sizes,
        lambda positions: ids[positions.long()],
        TinyTokenizer(),
        recipe.select,
        np.arange(HEADS),
        recipe.tier,
    )


def tokens(n, seed=0, batch=1):
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, n, D, generator=make) for h in (HEADS * GROUP, HEADS, HEADS))


def feed(group, q, k, v, new=None):
    with torch.no_grad():
        return group.forward(q, k, v, new, SPEC, recording=False)


def steps(group, n, seed=1):
    q, k, v = tokens(n, seed)
    return torch.cat([feed(group, q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1]) for i in range(n)], 2)


ON_HOST = [recipe + " @ host(attend=True)" for recipe in METHODS if not Recipe.parse(recipe).select.reads_keys]


@pytest.mark.parametrize("recipe", METHODS + [recipe + " @ host" for recipe in METHODS] + ON_HOST)
def test_a_step_reads_exactly_its_budget(recipe):
    """Values are unit vectors of their positions and queries are zero, so that the output says what was read."""
    group = group_of(recipe)
    q, k, _ = tokens(200)
    v = torch.eye(200).expand(1, HEADS, -1, -1)
    feed(group, q[:, :, :150], k[:, :, :150], v[:, :, :150])
    for i in range(150, 200):
        out = feed(group, 0 * q[:, :, :1], k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert ((out > 0).sum(-1) == 40).all()
        assert torch.allclose(out[out > 0], torch.tensor(1 / 40))
        assert (out[..., i] > 0).all()  # the newest token always
    assert (census.attended(group) == 40).all()
    assert (census.kept(group) == 200).all()


def test_rows_shorter_than_their_budget_stay_dense_beside_others():
    group = group_of("quest(budget=60, page=4)")
    q, k, v = tokens(150, batch=2)
    feed(group, q, k, v, np.array([150, 40]))
    assert group.body is None
    out = feed(group, *(x[:, :, :1] for x in tokens(1, 3, batch=2)))
    assert out.isfinite().all()
    assert group.body.counts.tolist()[1] == 0
    assert group.body.counts.tolist()[0] > 80
    assert census.attended(group).tolist() == [[60, 60], [41, 41]]


@pytest.mark.parametrize("recipe", METHODS)
def test_the_same_tokens_are_read_through_slots_and_on_the_host(recipe):
    device, slots = group_of(recipe), group_of(recipe + " @ host(slots=1.5)")
    groups = [device, slots]
    if not Recipe.parse(recipe).select.reads_keys:
        groups.append(group_of(recipe + " @ host(attend=True)"))
    for group in groups:
        feed(group, *tokens(300))
    outs = [steps(group, 60) for group in groups]
    for out in outs[1:]:
        assert torch.allclose(out, outs[0], atol=1e-5)
    for group in groups[1:]:
        assert all(torch.equal(a, b) for a, b in zip(group.past.tensors(), device.past.tensors(), strict=True))
    hits, misses, moved = census.traffic(slots)
    run = slots.selector.run or 1
    per_token = 4 * D * len(slots.body.store.host)
    assert hits > 0
    assert misses > 0
    assert moved == misses * run * per_token
    assert slots.body.resident.room * run < 1.5 * 40 + 2 * max(slots.body.longest, run)


def test_a_repeated_query_moves_nothing_and_a_sealed_block_is_not_stale():
    group = group_of("quest(budget=40, page=4) @ host(slots=3)")
    feed(group, *tokens(300))
    q, k, v = tokens(1, 5)
    before = None
    for _ in range(30):
        held = group.body.counts[0] if group.body is not None else 0
        feed(group, q, k, v)
        after = census.traffic(group)
        if before is not None and group.body.counts[0] == held:
            assert after.misses - before.misses <= 1  # the room shrinks by a token a step, so a page may be cut anew
        before = after
    hits, misses, _ = before
    assert hits > 5 * misses
    reference = group_of("quest(budget=40, page=4)")
    feed(reference, *tokens(300))
    for _ in range(30):
        expected = feed(reference, q, k, v)
    assert torch.allclose(feed(group, q, k, v), feed(reference, q, k, v), atol=1e-5)
    assert expected.isfinite().all()


@pytest.mark.parametrize("recipe", ["full", "quest(budget=0.01, page=4)", "clusterkv(budget=256, iterations=1)"])
def test_a_prompt_on_its_way_to_the_host_leaves_the_device_as_it_comes(recipe):
    whole, chunked = group_of(recipe + " @ host"), group_of(recipe + " @ host")
    n = 2 * SEGMENT + 700
    q, k, v = tokens(n)
    whole.take_in(k, v, None)
    whole.finish_prefill()
    for lo in range(0, n, 3000):
        hi = min(n, lo + 3000)
        chunked.take_in(k[:, :, lo:hi], v[:, :, lo:hi], None)
        chunked.account(q[:, :, lo:hi], None, None, SPEC, prompt=True)
        assert chunked.tail.lengths[0] < SEGMENT + 200
    assert chunked.body.counts[0] == 2 * SEGMENT
    chunked.finish_prefill()
    assert whole.body.counts[0] == chunked.body.counts[0]
    assert torch.equal(whole.body.store.rows[1].live("k.x"), chunked.body.store.rows[1].live("k.x"))
    for name in whole.body.units.parts:
        assert torch.equal(whole.body.units.live(name), chunked.body.units.live(name))
    assert torch.allclose(steps(whole, 3), steps(chunked, 3), atol=1e-6)


def test_a_body_that_is_read_whole_is_streamed_and_counted():
    group, full = group_of("full @ host"), group_of("full")
    for each in (group, full):
        feed(each, *tokens(500))
    outs = [steps(each, 5) for each in (group, full)]
    assert torch.allclose(*outs, atol=1e-5)
    body = int(group.body.counts[0])
    assert body == 500 - 4 - 64
    assert census.traffic(group) == (0, 0, 5 * body * HEADS * 2 * D * 4)
    places = census.nbytes(group, True, set())
    assert places["host", "body"] == body * HEADS * 2 * D * 4
    second = tokens(20, 9)
    assert torch.allclose(feed(group, *second), feed(full, *second), atol=1e-5)


def test_the_cpu_attends_what_lives_there_and_moves_nothing():
    for recipe in ("full", "clusterkv(budget=40, cluster=6)", "snapkv(budget=40, window=8)"):
        there, here = group_of(recipe + " @ host(attend=True)"), group_of(recipe)
        for each in (there, here):
            feed(each, *tokens(300))
        assert torch.allclose(steps(there, 20), steps(here, 20), atol=1e-5)
        assert census.traffic(there) == (0, 0, 0)
        assert "slots" not in {part for _, part in census.parts(there)}


def test_an_evictors_body_moves_out_and_its_reading_is_counted():
    group, here = group_of("h2o(budget=40) @ host"), group_of("h2o(budget=40)")
    for each in (group, here):
        feed(each, *tokens(300))
    assert torch.allclose(steps(group, 20), steps(here, 20), atol=1e-5)
    places = census.nbytes(group, True, set())
    assert places["host", "body"] == int(group.body.counts.sum()) * 2 * D * 4
    assert ("device", "body") not in places
    assert census.traffic(group).moved >= 20 * places["host", "body"]


def test_dense_layers_read_everything_and_live_with_the_others():
    model, (ids, _) = tiny_model(num_hidden_layers=8), prompts(1, 96, 0)
    for tier, where in (("", "device"), (" @ host", "host")):
        cache = kvlib.Cache(model, "quest(budget=24, page=4, dense_layers=3)" + tier)
        with torch.no_grad():
            for piece in (ids, ids[:, :1], ids[:, 1:2]):
                model(piece, past_key_values=cache)
        assert cache.attended()[:, 0, 0].tolist() == [98, 98] + [24] * 6  # never more than a quarter of the layers
        bodies = [census.nbytes(layer.store.groups[0], False, set()) for layer in cache.managed]
        assert all(places.get((where, "body"), 0) > 0 for places in bodies[2:])
        assert (bodies[0].get(("host", "body"), 0) > 0) == (where == "host")


def test_a_report_says_what_is_read_what_it_costs_and_where_it_is():
    model, (ids, _) = tiny_model(), prompts(1, 96, 0)
    cache = kvlib.Cache(model, "quest(budget=24, page=4, dense_layers=0) @ host")
    with torch.no_grad():
        for i in range(6):
            model(ids if i == 0 else ids[:, i : i + 1], past_key_values=cache)
    text, traffic = cache.report(), cache.traffic()
    assert f"{cache.nbytes()['host']:,} allocated on the host" in text
    assert "reads       24 to 24 tokens per head and query (23.8 % of those held)" in text
    index = cache.nbytes(by="part", used=True)["index"]
    assert index > 0
    assert f"index {index:,} bytes" in text
    rate = 100 * traffic.hits / (traffic.hits + traffic.misses)
    assert f"hit rate {rate:.1f} % of {traffic.hits + traffic.misses:,} runs; {traffic.moved:,} bytes moved" in text


def test_crops_without_recording_stop_where_a_trace_would_remain():
    group = group_of("tokenselect(budget=40)")
    feed(group, *tokens(300))
    steps(group, 3)
    with pytest.raises(ValueError, match="tokenselect cache: only the newest 0"):
        group.check_crop(1)
    group = group_of("quest(budget=40, page=4)")
    feed(group, *tokens(300))
    steps(group, 3)
    group.crop(2)
    assert group.tokens[0] == 301
    with pytest.raises(ValueError, match="only the newest"):
        group.check_crop(10)


def test_bytes_that_moved_stay_counted_when_tokens_are_taken_back():
    group = group_of("full @ host")
    feed(group, *tokens(300))
    steps(group, 1)
    q, k, v = tokens(5, 2)
    with torch.no_grad():
        group.forward(q, k, v, None, SPEC, recording=True)
    moved = census.traffic(group).moved
    assert moved > 0
    group.crop(5)
    assert census.traffic(group).moved >= moved
    for recipe in ("full @ host", "snapkv(budget=40, window=8) @ host", "quest(budget=40, page=4) @ host"):
        group = group_of(recipe)
        feed(group, *tokens(300))
        steps(group, 2)
        before = census.traffic(group)
        twin = group.copy(None)
        steps(twin, 2)
        assert census.traffic(group) == before
        assert census.traffic(twin).moved >= before.moved
        assert census.traffic(twin) != before


def test_rows_of_other_lengths_do_not_change_a_rows_clusters():
    """Fractional budgets give rows blocks of different sizes, also where as many tokens are due."""
    lengths, recipe = [37, 96, 70], "clusterkv(budget=0.3, cluster=6)"
    q, k, v = tokens(96, 4, batch=3)
    together, chunk, step = group_of(recipe), tokens(40, 5, batch=3), tokens(1, 6, batch=3)
    feed(together, q, k, v, np.array(lengths))
    for each in (step, chunk, step):
        out = feed(together, *each)
    for row, n in enumerate(lengths):
        alone = group_of(recipe)
        feed(alone, *(x[row : row + 1, :, 96 - n :] for x in (q, k, v)))
        for each in (step, chunk, step):
            lone = feed(alone, *(x[row : row + 1] for x in each))
        assert torch.allclose(out[row], lone[0], atol=1e-5)


def test_a_cpu_that_attends_leaves_prompts_to_the_device():
    group, full = group_of("full @ host(attend=True)"), group_of("full")
    for each in (group, full):
        feed(each, *tokens(300))
        steps(each, 1)
    assert census.traffic(group).moved == 0
    chunk = tokens(40, 7)
    assert torch.allclose(feed(group, *chunk), feed(full, *chunk), atol=1e-5)
    assert census.traffic(group).moved > 0


@pytest.mark.parametrize(
    "codec", ["gear_l(bits=2, group=4)", "gear(bits=2, group=4, s=0.25)", "hierarchical(group=4)", "kv4"]
)
@torch.no_grad()
def test_slots_hold_what_a_codec_rewrites(codec):
    """Host against device over 90 steps, in which eight segments become one."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 190, 16, generator=generator) for heads in (4, 2, 2))
    groups = []
    for tier in ("", " @ host"):
        recipe = Recipe.parse(f"quest(budget=64, page=4) + {codec} + block=8 + recent=8{tier}")
        groups.append(HeadGroup(None, recipe.sizes, selector=recipe.select, tier=recipe.tier, codec=recipe.codec))
    for lo, hi in [(0, 100), *((i, i + 1) for i in range(100, 190))]:
        chunk = [x[:, :, lo:hi] for x in (q, k, v)]
        a, b = (group.forward(*chunk, None, Spec(0.25), False) for group in groups)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert groups[1].body.traffic().misses > 0
