"""GEAR corrects its codes by what errors share and by what stands out; segments of generated tokens become one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kvlib
from kvlib.kernels.attention import Visible, attention
from kvlib.kernels.quantise import unpack
from kvlib.policies import Gear, GearL, RecipeError
from kvlib.policies.encoding import FEW, MERGED, SEGMENT, Reading, Tokens, attend
from kvlib.recipe import Recipe
from kvlib.store import ALIKE, LONGEST, Store
from kvlib.testing import prompts, tiny_model
from tests.policies.test_kivi import (
    HEADS,
    check_keys,
    check_values,
    cloud,
    decoded,
    feed,
    group_of,
    held,
    pieces,
    prompt_and_steps,
    same,
    slots,
    split_of,
    store_of,
)

D = 16
SMALL = "gear(bits=2, group=8, s=0.25, rank=2)"  # pages of eight tokens
CODECS = [SMALL, "gear(bits=4, s=0.25, rank=3)", "gear_l(bits=2, group=8, rank=2)", "gear_l(bits=4, rank=1)"]
STREAMS = [
    "gear(bits=2, group=8, s=0.25, rank=2, recent=8) + sink=2 + block=8",
    "gear_l(bits=2, group=4, rank=2, recent=8) + sink=2 + block=8",
    "gear_l(bits=4, rank=2, recent=8) + sink=2 + block=8",
    "kv(k='gear_l(bits=4, rank=3)', v=kv4, recent=8) + sink=2 + block=8",
]


def codec_of(text):
    return Recipe.parse(text).codec


def sample(seed, *shape):
    """Keys or values whose channels differ in size, with something low-rank in them and a few entries that stand out."""
    x = cloud(seed, *shape) * torch.linspace(0.5, 2, shape[-1])
    x += 0.3 * cloud(seed + 1, *shape[:-1], 1) * cloud(seed + 2, *shape[:-2], 1, shape[-1])
    return torch.where(cloud(seed + 3, *shape) > 2.3, 6 * x, x)


def coarse(store):
    """Keys and values without their low-rank term."""
    return [form.coarse(stored) for form, stored in zip(store.forms, pieces(store), strict=True)]


def low(store, side):
    """The factors a [B, H, n, r] and b [B, H, S, d, r] of one side."""
    parts = pieces(store)["kv".index(side)].parts
    return parts["a"].float(), parts["b"].float()


def apart(store, side):
    """The low-rank term, segment by segment."""
    (a, b), at, found = low(store, side), 0, []
    for i, n in enumerate(store.lengths[MERGED][0]):
        found.append(a[:, :, at : at + n] @ b[:, :, i].mT)
        at += n
    return torch.cat(found, 2)


# ------------------------------------------------------------------------------------------------------ known answers
def grid(bits, group, axis, ends, seed=0):
    """Multiples of a quarter, [1, 2, 32, 16], that hit both ends of every group of `group` along `axis`, at its members
    `ends`, and their codes."""
    codes = torch.randint(1, 2**bits - 1, (1, 2, 32, D), generator=torch.Generator().manual_seed(seed))
    members = codes.transpose(2, axis).unflatten(2, (-1, group))  # a view
    members[:, :, :, ends[0]], members[:, :, :, ends[1]] = 0, 2**bits - 1
    return codes * 0.25 - 1, codes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("side", "axis"), [("k", 2), ("v", 3)])
def test_a_grid_is_exact_and_leaves_nothing_over(side, axis, bits):
    x, codes = grid(bits, 8, axis, (3, 6))
    store = store_of(GearL(bits=bits, group=8), x, x)
    a, b = low(store, side)
    assert torch.equal(unpack(held(store)[f"{side}.codes"], bits), codes[0].to(torch.uint8))
    assert a.isfinite().all()
    assert not (a @ b[:, :, 0].mT).any()
    assert torch.equal(decoded(store)["kv".index(side)], x)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("side", "axis"), [("k", 2), ("v", 3)])
def test_an_error_that_tokens_share_is_recovered_by_rank_one(side, axis, bits, rank):
    """Less than half a step, and none where a group has its ends, so that no code changes."""
    x, codes = grid(bits, 8, axis, (3, 6))
    per_token, per_channel = torch.rand(1, 2, 32, 1) - 0.5, 0.2 * torch.rand(1, 2, 1, D)
    free = per_token if axis == 2 else per_channel
    members = free.transpose(2, axis).unflatten(2, (-1, 8))
    members[:, :, :, [3, 6]] = 0
    extra = per_token * per_channel
    assert 0.02 < extra.abs().max() < 0.125
    store = store_of(GearL(bits=bits, group=8, rank=rank), x + extra, x + extra)
    assert torch.equal(unpack(held(store)[f"{side}.codes"], bits), codes[0].to(torch.uint8))
    torch.testing.assert_close(decoded(store)["kv".index(side)], x + extra, atol=2e-4, rtol=0)
    torch.testing.assert_close(apart(store, side), extra, atol=2e-4, rtol=0)
    assert (coarse(store)["kv".index(side)] - (x + extra)).abs().max() > 0.02


# --------------------------------------------------------------------------------------------- what an encoding is
def ends_of(codec, side):
    """Tokens of a page, or 0, and how many entries at each end of a vector are exact."""
    form = codec.keys() if side == "k" else codec.values()
    return form.page, form.ends(D)


@pytest.mark.parametrize(
    "text", ["gear(bits=2, group=8, s=0.25)", "gear(bits=4, group=16, s=0.1)", "gear(bits=2, group=4, s=0.25)"]
)
@pytest.mark.parametrize("side", ["k", "v"])
def test_outliers_are_the_ends_of_each_vector_and_stretch_no_range(text, side):
    """Keys channel by channel in pages of tokens, values token by token."""
    codec, x = codec_of(text), sample(0, 1, 2, 64, D)
    store, parts = store_of(codec, x, x), held(store_of(codec, x, x))
    page, ends = ends_of(codec, side)
    vectors = (x[0].unflatten(1, (-1, page)) if page else x[0].unsqueeze(-1)).numpy()  # [H, ., vector, .]
    place = parts[f"{side}.place"].view(2, -1, 2 * ends, D if page else 1).long().numpy()
    order = np.argsort(vectors, 2)
    wanted = np.concatenate([order[:, :, :ends], order[:, :, -ends:]], 2)
    assert np.array_equal(np.sort(place, 2), np.sort(wanted, 2))
    calm = vectors.copy()
    np.put_along_axis(calm, place, vectors.astype(np.float64).mean(2, keepdims=True).astype(np.float32), 2)
    calm = torch.from_numpy(calm).view(1, 2, 64, D)
    base = codec.keys().base if side == "k" else codec.values().base
    plain = held(store_of(GearL(bits=codec.bits, group=codec.group), calm, calm))
    torch.testing.assert_close(parts[f"{side}.range"], plain[f"{side}.range"], atol=0, rtol=2e-3)
    assert (
        parts[f"{side}.codes"] == plain[f"{side}.codes"]
    ).float().mean() > 0.95  # but where a mean was added up otherwise
    found = decoded(store)["kv".index(side)]
    error = (found[0] - x[0]).abs().view(vectors.shape).gather(2, torch.from_numpy(place))
    stored = parts[f"{side}.error"].view(place.shape).float().abs()
    assert (error <= stored * 2**-11 + 1e-6).all()  # an ulp of fp16
    assert stored.max() > 1
    assert base.group == codec.tokens


@pytest.mark.parametrize("text", ["gear_l(bits=2, group=8)", "gear_l(bits=4, group=8)", "gear_l(bits=4)"])
def test_the_backbone_is_an_independent_quantisers(text):
    codec, k, v = codec_of(text), sample(0, 2, 2, 24, D), sample(5, 2, 2, 24, D)
    store = store_of(codec, k, v)

    class Backbone:
        """The same store without its low-rank term."""

        forms = tuple(form.base for form in store.forms)
        counts, piece = store.counts, store.piece

    check_keys(k, Backbone, codec.bits, codec.tokens or 24)
    check_values(v, Backbone, codec.bits, codec.tokens or D)


@pytest.mark.parametrize("text", CODECS)
def test_entries_that_do_not_stand_out_are_off_by_half_a_step_before_they_are_corrected(text):
    codec, k, v = codec_of(text), sample(0, 1, 2, 64, D), sample(5, 1, 2, 64, D)
    store = store_of(codec, k, v)
    for side, x, found in zip("kv", (k, v), coarse(store), strict=True):
        parts, page = held(store), ends_of(codec, side)[0]
        inside = torch.ones(2, 64, D, dtype=torch.bool)
        if codec.s and page:
            inside = inside.unflatten(1, (-1, page)).scatter(2, parts[f"{side}.place"].long(), False).flatten(1, 2)
        elif codec.s:
            inside = inside.scatter(2, parts[f"{side}.place"].long(), False)
        step, least = (y.double() for y in parts[f"{side}.range"].unbind(2))
        if side == "k":
            step, least = (y.repeat_interleave(64 // y.shape[1], 1) for y in (step, least))
        else:
            step, least = (y.repeat_interleave(D // y.shape[2], 2) for y in (step, least))
        error = (found - x)[0].double().abs()
        assert (error <= step / 2 + ((2**codec.bits - 1) * step + least.abs()) * 2**-11 + 1e-6)[inside].all()


@pytest.mark.parametrize("family", [Gear, GearL])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_low_rank_term_helps_and_more_of_it_helps_more(family, bits):
    k, v = sample(0, 2, 3, 64, D), sample(5, 2, 3, 64, D)
    s = {"s": 0.25} if family is Gear else {}
    for side, x in enumerate((k, v)):
        found, bare = [], None
        for rank in (1, 2, 4, 8, 12):
            store = store_of(family(bits=bits, group=8, rank=rank, **s), k, v)
            error = decoded(store)[side] - x
            left = x - coarse(store)[side] if family is GearL else None
            if left is not None:  # what the factors approximate
                least = torch.linalg.svdvals(left.double())[..., rank:].square().sum(-1).sqrt()
                assert (error.double().norm(dim=(2, 3)) >= least * (1 - 2e-3)).all()
                assert error.double().norm(dim=(2, 3)).mean() <= 1.2 * least.mean()
            found.append(error.norm(dim=(2, 3)))
            # without it: the outliers are exact all the same
            plain = store_of(GearL(bits=bits, group=8, rank=1), k, v) if family is GearL else None
            bare = (coarse(plain)[side] - x).norm(dim=(2, 3)) if plain else bare
            if family is Gear:
                page, _ = ends_of(Gear(bits=bits, group=8, **s), "kv"[side])
                base = store.forms[side].base.decode(pieces(store)[side])
                place = pieces(store)[side].parts["place"].long()
                rest = (x - base).unflatten(2, (-1, page)) if page else x - base
                bare = rest.scatter(3, place, 0.0).flatten(2, -2 if page else 2).flatten(2).norm(dim=2)
        assert (found[0] < bare).all()
        for worse, better in pairwise(found):
            assert (better < worse).all()


@pytest.mark.parametrize("text", CODECS)
def test_neither_rows_nor_heads_depend_on_each_other(text):
    """The reference fits every row in the subspace of the first."""
    codec, k, v = codec_of(text), sample(0, 3, 4, 64, D), sample(5, 3, 4, 64, D)
    whole, order = store_of(codec, k, v), torch.tensor([2, 0, 3, 1])
    for row in range(3):
        assert same(held(whole, row), held(store_of(codec, k[row : row + 1], v[row : row + 1])))
    turned = store_of(codec, k[:, order], v[:, order])
    for row in range(3):
        assert same({name: x[order] for name, x in held(whole, row).items()}, held(turned, row))


@pytest.mark.parametrize("text", ["gear(bits=2)", "gear(bits=4)", "gear(bits=4, s=0.1)", "gear_l(bits=2)"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_constant_vectors_are_exact_to_fp16(text, value):
    codec = codec_of(text)
    x = torch.full((1, 1, 2 * codec.grain, D), value)
    for found in decoded(store_of(codec, x, x)):
        assert (found - x).abs().max() <= abs(value) * 2**-11


@pytest.mark.parametrize("text", ["gear(bits=2)", "gear(bits=4, s=0.1)", SMALL])
def test_of_equal_entries_none_is_corrected_twice(text):
    codec = codec_of(text)
    x = cloud(0, 1, 2, 2 * codec.grain, D).round()  # many ties
    x[:, :, : codec.grain // 2] = 0
    x[:, 1] = torch.where(x[:, 1] > 1, 3.3, 0.1)
    store = store_of(codec, x, x)
    for side, found in zip("kv", decoded(store), strict=True):
        page, ends = ends_of(codec, side)
        place = held(store)[f"{side}.place"].long()
        axis = 2
        places = place.sort(axis).values.diff(dim=axis)
        assert place.shape[axis] == 2 * ends
        assert (places > 0).all()
        error = (found - x)[0].abs()
        at = error.unflatten(1, (-1, page)).gather(2, place) if page else error.gather(2, place)
        assert (at <= held(store)[f"{side}.error"].float().abs() * 2**-11 + 1e-6).all()


# ------------------------------------------------------------------------------------------------------------- reading
CUTS = [(), (64,), (64, 128)]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("n", [2, FEW + 1])
def test_reading_is_attention_over_what_is_decoded(text, cuts, n):
    store = store_of(codec_of(text), sample(0, 2, HEADS, 192, D), sample(5, 2, HEADS, 192, D), cuts)
    assert len(store.lengths[MERGED][0]) == len(cuts) + 1
    q, stored, (k, v) = cloud(9, 2, 6, n, D), pieces(store), decoded(store)
    key, value = store.forms
    dense = torch.einsum("bhgnd,bhmd->bhgnm", q.unflatten(1, (HEADS, 3)), k).flatten(1, 2)
    torch.testing.assert_close(key.scores(key.prologue(q, stored[0]), stored[0]), dense, atol=1e-4, rtol=1e-5)
    p = dense.softmax(-1)
    wanted = torch.einsum("bhgnm,bhmd->bhgnd", p.unflatten(1, (HEADS, 3)), v).flatten(1, 2)
    torch.testing.assert_close(value.epilogue(value.weighted_sum(p, stored[1]), stored[1]), wanted, atol=1e-5, rtol=1e-5)
    visible = Visible(length=torch.tensor([192, 70]))
    found, dense = attend(store.forms, q, tuple(stored), 0.25, visible), attention(q, k, v, 0.25, visible)
    torch.testing.assert_close(found.out, dense.out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.lse, dense.lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("text", CODECS)
def test_every_segment_is_read_by_its_own_factors_and_ranges(text, cuts):
    """Each as if it were alone, in the whole and in pieces, also across their borders."""
    codec, k, v = codec_of(text), sample(0, 2, HEADS, 192, D), sample(5, 2, HEADS, 192, D)
    store = store_of(codec, k, v, cuts)
    for lo, hi in zip((0, *cuts), (*cuts, 192), strict=True):
        alone = decoded(store_of(codec, k[:, :, lo:hi], v[:, :, lo:hi]))
        for side, form, whole, one in zip("kv", store.forms, decoded(store), alone, strict=True):
            torch.testing.assert_close(whole[:, :, lo:hi], one, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(form.decode(store.piece(side, lo, hi, slots)), one, atol=1e-6, rtol=1e-6)
    for side, form, whole in zip("kv", store.forms, decoded(store), strict=True):
        for lo, hi in ((0, 64), (64, 128), (0, 128), (64, 192)):
            torch.testing.assert_close(
                form.decode(store.piece(side, lo, hi, slots)), whole[:, :, lo:hi], atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("lists", [1, 4])
def test_a_token_picked_alone_is_the_same_token(text, cuts, lists):
    store = store_of(codec_of(text), sample(0, 2, HEADS, 192, D), sample(5, 2, HEADS, 192, D), cuts)
    ids = torch.randint(0, 192, (2, lists, 21), generator=torch.Generator().manual_seed(2))
    wide = max(lists, HEADS)
    index = ids.expand(-1, wide, -1).unsqueeze(-1).expand(-1, -1, -1, D)
    for side, form, exact, whole in zip("kv", store.forms, coarse(store), decoded(store), strict=True):
        taken = store.take(side, ids, slots)
        bare, found = (x.repeat_interleave(wide // HEADS, 1).gather(2, index) for x in (exact, whole))
        assert torch.equal(form.coarse(taken), bare)
        torch.testing.assert_close(form.decode(taken), found, atol=1e-6, rtol=1e-6)
        q = cloud(3, 2, 4, 2, D)
        dense = torch.einsum("bhgnd,bhmd->bhgnm", q.unflatten(1, (wide, -1)), found).flatten(1, 2)
        torch.testing.assert_close(form.scores(q, taken), dense, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("text", "k", "v"),  # bytes per token of a key and of a value of size d, encoded with n - 1 others
    [
        (  # codes, ranges of 64, factors of rank 4, of 128 tokens two exact entries, of a token's d one at each end
            "gear(bits=2, recent=8)",
            lambda d, n: d / 4 + 4 * d / 64 + 8 * (1 + d / n) + 3 * 2 * d / 128,
            lambda d, n: d / 4 + 4 * d / 64 + 8 * (1 + d / n) + 3 * 2,
        ),
        (  # KCVT: a range per channel and segment, and one per token
            "gear(bits=4, rank=2, s=0.1, recent=8)",
            lambda d, n: d / 2 + 4 * d / n + 4 * (1 + d / n) + 3 * 6 * d / 64,
            lambda d, n: d / 2 + 4 + 4 * (1 + d / n) + 3 * 2 * round(0.1 * d / 2),
        ),
        (
            "gear_l(bits=4, rank=3, recent=8)",
            lambda d, n: d / 2 + 4 * d / n + 6 * (1 + d / n),
            lambda d, n: d / 2 + 4 + 6 * (1 + d / n),
        ),
        (
            "gear_l(bits=2, group=32, recent=8)",
            lambda d, n: d / 4 + 4 * d / 32 + 8 * (1 + d / n),
            lambda d, n: d / 4 + 4 * d / 32 + 8 * (1 + d / n),
        ),
    ],
)
def test_the_body_takes_the_bytes_of_the_cards_formula(d, text, k, v):
    model, (ids, mask) = tiny_model(num_hidden_layers=1, head_dim=d), prompts(2, 300, 50)
    cache = kvlib.Cache(model, text)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.finish_prefill()
    codec = cache.recipe.codec
    step = -(-64 // codec.grain) * codec.grain
    segments = [(n - 4 - 8) // step * step for n in (300, 250)]
    wanted = sum(HEADS * n * (k(d, n) + v(d, n)) for n in segments)
    assert cache.nbytes(by="part", used=True)["body"] == pytest.approx(wanted, abs=1e-6)
    for n in segments:
        found = [form.bytes_per_token(d, n, merged=n) for form in codec.forms()]
        assert found == pytest.approx([k(d, n), v(d, n)])


def test_defaults_are_those_of_the_paper():
    two, four, eight = Gear(bits=2), Gear(), Gear(bits=8)
    assert four.bits == 4
    assert (two.tokens, four.tokens, eight.tokens) == (64, 0, 0)
    assert (two.rank, two.s, two.recent) == (4, 0.02, 64)
    for codec in (two, four):
        assert codec.page % (codec.tokens or 32) == 0
        assert codec.keys().page == codec.grain == codec.page == 128  # two of a hundred
        assert codec.keys().ends(128) == codec.values().ends(128) == 1
        assert codec.values().page == 0
    assert (GearL().s, GearL().page, GearL().grain, GearL(bits=2).grain) == (0, 0, 1, 64)
    assert Gear(group=16).tokens == 16
    assert Gear(bits=2, group=0).tokens == 0
    assert Gear(bits=4, s=0.25).keys().ends(128) == 8
    assert Gear(s=0.25).values().ends(128) == 16


# -------------------------------------------------------------------------------------------------------------- merging
def segments(store, row=0):
    return store.lengths[MERGED][row]


def in_pieces(codec, k, v, size, first=0):
    """A store whose segments have `size` tokens, but the first."""
    return store_of(codec, k, v, tuple(range(first or size, k.shape[2], size)))


@pytest.mark.parametrize("text", CODECS)
def test_eight_alike_segments_become_one(text):
    codec, size = codec_of(text), codec_of(text).grain if codec_of(text).grain > 1 else 8
    k, v = sample(0, 2, HEADS, 10 * size, D), sample(5, 2, HEADS, 10 * size, D)
    store = in_pieces(codec, k[:, :, : 9 * size], v[:, :, : 9 * size], size, 2 * size)
    assert segments(store) == (2 * size, *[size] * 7)
    then, parts, values = store.snapshot(), held(store), decoded(store)
    last = [x[:, :, 9 * size :] for x in (k, v)]
    rows, position = np.arange(2), torch.arange(9 * size, 10 * size).expand(2, HEADS, -1)
    store.append(rows, *last, position)
    assert [segments(store, row) for row in rows] == [(2 * size, ALIKE * size)] * 2
    now, rank = held(store), codec.rank
    assert sum(x.nbytes for x in now.values()) < sum(x.nbytes for x in parts.values()) + 2 * HEADS * size * D * 4
    for side in "kv":
        assert now[f"{side}.b"].shape == (HEADS, 2, D, rank)
        assert parts[f"{side}.b"].shape == (HEADS, 8, D, rank)
        assert torch.equal(now[f"{side}.b"][:, 0], parts[f"{side}.b"][:, 0])
        assert torch.equal(now[f"{side}.a"][:, : 2 * size], parts[f"{side}.a"][:, : 2 * size])
        assert not torch.equal(now[f"{side}.a"][:, 2 * size : 9 * size], parts[f"{side}.a"][:, 2 * size :])
        for name in {*parts} - {f"{side}.{part}" for side in "kv" for part in ("a", "b", "error")}:
            assert torch.equal(now[name][:, : parts[name].shape[1]], parts[name])
    assert used(store) == used(in_pieces(codec, k, v, size, 2 * size))
    assert all(torch.equal(x, y) for x, y in zip(decoded(then), values, strict=True))  # bit for bit
    assert same(held(then), parts)
    assert segments(then) == (2 * size, *[size] * 7)
    for found, before in zip(decoded(store), values, strict=True):
        torch.testing.assert_close(found[:, :, : 2 * size], before[:, :, : 2 * size], atol=1e-6, rtol=1e-6)
    then.append(rows, *last, position)
    assert same(held(then, 1), held(store, 1))


def used(store):
    return store.used()["device"]


@pytest.mark.parametrize("text", ["gear_l(bits=4, rank=4)", "gear_l(bits=2, group=8, rank=2)", SMALL])
def test_a_merged_term_is_nearly_the_best_of_its_rank_for_the_terms_it_replaces(text):
    codec, k, v = codec_of(text), sample(0, 1, HEADS, 64, D), sample(5, 1, HEADS, 64, D)
    merged = in_pieces(codec, k, v, 8)
    before = [store_of(codec, k[:, :, lo : lo + 8], v[:, :, lo : lo + 8]) for lo in range(0, 64, 8)]
    for side in "kv":
        terms = torch.cat([apart(one, side) for one in before], 2)
        error = (apart(merged, side) - terms).double().norm(dim=(2, 3))
        least = torch.linalg.svdvals(terms.double())[..., codec.rank :].square().sum(-1).sqrt()
        assert (error >= least * (1 - 2e-3)).all()
        assert (error <= 1.15 * least).all()
        if not codec.s:  # a part of what codes miss is still corrected
            index, x = "kv".index(side), (k, v)["kv".index(side)]
            assert (decoded(merged)[index] - x).norm() < 0.97 * (coarse(merged)[index] - x).norm()


def test_what_all_segments_share_survives_merging():
    """The known answer of rank one, token by token of every segment."""
    x, _ = grid(4, 8, 2, (3, 6))
    x = torch.cat([x, *(grid(4, 8, 2, (3, 6), seed)[0] for seed in (1, 2, 3))], 2)[:, :, :128]
    per_token = torch.rand(1, 2, 128, 1) - 0.5
    per_token.unflatten(2, (-1, 8))[:, :, :, [3, 6]] = 0
    extra = per_token * 0.2 * torch.rand(1, 2, 1, D)
    store = in_pieces(GearL(bits=4, group=8, rank=1), x + extra, x + extra, 16)
    assert segments(store) == (128,)
    torch.testing.assert_close(decoded(store)[0], x + extra, atol=3e-4, rtol=0)
    assert (coarse(store)[0] - (x + extra)).abs().max() > 0.02


def test_segments_merge_again_up_to_the_longest():
    codec = GearL(rank=1)
    k = cloud(0, 1, 1, 64 * 4, 4)
    assert segments(in_pieces(codec, k, k, 4)) == (256,)
    assert segments(in_pieces(codec, k[:, :, :-4], k[:, :, :-4], 4)) == (*[32] * 7, *[4] * 7)
    long = cloud(0, 1, 1, 8 * (LONGEST // 8 + 1), 2)
    assert segments(in_pieces(codec, long[:, :, :LONGEST], long[:, :, :LONGEST], LONGEST // 8)) == (LONGEST,)
    assert segments(in_pieces(codec, long, long, LONGEST // 8 + 1)) == (LONGEST // 8 + 1,) * 8


def test_ranges_of_a_whole_segment_stay_when_factors_merge():
    """KCVT: a token is read by the range of the segment it came with."""
    codec, k, v = GearL(bits=4, rank=2), sample(0, 2, HEADS, 80, D), sample(5, 2, HEADS, 80, D)
    k *= torch.linspace(1, 20, 80)[:, None]  # ranges that differ
    store = in_pieces(codec, k, v, 8, 16)
    assert segments(store) == (16, 64)
    assert store.lengths[SEGMENT][0] == (16, *[8] * 8)
    for lo, hi in ((0, 16), *((at, at + 8) for at in range(16, 80, 8))):
        alone = store_of(codec, k[:, :, lo:hi], v[:, :, lo:hi])
        for found, one in zip(coarse(store), coarse(alone), strict=True):
            assert torch.equal(found[:, :, lo:hi], one)
    for index, side in enumerate("kv"):
        torch.testing.assert_close(decoded(store)[index], coarse(store)[index] + apart(store, side), atol=1e-5, rtol=1e-6)
        ids = torch.randint(0, 80, (2, HEADS, 30), generator=torch.Generator().manual_seed(0))
        wanted = decoded(store)[index].gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, D))
        torch.testing.assert_close(store.forms[index].decode(store.take(side, ids, slots)), wanted, atol=1e-5, rtol=1e-6)


def test_outliers_stay_exact_when_segments_merge():
    codec, k, v = codec_of(SMALL), sample(0, 1, HEADS, 64, D), sample(5, 1, HEADS, 64, D)
    store = in_pieces(codec, k, v, 8)
    assert segments(store) == (64,)
    for side, x, found in zip("kv", (k, v), decoded(store), strict=True):
        error, place = (found - x)[0].abs(), held(store)[f"{side}.place"].long()
        error = error.unflatten(1, (-1, 8)).gather(2, place) if side == "k" else error.gather(2, place)
        assert (error <= (held(store)[f"{side}.error"].float().abs() + 1) * 2**-10).all()  # rounded twice


# -------------------------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("recipe", STREAMS)
@pytest.mark.parametrize("lengths", [(40, 23), (17, 58)])
def test_a_neighbour_changes_nothing_while_segments_come_and_merge(recipe, lengths):
    """Rows of unequal lengths merge at different times, or not at all; what is read of a row is what it would be alone."""
    n, steps = max(lengths), 70
    k, v = sample(0, 2, HEADS, n + steps, D), sample(5, 2, HEADS, n + steps, D)
    padded = [torch.full_like(x[:, :, :n], 1e3) for x in (k, v)]
    for row, length in enumerate(lengths):
        for x, full in zip(padded, (k, v), strict=True):
            x[row, :, n - length :] = full[row, :, :length]
    both, outs = group_of(recipe), []
    feed(both, *padded, None if lengths == (n, n) else lengths)
    both.finish_prefill()
    for t in range(steps):
        outs.append(feed(both, *(torch.stack([x[row, :, lengths[row] + t][:, None] for row in range(2)]) for x in (k, v))))
    for row, length in enumerate(lengths):
        own = [x[row : row + 1, :, : length + steps] for x in (k, v)]
        alone = prompt_and_steps(recipe, *(x[:, :, :-1] for x in own), length)
        last = feed(alone, *(x[:, :, -1:] for x in own))
        assert split_of(both, row) == split_of(alone)
        assert segments(both.body.store, row) == segments(alone.body.store)
        assert same(held(both.body.store, row), held(alone.body.store))
        torch.testing.assert_close(outs[-1][row], last[0], atol=1e-5, rtol=1e-4)
    assert ALIKE * 8 in {n for row in range(2) for n in segments(both.body.store, row)}


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 20)).filter(sum), min_size=4, max_size=7),
    st.sampled_from(STREAMS),
)
def test_segments_are_the_same_however_tokens_arrived(drafts, recipe):
    """One by one, or in drafts of which some are taken back after they made segments merge."""
    prompt, steps = 35, sum(good for good, _ in drafts)
    rest = max(0, 66 - steps)  # until eight blocks have been sealed
    total = prompt + rest + steps
    k, v = sample(0, 1, HEADS, total, D), sample(5, 1, HEADS, total, D)
    plain = prompt_and_steps(recipe, k, v, prompt)
    drafted = prompt_and_steps(recipe, k[:, :, : prompt + rest], v[:, :, : prompt + rest], prompt)
    at = prompt + rest
    for good, wrong in drafts:
        bad = torch.full((1, HEADS, wrong, D), 77.0)
        feed(drafted, *(torch.cat([x[:, :, at : at + good], bad], 2) for x in (k, v)), recording=True)
        drafted.crop(wrong)
        at += good
    assert split_of(drafted) == split_of(plain)
    assert segments(drafted.body.store) == segments(plain.body.store)
    assert same(held(drafted.body.store), held(plain.body.store))


@pytest.mark.parametrize("recipe", STREAMS)
def test_a_draft_that_made_segments_merge_is_undone(recipe):
    k, v = sample(0, 1, HEADS, 110, D), sample(5, 1, HEADS, 110, D)
    group = prompt_and_steps(recipe, k[:, :, :93], v[:, :, :93], 34)
    before, values = segments(group.body.store), decoded(group.body.store)
    assert before == (24, *[8] * 7)
    bad = torch.full((1, HEADS, 12, D), 77.0)
    feed(group, bad, bad, recording=True)
    assert segments(group.body.store) == (24, 64)
    group.crop(12)
    assert segments(group.body.store) == before
    assert all(torch.equal(x, y) for x, y in zip(decoded(group.body.store), values, strict=True))
    for t in range(93, 110):
        feed(group, k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert same(held(group.body.store), held(prompt_and_steps(recipe, k, v, 34).body.store))


@pytest.mark.parametrize("recipe", STREAMS)
def test_copies_and_reordered_rows_keep_their_segments(recipe):
    k, v = sample(0, 2, HEADS, 110, D), sample(5, 2, HEADS, 110, D)
    group = prompt_and_steps(recipe, k[:, :, :93], v[:, :, :93], 34)
    twin, other = group.copy(None), torch.ones(2, HEADS, 1, D)
    group.reorder(torch.tensor([1, 0, 0]))
    for t in range(93, 110):
        feed(twin, other, other)
        feed(group, k[[1, 0, 0], :, t : t + 1], v[[1, 0, 0], :, t : t + 1])
    plain = prompt_and_steps(recipe, k, v, 34)
    for row, source in enumerate((1, 0, 0)):
        assert segments(group.body.store, row) == segments(plain.body.store, source) == (24, 64, 8)
        assert same(held(group.body.store, row), held(plain.body.store, source))
    changed = [torch.cat([x[:, :, :93], other.expand(-1, -1, 17, -1)], 2) for x in (k, v)]
    assert same(held(twin.body.store), held(prompt_and_steps(recipe, *changed, 34).body.store))


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gear(bits=3)", ["gear(bits=3)", "2, 4, 8"]),
        ("gear(rank=0)", ["rank=0", "1 or more"]),
        ("gear(rank=2.5)", ["rank=2.5"]),
        ("gear(rank=True)", ["rank=True"]),
        ("gear(group=1)", ["group=1", "2 to 256"]),
        ("gear(group=257)", ["group=257", "2 to 256"]),
        ("gear(group=-8)", ["group=-8"]),
        ("gear(group=automatic)", ["group=automatic"]),
        ("gear(group=True)", ["group=True"]),
        ("gear(s=-0.01)", ["s=-0.01", "0 to 0.25"]),
        ("gear(s=0.26)", ["s=0.26", "0 to 0.25"]),
        ("gear(s=nan)", ["s=nan"]),
        ("gear(s=True)", ["s=True"]),
        ("gear(s=many)", ["s=many"]),
        ("gear(s=0.001)", ["s=0.001", "a larger share", "gear_l"]),
        ("gear_l(bits=16)", ["gear_l(bits=16)"]),
        ("gear + gear_l", ["gear and gear_l", "takes one"]),
        ("h2o + gear", ["128 tokens at a time", "online h2o"]),
        ("h2o + gear_l", ["gear_l", "online h2o", "kv4"]),
        ("sentencekv(r=inf) + gear", ["128 tokens together", "units end anywhere"]),
        ("quest(budget=250) + gear", ["seals 128 tokens", "budget=256"]),
        ("gear + block=100", ["block=100", "128"]),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(text, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "d", "words"),
    [
        ("gear(rank=17)", 16, ["gear(rank=17)", "up to the head size 16"]),
        ("gear_l(rank=65)", 64, ["gear_l(rank=65)"]),
        ("gear", 512, ["gear(s=0.02)", "head size 512", "gear_l"]),
        ("gear(bits=8)", 257, ["head size 257", "gear_l"]),
        ("gear(bits=2)", 96, ["group=64", "divide the head size 96"]),
        ("gear(bits=2, group=0)", 6, ["bits=2", "multiple of 4"]),
    ],
)
def test_head_sizes_that_cannot_be_kept_are_refused(text, d, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text).codec.fit(2, 2, d)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "d"),
    [
        ("gear(rank=16)", 16),
        ("gear", 256),
        ("gear_l(bits=8)", 512),
        ("gear(s=0)", 512),
        ("gear(s=0.008)", 64),
        ("gear(s=0.25)", 64),
    ],
)
def test_the_largest_that_can_be_kept_are_not(text, d):
    codec = Recipe.parse(text).codec
    codec.fit(1, 1, d)
    assert Recipe.parse(str(codec)).codec == codec
    k = cloud(0, 1, 1, max(codec.grain, 4), d)
    assert all((found - k).abs().max() < 0.5 for found in decoded(store_of(codec, k, k)))


def test_what_the_remedy_says_works():
    for better in ("gear(bits=2, group=128, s=0.008)", "gear(bits=2, group=150, s=0.02)", "gear(bits=2, group=150, s=0)"):
        assert Recipe.parse(better).codec is not None


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("gear(bits=4)", (256, 128, 128)),
        ("gear(bits=2)", (256, 128, 128)),
        ("gear_l(bits=2, group=64)", (256, 128, 128)),
        ("gear(bits=4, group=32)", (192, 96, 96)),
        ("gear_l(bits=2, group=32)", (96, 160, 32)),
        ("gear_l(bits=4)", (101, 128, 128)),
        *((text, (256, *[128] * 9)) for text in ("gear(bits=4)", "gear(bits=2)", "gear_l(bits=4)")),
    ],
)
def test_the_kernel_of_one_pass_gets_the_parts_it_needs(text, lengths):
    """What a GPU runs, here by its operator's function for the CPU, against the three terms one after the other; also
    after eight segments have become one."""
    forms, total = codec_of(text).forms(), sum(lengths)
    store = Store(forms, 2, 2, torch.device("cpu"))
    for n in lengths:
        x = [cloud(n + i, 2, 2, n, 64) for i in range(2)]
        store.append(np.arange(2), *x, torch.arange(n).expand(2, 2, -1))
    q = cloud(5, 2, 4, 1, 64)
    length = torch.tensor([total, total - 112])
    assert segments(store) == (lengths if len(lengths) < ALIKE else (256, 1024, 128))
    first = lengths[0] // store.grain * store.grain
    for lo, hi in ((0, total), (first, total), (0, first + 64 // store.grain * store.grain), (first, first + store.grain)):
        cut = tuple(store.piece(side, lo, hi, slots) for side in "kv")
        read = tuple(store.whole(side, slots) for side in "kv") if hi - lo == total else cut
        seen = (length - lo).clamp(0, hi - lo)
        found = forms[0].in_one_pass(forms[1], q, read, Reading(None, seen, 0.2, None))
        wanted = attend(forms, q, cut, 0.2, Visible(length=seen))
        torch.testing.assert_close(found.out, wanted.out, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found.lse, wanted.lse, atol=2e-6, rtol=1e-5)


def test_the_kernel_of_one_pass_is_not_given_values_of_another_size():
    forms = codec_of("gear_l(bits=4)").forms()
    store = Store(forms, 1, 1, torch.device("cpu"))
    store.append(np.zeros(1, dtype=int), cloud(0, 1, 1, 96, 64), cloud(1, 1, 1, 96, 128), torch.arange(96).expand(1, 1, -1))
    whole = tuple(store.whole(side, slots) for side in "kv")
    assert forms[0].in_one_pass(forms[1], cloud(5, 1, 1, 1, 64), whole, Reading(None, None, 0.2, None)) is None


@pytest.mark.parametrize(("k", "v"), [("gear_l(rank=4)", "gear_l(rank=8)"), ("gear_l(group=48)", "gear_l")])
def test_the_kernel_of_one_pass_is_not_given_two_ranks_or_groups_that_no_tile_fits(k, v):
    key, value = codec_of(k).keys(), codec_of(v).values()
    store = Store((key, value), 1, 1, torch.device("cpu"))
    store.append(np.zeros(1, dtype=int), *cloud(0, 2, 1, 1, 96, 64), torch.arange(96).expand(1, 1, -1))
    whole = tuple(store.whole(side, slots) for side in "kv")
    assert key.in_one_pass(value, cloud(5, 1, 1, 1, 64), whole, Reading(None, None, 0.2, None)) is None


@pytest.mark.parametrize("side", ["keys", "values"])
def test_segments_merge_on_a_gpu_while_places_lie_in_host_memory(side):
    """On a GPU that need not be there, whose tensors do not mix with others."""
    form = getattr(codec_of("gear(bits=4)"), side)()
    with FakeTensorMode():
        x = torch.empty(1, 2, 8 * 128, 64, dtype=torch.float16)
        parts = form.encode(Tokens(x, torch.arange(8 * 128).expand(1, 2, -1), None, {}, torch.zeros(1)))
        parts = {
            name: part if name in form.moving else torch.empty_like(part, device="cuda") for name, part in parts.items()
        }
        parts["b"] = parts["b"].repeat(1, 1, 8, 1, 1)
        merged = form.merge(parts)
    assert {name: (x.device.type, x.shape[2]) for name, x in merged.items()} == {
        "a": ("cuda", 8 * 128),
        "b": ("cuda", 1),
        "error": ("cuda", parts["error"].shape[2]),
    }
