"""ShadowKV: keys of low rank, values in host memory, chunks found by their means."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import census
from kvlib.group import HeadGroup
from kvlib.kernels.rotary import Rotary
from kvlib.policies import RecipeError
from kvlib.policies.codec.shadowkv import Landmarks, LowRank, ShadowKV, cohesion, outlying
from kvlib.policies.encoding import PATCH
from kvlib.policies.selection import Block
from kvlib.policies.tier.host import Host
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.store import Store
from kvlib.testing import prompts, tiny_model
from tests.reader import SPEC as READ
from tests.reader import Reader, attention_over, check_read, places

HEADS, GROUP, D = 2, 4, 16
SPEC = Spec(D**-0.5)
ROTARY = Rotary((1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003))
CHUNKS = pytest.mark.parametrize("chunk", [1, 4, 8])


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_of(recipe, rotary=ROTARY):
    recipe = Recipe.parse(recipe)
    at = np.arange(HEADS)
    return HeadGroup(recipe.evictor, recipe.sizes, None, None, recipe.select, at, recipe.tier, recipe.codec, rotary)


def tokens(n, seed=0, batch=1, first=0, rank=HEADS * D):
    """Queries, keys whose unturned forms have a rank, and values."""
    q, v = cloud(seed, batch, HEADS * GROUP, n, D), cloud(seed + 1, batch, HEADS, n, D)
    bare = cloud(seed + 2, batch, n, rank) @ cloud(99, batch, rank, HEADS * D)
    k = bare.view(batch, n, HEADS, D).transpose(1, 2) * rank**-0.5
    return q, ROTARY.turn(k, torch.arange(first, first + n)), v


@torch.no_grad()
def feed(group, q, k, v, new=None, recording=False):
    return group.forward(q, k, v, new, SPEC, recording)


def steps(group, part):
    return torch.cat([feed(group, *(x[:, :, i : i + 1] for x in part)) for i in range(part[0].shape[2])], 2)


def store_of(codec, k, first=0, cuts=(0, None)):
    """A store of keys k [B, H, m, d], the first at position `first`."""
    store, m = Store(codec.forms(), len(k), k.shape[1], torch.device("cpu"), rotary=ROTARY), k.shape[2]
    for lo, hi in zip(cuts, [m if cut is None else cut for cut in cuts[1:]], strict=False):
        position = torch.arange(first + lo, first + hi).expand(*k.shape[:2], -1)
        store.append(np.arange(len(k)), k[:, :, lo:hi], k[:, :, lo:hi], position)
    return store


def keys_of(store, first=0, lo=0, hi=None):
    hi = int(store.counts.max()) if hi is None else hi
    return store.forms[0].decode(store.piece("k", lo, hi, lambda slots: slots + first))


# ---------------------------------------------------------------------------------------------------------- low rank
@pytest.mark.parametrize("tier", ["", " @ host", " @ host(attend=True)"])
def test_all_ranks_are_dense_attention(tier):
    low, full = group_of("low_rank(rank=32, chunk=4)" + tier), group_of("full")
    outs = []
    for group in (low, full):
        out = [feed(group, *tokens(200)), steps(group, tokens(80, 5, first=200)), feed(group, *tokens(40, 9, first=280))]
        outs.append(torch.cat([*out, steps(group, tokens(3, 13, first=320))], 2))
    assert (outs[0] - outs[1]).abs().max() <= 1e-4
    assert low.body.counts[0] > 190
    assert set(low.body.store.own) == {"k.u", "v.x"}


FAMILIES = [
    ("Llama", {}),
    ("Phi3", {"partial_rotary_factor": 0.75}),
    ("Glm4", {}),
    ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "attention_factor": 0.5}}),
]


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@torch.no_grad()
def test_all_ranks_are_dense_attention_in_models(family, config):
    """Whatever the rotary embedding: of some dimensions, interleaved, scaled."""
    model, (ids, mask) = tiny_model(family, **config), prompts(2, 200, 17)
    outs = []
    for recipe in ("low_rank(rank=32, chunk=4) + block=8", "full"):
        cache, seen, new, found = kvlib.Cache(model, recipe), mask, ids, []
        for t in range(20):
            at = (seen.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            found.append(model(new, attention_mask=seen, past_key_values=cache, position_ids=at).logits[:, -1])
            new, seen = ids[:, t + 30 : t + 31], torch.nn.functional.pad(seen, (0, 1), value=1)
        outs.append(torch.stack(found))
    assert (outs[0] - outs[1]).abs().max() <= 1e-4 * outs[1].abs().max()


@pytest.mark.parametrize("first", [0, 4, 50_000])
def test_keys_of_rank_eight_come_back_from_eight_coefficients_at_every_position(first):
    """Positions are taken off before and put on after: turned keys have a far higher rank."""
    _, k, _ = tokens(256, first=first, rank=8)
    turned = torch.linalg.matrix_rank(k[0].transpose(0, 1).flatten(1), rtol=1e-3)
    assert turned > 8
    store = store_of(LowRank(rank=8, chunk=4, outliers=0), k, first, (0, 128, 132, None))
    assert (keys_of(store, first) - k).abs().max() < 1e-4 * k.abs().max()
    ids = cloud(5, 1, HEADS, 256).argsort(-1)[..., :50]
    picked = store.forms[0].decode(store.take("k", ids, lambda slots: slots + first))
    wanted = k.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, D))
    assert (picked - wanted).abs().max() < 1e-4 * k.abs().max()
    worse = store_of(LowRank(rank=7, chunk=4, outliers=0), k, first)
    assert (keys_of(worse, first) - k).abs().max() > 0.05


@given(st.integers(1, 31), st.integers(0, 100))
def test_the_error_is_the_energy_of_the_ranks_that_were_dropped(rank, seed):
    """Of all heads together, each row by rows of its own."""
    _, k, _ = tokens(64, seed, batch=2)
    near = keys_of(store_of(LowRank(rank=rank, outliers=0), k))
    for row in range(2):
        bare = ROTARY.turn_back(k[row], torch.arange(64)).transpose(0, 1).flatten(1)
        dropped = torch.linalg.svdvals(bare.double())[rank:].square().sum().sqrt()
        assert (near[row] - k[row]).norm().item() == pytest.approx(dropped.item(), rel=1e-3, abs=1e-3)


def test_more_ranks_are_never_worse():
    _, k, _ = tokens(64)
    errors = [(keys_of(store_of(LowRank(rank=rank, outliers=0), k)) - k).norm().item() for rank in range(1, 33)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[-2]


def test_later_tokens_are_projected_on_the_prompts_rows():
    """What lies in them comes back; of the rest only its projection is known."""
    _, k, _ = tokens(128, rank=6)
    later = tokens(32, 40, first=128, rank=6)[1]
    store = store_of(LowRank(rank=6, outliers=0), torch.cat([k, later], 2), cuts=(0, 128, None))
    assert torch.equal(store.fixed["k.basis"], store_of(LowRank(rank=6, outliers=0), k).fixed["k.basis"])
    torch.testing.assert_close(keys_of(store)[:, :, 128:], later, atol=1e-4, rtol=0)
    strange = tokens(32, 50, first=128)[1]
    store = store_of(LowRank(rank=6, outliers=0), torch.cat([k, strange], 2), cuts=(0, 128, None))
    error = keys_of(store)[:, :, 128:] - strange
    assert error.norm() > 0.5 * strange.norm()
    bare = ROTARY.turn_back(error[0], torch.arange(128, 160)).transpose(0, 1).flatten(1)
    basis = store.fixed["k.basis"][0].transpose(0, 1).flatten(1)
    assert (bare @ basis.T).abs().max() < 1e-3  # orthogonal to all that the rows can tell
    torch.testing.assert_close(basis @ basis.T, torch.eye(6), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------- outliers
def odd_chunks(n, chunk, odd, seed=0):
    """Keys [1, H, n, d] whose chunks point one way each, but for the `odd` ones of each head, whose keys disagree."""
    k = cloud(seed, 1, HEADS, n // chunk, 1, D) + 0.05 * cloud(seed + 1, 1, HEADS, n // chunk, chunk, D)
    for head, chunks in enumerate(odd):
        k[0, head, chunks] = cloud(seed + 2, len(chunks), chunk, D)
    return k.flatten(2, 3)


def test_cohesion_is_the_least_cosine_to_the_mean():
    k = odd_chunks(64, 8, [[2], [5]])
    found = cohesion(k, 8)
    for head in range(HEADS):
        for c, keys in enumerate(k[0, head].split(8)):
            mean = keys.mean(0)
            wanted = min(torch.dot(x, mean) / (x.norm() * mean.norm()) for x in keys)
            assert found[0, head, c].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert outlying(k, 8, 48).tolist() == [[[2], [5]]]
    assert outlying(odd_chunks(1024, 8, [[7, 100, 3], [0, 127, 64]]), 8, 3).tolist() == [[[3, 7, 100], [0, 64, 127]]]
    assert outlying(k, 8, 0).shape == (1, HEADS, 0)
    assert outlying(k[:, :, :56], 8, 48).shape == (1, HEADS, 0)  # an eighth of seven chunks


@pytest.mark.parametrize("chunk", [4, 8])
def test_outlying_chunks_are_exact_each_at_its_place(chunk):
    odd = [[3, 9], [0, 15]]
    k = odd_chunks(16 * chunk, chunk, odd)
    more = odd_chunks(8 * chunk, chunk, [[1], [6]], seed=7)
    codec = LowRank(rank=2, chunk=chunk, outliers=2)
    both = torch.cat([k, more], 2)
    store = store_of(codec, both, first=9, cuts=(0, 16 * chunk, None))
    near = keys_of(store, 9)
    for head in range(HEADS):
        exact = [*odd[head], 16 + [1, 6][head]]
        same = (near[0, head] == both[0, head]).all(-1).view(-1, chunk)
        assert same.all(1).nonzero().flatten().tolist() == exact
        assert same.any(1).sum() == len(exact)
    part = keys_of(store, 9, 8 * chunk, 20 * chunk)
    torch.testing.assert_close(part, near[:, :, 8 * chunk : 20 * chunk], atol=1e-6, rtol=0)


def index_of(select, k):
    positions = torch.arange(k.shape[2]).expand(k.shape[:3])
    zero = np.zeros(len(k), dtype=np.int64)
    return select.build(Block(k, k, positions, zero, np.arange(k.shape[1]), 8, {}, lambda *_: k)).summary


def test_a_landmark_is_the_mean_of_its_chunk_in_the_keys_type():
    k = cloud(0, 2, HEADS, 64, D).bfloat16()
    summary = index_of(Landmarks(budget=48, chunk=8), k)
    assert torch.equal(summary["landmark"], k.float().unflatten(2, (8, 8)).mean(3).bfloat16())
    assert torch.equal(summary["always"].nonzero()[:, 2].view(2, HEADS, 1), outlying(k, 8, 48))


# ---------------------------------------------------------------------------------------------------------- selection
@CHUNKS
@pytest.mark.parametrize("group", [1, 3])
def test_a_chunk_that_one_query_head_wants_is_read(chunk, group):
    """A needle in every chunk of the body, for every query head."""
    n, budget = 160, 48
    reader = Reader(f"landmarks(budget={budget}, chunk={chunk}, outliers=0)", heads=HEADS)
    k, q = 0.1 * cloud(0, 1, HEADS, n, D), cloud(1, 1, HEADS * group, 1, D)
    k[:, :, 80 : 80 + 2 * chunk] = 0
    reader.fill(k)
    sinks, body, _ = reader.split()
    for head in range(HEADS):
        for member in range(group):
            for at in range((80 - sinks) // chunk - 2, (80 - sinks) // chunk + 3):
                reader = Reader(f"landmarks(budget={budget}, chunk={chunk}, outliers=0)", heads=HEADS)
                needle = slice(sinks + at * chunk, sinks + (at + 1) * chunk)
                hidden = k.clone()
                hidden[0, head, needle] = 9 * q[0, head * group + member]
                reader.fill(hidden)
                read = reader.ask(q)[0, head * group + member]
                assert (read[needle] > 0).all()
                assert read[needle].sum() > 0.9
                assert (read > 0).sum() == budget
    assert body > 100


def loudest(q, k, sinks, body, chunk, sharing):
    """Chunks of keys k [T, d] by what the query head that wants one most would give it, q [Hq, d]; the rest of the softmax
    goes to sinks and tail."""
    mean = k[sinks : sinks + body].unflatten(0, (-1, chunk)).mean(1).double()
    others = torch.cat([k[:sinks], k[sinks + body :]]).double()
    best = np.full(len(mean), -np.inf)
    for h in sharing:
        s, rest = (x @ q[h].double() * READ.scale for x in (mean, others))
        best = np.maximum(best, (s - torch.cat([s, rest]).logsumexp(0)).exp().numpy())
    return sorted(range(len(mean)), key=lambda c: (-best[c], c))


@CHUNKS
def test_the_chunks_read_are_those_of_the_loudest_head(chunk):
    n, heads, group = 200, 2, 3
    for seed in range(5):
        reader = Reader(f"landmarks(budget=70, chunk={chunk}, outliers=0)", heads=heads)
        q, k = 2 * cloud(seed, 1, heads * group, 1, D), 1.5 * cloud(seed + 50, 1, heads, n, D)
        reader.fill(k)
        sinks, body, _ = reader.split()
        found = reader.ask(q)[0]
        k = torch.cat([k, torch.zeros(1, heads, 1, D)], 2)
        always = [*range(sinks), *range(sinks + body, n + 1)]
        units = [list(range(sinks + c * chunk, sinks + (c + 1) * chunk)) for c in range(body // chunk)]
        by_head = k[0].repeat_interleave(group, 0)
        for sharing in ([0, 1, 2], [3, 4, 5]):
            order = loudest(q[0, :, 0], k[0, sharing[0] // group], sinks, body, chunk, sharing)
            for h in sharing:
                read = found[h] > 0
                wide = torch.zeros(len(read), D)
                wide[: n + 1] = by_head[h]
                check_read(read, order, units, always, 70 - len(always), q[0, :, 0], by_head, sharing)
                torch.testing.assert_close(found[h], attention_over(read, q[0, h, 0], wide), atol=1e-5, rtol=1e-5)


def test_one_head_that_insists_beats_three_that_are_inclined():
    """By the mean of the heads, or their sum, the other chunk would be read."""
    chunk, group = 4, 3
    reader = Reader(f"landmarks(budget=14, chunk={chunk}, outliers=0) + sink=2 + recent=4 + block=4", heads=1)
    k, q = torch.zeros(1, 1, 106, D), torch.zeros(1, group, 1, D)
    insists, inclined = slice(22, 26), slice(42, 46)  # the body begins at 2
    q[0, :, 0, 0], q[0, 0, 0, 1] = 4.0, 40.0
    k[0, 0, insists, 1], k[0, 0, inclined, 0] = 8.0, 3.5
    reader.fill(k)
    sinks, body, _ = reader.split()
    assert sinks == 2
    assert 4 <= 14 - (107 - body) < 8  # room for one chunk and a part of another
    read = reader.ask(q)[0]
    p = (k[0, 0] @ q[0, :, 0].T * READ.scale).softmax(0)  # what each head would give the chunks, all being read
    assert p[insists].sum(0).max() > p[inclined].sum(0).max()
    assert p[insists].sum() < p[inclined].sum()
    assert all((read[h, insists] > 0).all() for h in range(group))
    assert not any((read[h, inclined] > 0).all() for h in range(group))


def test_outlying_chunks_are_always_read_and_none_twice():
    chunk, budget = 4, 72
    recipe = f"landmarks(budget={budget}, chunk={chunk}, outliers=3)"
    reader = Reader(recipe, heads=HEADS)
    reader.fill(odd_chunks(200, chunk, [[], []]))
    sinks = reader.split()[0]
    odd = [[6, 17, 30], [2, 9, 25]]
    base = torch.cat([cloud(8, 1, HEADS, sinks, D), odd_chunks(196, chunk, odd)], 2)
    for seed in range(4):
        reader, q = Reader(recipe, heads=HEADS), 3 * cloud(20 + seed, 1, HEADS * 2, 1, D)
        reader.fill(base)
        found = reader.ask(q)[0]
        for h in range(4):
            read = set(places(found[h] > 0))
            assert len(read) == budget
            for c in odd[h // 2]:
                assert set(range(sinks + c * chunk, sinks + (c + 1) * chunk)) <= read
            keys = torch.zeros(found.shape[1], D)
            keys[: sinks + 196] = base[0, h // 2]
            wanted = attention_over(found[h] > 0, q[0, h, 0], keys)  # twice would weigh twice
            torch.testing.assert_close(found[h], wanted, atol=1e-5, rtol=1e-5)


def test_the_order_of_chunks_does_not_matter():
    k, q = cloud(0, 1, HEADS, 160, D), cloud(1, 1, HEADS * 2, 1, D)
    recipe = "landmarks(budget=64, chunk=8, outliers=2)"
    reader = Reader(recipe, heads=HEADS)
    reader.fill(k)
    sinks, body, _ = reader.split()
    order = cloud(2, body // 8).argsort()
    at = (sinks + order[:, None] * 8 + torch.arange(8)).flatten()
    moved = k.clone()
    moved[:, :, sinks : sinks + body] = k[:, :, at]
    other = Reader(recipe, heads=HEADS)
    other.fill(moved)
    a, b = reader.ask(q)[0], other.ask(q)[0]
    torch.testing.assert_close(b[:, sinks : sinks + body], a[:, at], atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- the composition
def test_what_the_name_stands_for():
    recipe = Recipe.parse("shadowkv(budget=64, rank=16, chunk=4, outliers=2)")
    assert recipe.select == Landmarks(budget=64, chunk=4, outliers=2)
    assert recipe.codec == LowRank(rank=16, chunk=4, outliers=2)
    assert recipe.tier == Host()
    assert recipe == Recipe.parse(
        "landmarks(budget=64, chunk=4, outliers=2) + low_rank(rank=16, chunk=4, outliers=2) @ host"
    )
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse("shadowkv @ device").tier is None
    assert Recipe.parse("shadowkv @ host(slots=3)").tier == Host(slots=3)
    assert not recipe.lossy
    assert ShadowKV().rank == 160


SHADOW = "shadowkv(budget=64, rank=16, chunk=4, outliers=2)"


@torch.no_grad()
def run(model, cache, ids, mask=None):
    """Logits of the last of the ids."""
    seen = cache.get_seq_length()
    if mask is None:
        return model(ids, past_key_values=cache).logits[:, -1:]
    whole = torch.nn.functional.pad(mask, (0, seen + ids.shape[1] - mask.shape[1]), value=1)
    at = (whole.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=whole, past_key_values=cache, position_ids=at).logits[:, -1:]


def test_what_is_generated_and_second_turns_are_projected_and_moved_too():
    model = tiny_model(num_hidden_layers=1)
    cache = kvlib.Cache(model, SHADOW)
    new = run(model, cache, prompts(1, 96, 0)[0]).argmax(-1)
    for _ in range(512):
        new = run(model, cache, new).argmax(-1)
    body = cache.managed[0].store.groups[0].body
    assert (cache.kept() == 608).all()
    assert cache.attended().unique().tolist() == [64]
    before = int(body.counts[0])
    assert before >= 608 - 64
    run(model, cache, prompts(1, 150, 0, seed=4)[0])
    run(model, cache, prompts(1, 1, 0, seed=4)[0])
    body = cache.managed[0].store.groups[0].body
    assert (cache.kept() == 759).all()
    assert body.counts[0] >= before + 140
    assert body.units.counts[0] * 4 == body.counts[0]
    assert cache.nbytes(used=True)["host"] == body.counts[0] * HEADS * D * 4
    positions = cache.managed[0].store.positions()[0]
    assert all(torch.equal(head, torch.arange(759, dtype=torch.int32)) for head in positions)


def test_with_all_ranks_and_enough_budget_it_is_full_attention_all_along():
    model, outs = tiny_model(), []
    follow = prompts(1, 300, 0, seed=6)[0]
    for recipe in ("shadowkv(budget=500, rank=32, chunk=4)", "shadowkv(budget=500, rank=32, chunk=4) @ device", "full"):
        cache = kvlib.Cache(model, recipe)
        found = [run(model, cache, prompts(1, 700, 0)[0][:, :300])]
        found += [run(model, cache, follow[:, t : t + 1]) for t in range(100)]
        found += [run(model, cache, follow[:, 100:160])]
        found += [run(model, cache, follow[:, t : t + 1]) for t in range(160, 170)]
        outs.append(torch.cat(found, 1))
        body = cache.managed[0].store.groups[0].body
        assert body is None or body.counts[0] > 150
    for out in outs[:2]:
        assert (out - outs[2]).abs().max() <= 1e-4 * outs[2].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_cards_and_values_live_in_the_host(dtype):
    """2 r per token for all heads; per chunk and head a landmark, and a byte that says whether it stands out."""
    model, (ids, _) = tiny_model().to(dtype), prompts(1, 400, 0)
    there, here = kvlib.Cache(model, SHADOW), kvlib.Cache(model, SHADOW + " @ device")
    for cache in (there, here):
        run(model, cache, ids)
        for t in range(70):
            run(model, cache, ids[:, t : t + 1])
    size, layers, body = dtype.itemsize, 3, there.managed[0].store.groups[0].body
    n = int(body.counts[0])
    exact = body.store.rows[PATCH].counts[0]
    assert exact >= 2 * 4  # of the prompt, and one chunk at most of every eight since
    tiers, parts = there.nbytes(used=True), there.nbytes(by="part", used=True)
    values = layers * n * HEADS * D * size
    assert tiers["host"] == values
    keys = layers * (n * 16 * size + exact * HEADS * (D * size + 4))
    assert parts["body"] == values + keys
    basis = layers * HEADS * 16 * D * size
    assert parts["index"] == layers * (n // 4) * HEADS * (D * size + 1) + basis
    assert here.nbytes(used=True)["host"] == 0
    assert here.nbytes(by="part", used=True)["body"] == values + keys
    assert here.traffic() == (0, 0, 0)
    assert set(body.store.host) == {"v.x"}


def test_a_missing_chunk_costs_its_values_and_nothing_else():
    group, same = group_of(SHADOW), group_of(SHADOW + " @ device")
    for each in (group, same):
        feed(each, *tokens(400))
    last = census.traffic(group)
    for i in range(60):
        part = tokens(1, 100 + 3 * i, first=400 + i)
        torch.testing.assert_close(feed(group, *part), feed(same, *part), atol=1e-5, rtol=1e-4)
        now = census.traffic(group)
        assert now.moved - last.moved == (now.misses - last.misses) * 4 * D * 4
        room = 64 - 16 // 2 - int(group.tail.lengths[0])
        assert 0 < now.misses + now.hits - last.misses - last.hits <= HEADS * (-(-max(room, 0) // 4) + 17)
        last = now
    assert last.hits > 0
    assert last.misses > 0


@torch.no_grad()
def test_a_padded_row_is_as_if_alone():
    model, (ids, mask) = tiny_model(), prompts(2, 160, 17)
    follow = prompts(2, 120, 0, seed=3)[0]
    outs = []
    for row in (None, 0, 1):
        cache = kvlib.Cache(model, SHADOW)
        chosen = slice(None) if row is None else slice(row, row + 1)
        own = ids if row is None else ids[row : row + 1, 17 * row :]
        own_mask = mask if row is None else None
        found = [run(model, cache, own, own_mask)]
        found += [run(model, cache, follow[chosen, t : t + 1], own_mask) for t in range(70)]
        found += [run(model, cache, follow[chosen, 70:110], own_mask)]
        found += [run(model, cache, follow[chosen, 110:111], own_mask)]
        outs.append(torch.cat(found, 1))
    for row in (0, 1):
        assert (outs[0][row] - outs[1 + row][0]).abs().max() < 1e-4 * outs[0].abs().max()


def test_drafts_that_are_taken_back_leave_no_trace():
    """Also those that were projected, moved and kept exact on the way."""
    for taken in (1, 70):
        drafted, plain = group_of(SHADOW), group_of(SHADOW)
        for each in (drafted, plain):
            feed(each, *tokens(300))
            steps(each, tokens(5, 3, first=300))
        before = drafted.body.counts.copy()
        for t in range(70):
            feed(drafted, *tokens(1, 40 + t, first=305 + t), recording=True)
        assert drafted.body.counts[0] > before[0]
        drafted.crop(taken)
        for t in range(70 - taken):
            feed(plain, *tokens(1, 40 + t, first=305 + t))
        assert drafted.body.counts.tolist() == plain.body.counts.tolist()
        for mine, its in zip(drafted.body.store.rows.values(), plain.body.store.rows.values(), strict=True):
            assert mine.counts.tolist() == its.counts.tolist()
            for name in mine.parts:
                torch.testing.assert_close(mine.live(name), its.live(name), atol=1e-5, rtol=1e-5)
        for name in drafted.body.units.parts:
            assert torch.equal(drafted.body.units.live(name), plain.body.units.live(name))
        after = tokens(90, 500, first=375 - taken)
        torch.testing.assert_close(steps(drafted, after), steps(plain, after), atol=1e-4, rtol=1e-3)
        assert ("device", "staging") not in census.parts(drafted)


# ---------------------------------------------------------------------------------------------------------- refusals
def test_a_rank_beyond_what_the_heads_have_is_refused():
    model = tiny_model()
    kvlib.Cache(model, "low_rank(rank=32)")
    for recipe in ("low_rank(rank=33)", "shadowkv(rank=33)", "shadowkv"):
        with pytest.raises(RecipeError, match="keys of 2 heads of size 16 have rank 32 at most"):
            kvlib.Cache(model, recipe)


def test_models_without_a_rotary_embedding_to_take_off_are_refused_by_name():
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    for model, words in ((tiny_model("OPT"), "'opt'.*no rotary embedding"), (tiny_model(**dynamic), "'llama'.*'dynamic'")):
        for recipe in ("shadowkv(rank=8)", "low_rank(rank=8)", 'kv(k="low_rank(rank=8)", v="kv4")'):
            with pytest.raises(ValueError, match=f"shadowkv.*{words}"):
                kvlib.Cache(model, recipe)
        kvlib.Cache(model, "landmarks(budget=64)")


def test_what_cannot_be_is_refused():
    for wrong, words in (
        ("low_rank(rank=0)", "rank"),
        ("low_rank(chunk=0)", "chunk"),
        ("low_rank(outliers=-1)", "outliers"),
        ("landmarks(chunk=0)", "chunk"),
        ("landmarks(budget=64, scope=query_head)", "leave it out"),
        ("landmarks(budget=64, scope=layer)", "leave it out"),
        ("shadowkv(outliers=1.5)", "outliers"),
        ("shadowkv + h2o(budget=64)", "h2o"),
        ("shadowkv + kivi", "takes one for keys and one for values"),
        ("clusterkv(budget=256) + low_rank @ host(attend=2)", "attend"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.parse(wrong)


def test_a_rank_beyond_is_refused_inside_kv_too():
    with pytest.raises(RecipeError, match="rank 32 at most"):
        kvlib.Cache(tiny_model(), 'kv(k="low_rank(rank=33)", v="kv4")')


def test_an_exception_of_kv_may_be_of_low_rank():
    model = tiny_model()
    cache = kvlib.Cache(model, 'kv(k="kv4", where="0: low_rank(rank=8)")')
    for n in (200, 1):
        assert run(model, cache, prompts(1, n, 0)[0]).isfinite().all()


def test_bytes_of_a_group_with_fewer_ranks_than_the_recipe():
    model = tiny_model()
    cache = kvlib.Cache(model, "duo_attention(sparsity=0.5, sink=4, recent=16) + low_rank(rank=24, outliers=0)")
    for n in (200, 1):
        run(model, cache, prompts(1, n, 0)[0])
    body = next(group.body for group in cache.managed[0].store.groups if group.codec is not None)
    key, value = body.store.forms
    wanted = body.counts[0] * (key.bytes_per_token(D, itemsize=4) + value.bytes_per_token(D, itemsize=4))
    assert body.store.used()["device"] == wanted
