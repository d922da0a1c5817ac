"""Rotated codes: what a rotation spares, what a codebook costs, and products without bias."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import census
from kvlib.kernels.hadamard import rotate
from kvlib.kernels.quantise import pack
from kvlib.policies import RecipeError
from kvlib.policies.codec.rotated import LloydMax, Rotated
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import FEW, Stored, Tokens, attend
from kvlib.store import Store
from kvlib.testing import prompts, tiny_model
from tests.reference import reference

DISTORTION = {2: 0.1175, 3: 0.0345, 4: 0.0095}  # of Lloyd and Max's levels, on the standard normal distribution
FORMS = [Uniform(bits, rotated=True) for bits in (2, 3, 4, 8)] + [LloydMax(bits) for bits in DISTORTION]
forms = pytest.mark.parametrize("form", FORMS, ids=str)
lloyd_max = pytest.mark.parametrize("bits", DISTORTION)


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(form, x):
    """Tokens x [B, H, m, d] as the form keeps them."""
    slots = torch.arange(x.shape[2])
    parts = form.encode(Tokens(x, slots.expand(x.shape[:3]), None, {}, torch.zeros(len(x), dtype=torch.long)))
    return Stored(x.shape[1], parts, {}, slots, lambda span: slots, lambda: slots, None)


def restored(form, x):
    """Vectors x [m, d] as they come back."""
    kept = stored(form, x[None, None])
    return form.epilogue(form.decode(kept), kept)[0, 0]


def share_lost(x, y):
    """Squared error of y relative to x [m, d]."""
    return ((x - y).square().sum() / x.square().sum()).item()


# ------------------------------------------------------------------------------------------------------- the codebook
@lloyd_max
def test_the_codebooks_distortion_is_the_known_one(bits):
    """Of the levels themselves, D.  What is stored makes products unbiased, at the cost of the norm: D becomes D / (1 - D),
    and scaled back it is D again, or a little less, because every vector has a factor of its own."""
    x = torch.nn.functional.normalize(cloud(bits, 40000, 128), dim=-1)
    form, known = LloydMax(bits), DISTORTION[bits]
    kept = stored(form, x[None, None])
    levels = (form.decode(kept) / kept.parts["norm"].float())[0, 0] / 128**0.5
    assert share_lost(rotate(x), levels) == pytest.approx(known, rel=0.022)  # a sphere of 128 has thinner tails
    y = restored(form, x)
    best = (x * y).sum() / y.square().sum()
    assert share_lost(x, best * y) == pytest.approx(known, rel=0.04)
    assert share_lost(x, best * y) < share_lost(rotate(x), levels)
    assert best.item() == pytest.approx(1 - known, rel=0.005)
    assert share_lost(x, y) == pytest.approx(known / (1 - known), rel=0.04)


@lloyd_max
def test_products_have_no_bias(bits):
    """A vector's product with its code is its square, so codes shrink no attention logit; and any other product is right on
    average over rotations, here over random vectors."""
    x = cloud(bits, 4000, 128) * torch.logspace(-2, 2, 4000)[:, None]
    y = restored(LloydMax(bits), x)
    torch.testing.assert_close((x * y).sum(-1), x.square().sum(-1), rtol=2e-3, atol=0)
    unit, coded = (z / x.norm(dim=-1, keepdim=True) for z in (x, y))
    q = torch.nn.functional.normalize(unit + cloud(9, 4000, 128) * 128**-0.5, dim=-1)
    true, got = (unit * q).sum(-1), (coded * q).sum(-1)
    assert ((got * true).sum() / true.square().sum()).item() == pytest.approx(1, abs=0.005)


@lloyd_max
def test_levels_split_the_normal_distribution_where_its_means_are(bits):
    """Each level is the mean of what is coded to it, each border the middle of two levels."""
    codes = torch.arange(2**bits, dtype=torch.uint8).view(1, 1, -1, 1).expand(-1, -1, -1, 8)
    parts = {"codes": pack(codes, bits), "norm": torch.ones(1, 1, 2**bits, 1)}
    levels = LloydMax(bits).decode(Stored(1, parts, {}, torch.arange(2**bits), None, None, None))
    found = levels.unique()
    assert len(found) == 2**bits
    torch.testing.assert_close(found, -found.flip(0))
    x = cloud(0, 200_000)
    nearest = (x[:, None] - found).abs().argmin(1)
    for i, level in enumerate(found):
        members = x[nearest == i]
        assert members.mean().item() == pytest.approx(level.item(), abs=4 * (1 / len(members)) ** 0.5 + 1e-3)


@lloyd_max
def test_one_lone_channel_costs_no_more_than_many(bits):
    """Without a rotation a one-hot key would lie far outside the levels."""
    form, d = LloydMax(bits), 128
    normal = share_lost(x := cloud(1, 500, d), restored(form, x))
    hot = torch.eye(d) * torch.linspace(-30, 30, d)[:, None]
    assert share_lost(hot, restored(form, hot)) < 1e-6
    few = torch.zeros(500, d).scatter_(1, cloud(2, 500, d).argsort(1)[:, :6], cloud(3, 500, 6))
    assert share_lost(few, restored(form, few)) < 1.1 * normal


def test_a_channel_that_stands_out_costs_a_rotated_token_less():
    x = cloud(0, 1000, 128)
    x[:, 7] += 30
    plain, rotated = (share_lost(x, restored(form, x)) for form in (Uniform(4), Uniform(4, rotated=True)))
    assert rotated < plain / 5
    assert share_lost(x, restored(LloydMax(4), x)) < plain / 5


@pytest.mark.parametrize("d", [16, 64, 128])
@forms
def test_known_answer_of_the_first_unit_vector(form, d):
    """Rotated, e_1 sqrt(d) is +1 or -1 everywhere: two levels are enough, and the vector comes back."""
    x = torch.zeros(1, d)
    x[0, 0] = d**0.5
    kept = stored(form, x[None, None])
    y = form.decode(kept)[0, 0, 0]
    torch.testing.assert_close(y.abs(), torch.ones(d), atol=1e-3, rtol=0)
    assert torch.equal(y.sign(), rotate(x)[0].sign())
    torch.testing.assert_close(restored(form, x), x, atol=1e-2, rtol=0)


@forms
def test_zero_comes_back_as_zero(form):
    x = torch.zeros(3, 32)
    x[1] = cloud(0, 32)
    y = restored(form, x)
    assert (y[[0, 2]] == 0).all()
    assert (y[1] != 0).all()
    assert restored(form, -torch.zeros(1, 32)).eq(0).all()


@forms
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_and_small_vectors_keep_their_share(form, size, dtype):
    x = (cloud(0, 200, 64) * size).to(dtype).float()
    lost = share_lost(x, restored(form, x.to(dtype)))
    worst = {2: 0.25, 3: 0.06, 4: 0.015, 8: 1e-3}[form.bits]
    assert lost < worst
    assert lost > worst / 40


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 48, 64, 80, 96, 128]), st.integers(0, 1000))
def test_uniform_codes_are_off_by_half_a_step(bits, d, seed):
    form, x = Uniform(bits, rotated=True), cloud(seed, 1, 2, 5, d)
    kept, y = stored(form, x), rotate(x)
    scale, least = kept.parts["range"].float().unbind(3)
    error = (form.decode(kept) - y).abs()
    rounding = 2.0**-11 * (least.abs() + (2**bits - 1) * scale)
    assert (error <= scale / 2 + 2 * rounding).all()
    assert (error > scale / 4).any()


# ------------------------------------------------------------------------------------------------------ how it is read
@forms
@pytest.mark.parametrize("n", [1, FEW + 1])
@pytest.mark.parametrize("d", [16, 80])
def test_attention_is_that_over_the_restored_vectors(form, n, d):
    """The query is rotated once, and so is the output back."""
    q, k, v = cloud(0, 2, 6, n, d), cloud(1, 2, 2, 50, d), cloud(2, 2, 2, 50, d)
    k[..., 3] += 4
    v[..., 0] += 3
    kept = stored(form, k), stored(form, v)
    near = [torch.stack([torch.stack([restored(form, x) for x in row]) for row in z]) for z in (k, v)]
    part = attend((form, form), q, kept, d**-0.5)
    out, lse, _ = reference(q, *near, d**-0.5)
    torch.testing.assert_close(part.out.double(), out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.lse.double(), lse, atol=1e-4, rtol=1e-4)
    exact, _, _ = reference(q, k, v, d**-0.5)
    if form.bits == 8:
        assert (part.out - exact).abs().max() < 0.05
    assert (part.out - exact).norm() < 0.5 * exact.norm()


def test_keys_and_values_may_have_different_bits():
    codec = Rotated(bits=4, k_bits=8, v_bits=2)
    assert codec.forms() == (Uniform(8, rotated=True), Uniform(2, rotated=True))
    assert Rotated(bits=3).forms() == (Uniform(3, rotated=True),) * 2
    assert Rotated(bits=3, v_bits=2, levels="lloyd_max").forms() == (LloydMax(3), LloydMax(2))


@forms
def test_a_token_does_not_know_its_neighbours(form):
    """Picked in any order, alone or with others, it is the same to the bit of its code."""
    x = cloud(0, 1, 2, 40, 64)
    order = cloud(1, 40).argsort()
    whole, mixed = stored(form, x).parts, stored(form, x[:, :, order]).parts
    same = (whole["codes"][:, :, order] == mixed["codes"]).float().mean()
    assert same > 0.999  # products of other shapes may round another way
    torch.testing.assert_close(
        form.decode(stored(form, x))[:, :, order], form.decode(stored(form, x[:, :, order])), atol=1e-2, rtol=1e-2
    )


# ------------------------------------------------------------------------------------------- storing, bytes, refusals
@forms
def test_what_comes_in_pieces_is_what_comes_at_once(form):
    k, v = cloud(0, 2, 2, 512, 32), cloud(1, 2, 2, 512, 32)
    stores = []
    for cuts in ((0, 512), (0, 256, 512), (0, 1, 100, 511, 512)):
        store = Store((form, form), 2, 2, torch.device("cpu"))
        for lo, hi in itertools.pairwise(cuts):
            store.append(np.array([0, 1]), k[:, :, lo:hi], v[:, :, lo:hi], torch.arange(lo, hi).expand(2, 2, -1))
        stores.append([form.decode(store.piece(side, 0, 512, lambda slots: slots)) for side in "kv"])
    step = (stores[0][0][..., :1] - stores[0][0]).abs().amax(-1, keepdim=True)
    for other in stores[1:]:
        for a, b in zip(stores[0], other, strict=True):
            assert ((a - b).abs() > 1e-3 * step).float().mean() < 1e-3  # a border of codes, another rounding


@pytest.mark.parametrize(
    ("form", "wanted"),
    [(LloydMax(4), 64 + 2), (LloydMax(3), 48 + 2), (LloydMax(2), 32 + 2)]
    + [(Uniform(bits, rotated=True), 128 * bits / 8 + 4) for bits in (2, 3, 4, 8)],
    ids=str,
)
def test_bytes_per_token_of_a_head_of_128(form, wanted):
    assert form.bytes_per_token(128) == wanted
    x = cloud(0, 1, 2, 40, 128).bfloat16()
    assert sum(part.nbytes for part in stored(form, x).parts.values()) == 80 * wanted


def test_a_models_bytes_are_the_formulas():
    model, (ids, _) = tiny_model(), prompts(1, 96, 0)
    for recipe, of_token in (
        ("rotated(bits=3, recent=16)", 6 + 4),
        ("rotated(bits=2, levels='lloyd_max', recent=16)", 4 + 2),
    ):
        cache = kvlib.Cache(model, recipe)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        body = census.kept(group := cache.managed[0].store.groups[0])[0, 0] - group.tail.lengths[0] - 4
        assert body == group.body.counts[0] >= 64
        assert cache.nbytes(by="part", used=True)["body"] == 3 * 2 * 2 * body * of_token


def test_what_cannot_be_is_refused():
    for wrong, words in (
        ("rotated(bits=5)", "2, 3, 4, 8"),
        ("rotated(bits=8, levels='lloyd_max')", "2, 3, 4"),
        ("rotated(k_bits=True)", "k_bits"),
        ("rotated(levels='normal')", "uniform or lloyd_max"),
        ("rotated(v_bits=6)", "v_bits"),
    ):
        with pytest.raises(RecipeError, match=words):
            kvlib.Recipe.parse(wrong)
    for codec, d in (
        (Rotated(bits=3), 20),
        (Rotated(bits=4), 15),
        (Rotated(bits=8), 15),
        (Rotated(levels="lloyd_max"), 15),
    ):
        with pytest.raises(RecipeError, match="rotated"):
            codec.fit(1, 1, d)
    Rotated(bits=4).fit(1, 1, 80)
