"""QuantSpec's planes: one 8-bit code of which a draft reads the upper half."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import census
from kvlib.group import HeadGroup
from kvlib.kernels.quantise import unpack
from kvlib.policies import RecipeError
from kvlib.policies.codec.hierarchical import Hierarchical, Planes
from kvlib.policies.encoding import Stored, Tokens
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.testing import prompts, tiny_model

HEADS, GROUP, D = 2, 4, 16
SPEC = Spec(D**-0.5)
RECIPE = "hierarchical(group=8, recent=16) + block=8"


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(form, x):
    """Tokens x [B, H, m, d] as the form keeps them."""
    slots = torch.arange(x.shape[2])
    parts = form.encode(Tokens(x, slots.expand(x.shape[:3]), None, {}, torch.zeros(len(x), dtype=torch.long)))
    return Stored(x.shape[1], parts, {}, slots, lambda span: slots, lambda: slots, None)


def read(form, kept):
    """As drafts read it and as it is."""
    return form.draft().decode(kept), form.decode(kept)


def steps_of(form, kept, x):
    """Scale and least value of every element of x."""
    found = kept.parts["range"].float()
    scale, least = found.select(3, 0), found.select(3, 1)
    if form.per_channel:
        return scale.repeat_interleave(form.group, 2), least.repeat_interleave(form.group, 2)
    span = min(form.group or x.shape[3], x.shape[3])
    return scale.repeat_interleave(span, 3), least.repeat_interleave(span, 3)


# ----------------------------------------------------------------------------------------------------------- the code
def test_known_answer():
    """16 levels at equal distances: 8-bit codes 17 i, so both planes hold i; the upper one stands for 16 i + 7.5."""
    x = torch.arange(0, 241, 16).float().view(1, 1, 16, 1).expand(-1, -1, -1, 2)
    form = Planes(8, 16, per_channel=True)
    kept = stored(form, x)
    for plane in ("upper", "lower"):
        assert unpack(kept.parts[plane], 4)[0, 0, :, 0].tolist() == list(range(16))
    scale = kept.parts["range"][0, 0, 0, 0, 0].item()
    assert scale == pytest.approx(240 / 255, rel=2**-11)
    assert kept.parts["range"][0, 0, 0, 1, 0] == 0
    x4, x8 = read(form, kept)
    i = torch.arange(16.0)
    torch.testing.assert_close(x8[0, 0, :, 0], 17 * i * scale, atol=1e-4, rtol=0)
    torch.testing.assert_close(x8[0, 0, :, 0], 16 * i, atol=0.13, rtol=0)
    torch.testing.assert_close(x4[0, 0, :, 0], (16 * i + 7.5) * scale, atol=1e-4, rtol=0)


def test_every_code_comes_back_from_its_planes():
    x = torch.arange(256.0).view(1, 1, 256, 1).expand(-1, -1, -1, 2)
    form = Planes(8, 256, per_channel=True)
    kept = stored(form, x)
    upper, lower = (unpack(kept.parts[plane], 4)[0, 0, :, 0].int() for plane in ("upper", "lower"))
    assert (16 * upper + lower).tolist() == list(range(256))
    x4, x8 = read(form, kept)
    assert torch.equal(x8, x)
    assert torch.equal(x4[0, 0, :, 0], 16.0 * upper + 7.5)


@given(
    st.integers(0, 1000),
    st.sampled_from([(8, True), (16, True), (8, False), (16, False), (128, False)]),
    st.sampled_from([1e-2, 1.0, 100.0]),
    st.sampled_from([0.0, 3.0]),
)
def test_errors_are_half_a_step_of_eight_bits_and_eight_steps_of_the_upper_plane(seed, kind, size, offset):
    form = Planes(8, kind[0], per_channel=kind[1])
    x = cloud(seed, 1, 2, 32, 16) * size + offset
    kept = stored(form, x)
    scale, least = steps_of(form, kept, x)
    x4, x8 = read(form, kept)
    # What fp16 loses: of the least value and the scale at most their last bit, where the codes meet their ends.
    rounding = 2.0**-10 * (least.abs() + 255 * scale) + 2.0**-23
    assert ((x - x8).abs() <= scale / 2 + rounding).all()
    assert ((x - x4).abs() <= 8 * scale + rounding).all()
    assert (x - x8).square().mean() <= (x - x4).square().mean()


@pytest.mark.parametrize("form", [Planes(8, 128, per_channel=True), Planes(8, 128)], ids=str)
def test_the_upper_plane_alone_is_as_good_as_four_bits(form):
    """In the middle of what it can mean: 0.289 of a step of four bits, without bias; both planes are 16 times finer."""
    x = cloud(0, 1, 2, 512, 128)
    kept = stored(form, x)
    scale, _ = steps_of(form, kept, x)
    coarse, fine = ((y - x) / scale for y in read(form, kept))
    assert coarse.square().mean().sqrt() / 16 == pytest.approx(12**-0.5, rel=0.03)
    assert fine.square().mean().sqrt() == pytest.approx(12**-0.5, rel=0.05)
    assert abs(coarse.mean()) < 0.2


def test_a_constant_group_has_one_value():
    x = torch.full((1, 1, 8, 4), 3.0)
    for form in (Planes(8, 8, per_channel=True), Planes(8, 4)):
        for y in read(form, stored(form, x)):
            assert torch.equal(y, x)


def test_the_two_readings_share_what_is_stored():
    form, x = Planes(8, 8, per_channel=True), cloud(0, 1, 2, 32, 16)
    both, one = stored(form, x), stored(form.draft(), x)
    assert set(both.parts) == {"upper", "lower", "range"}
    assert set(one.parts) == {"upper", "range"}
    for name, part in one.parts.items():
        assert torch.equal(part, both.parts[name])
    assert torch.equal(form.draft().decode(both), form.draft().decode(one))
    before = both.parts["range"].clone()
    form.draft().decode(both)
    assert torch.equal(both.parts["range"], before)
    assert form.draft().draft() == form.draft()
    assert Hierarchical(group=8).draft() == Hierarchical(group=8, planes=1)


# -------------------------------------------------------------------------------------------------------------- bytes
def test_bytes_of_a_head_of_128_in_groups_of_128():
    """The card's 2 D + 8 per token, keys and values; a draft reads D + 8 of it."""
    codec = Hierarchical()
    assert sum(form.bytes_per_token(128) for form in codec.forms()) == 2 * 128 + 8
    assert sum(form.bytes_per_token(128) for form in codec.draft().forms()) == 128 + 8
    x = cloud(0, 1, 2, 256, 128).bfloat16()
    for each, wanted in ((codec, 2 * 128 + 8), (codec.draft(), 128 + 8)):
        kept = [stored(form, x) for form in each.forms()]
        assert sum(part.nbytes for one in kept for part in one.parts.values()) == 2 * 256 * wanted


@pytest.mark.parametrize(("recipe", "wanted"), [("hierarchical", 264), ("hierarchical(planes=1)", 136)])
@torch.no_grad()
def test_bytes_of_a_cache(recipe, wanted):
    model = tiny_model(head_dim=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1).bfloat16()
    ids, cache = prompts(1, 600, 0)[0], kvlib.Cache(model, recipe)
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    body = (600 - 4 - 128) // 128 * 128
    assert cache.nbytes(by="part", used=True)["body"] == body * wanted
    assert cache.kept().item() == 601


# --------------------------------------------------------------------------------------------------- tiers and drafts
def group_of(recipe):
    recipe = Recipe.parse(recipe)
    return HeadGroup(None, recipe.sizes, None, None, recipe.select, np.arange(HEADS), recipe.tier, recipe.codec)


def tokens(n, seed=0, batch=1):
    return tuple(cloud(seed + i, batch, h, n, D) for i, h in enumerate((HEADS * GROUP, HEADS, HEADS)))


@torch.no_grad()
def feed(group, q, k, v):
    return group.forward(q, k, v, None, SPEC, recording=False)


@torch.no_grad()
def peek(group, q, cheap=False):
    """What a query would read, nothing being taken in."""
    group.cheap = cheap
    out = group.attend(q, SPEC, None, prompt=False, lse=False)[0].out
    group.cheap = False
    return out


def test_only_the_lower_plane_moves_and_a_draft_moves_nothing():
    here, there = group_of(RECIPE), group_of(RECIPE + " @ host")
    for group in (here, there):
        feed(group, *tokens(200))
        feed(group, *tokens(1, 5))
    body = int(there.body.counts[0])
    assert body == (200 - 4 - 16) // 8 * 8
    assert there.body.store.host == {"k.lower", "v.lower"}
    lower = body * HEADS * 2 * D // 2
    assert census.nbytes(there, True, set())["host", "body"] == lower
    assert census.nbytes(here, True, set())["device", "body"] == census.nbytes(there, True, set())["device", "body"] + lower
    q = tokens(1, 8)[0]
    before = census.traffic(there)
    assert before.moved == lower
    torch.testing.assert_close(peek(there, q), peek(here, q))
    assert census.traffic(there).moved == before.moved + lower
    torch.testing.assert_close(peek(there, q, cheap=True), peek(here, q, cheap=True))
    assert census.traffic(there).moved == before.moved + lower  # a draft brings nothing
    assert not torch.allclose(peek(here, q, cheap=True), peek(here, q), atol=1e-4)


def test_through_slots_too_a_draft_moves_nothing():
    recipe = "quest(budget=64, page=4) + hierarchical(group=8)"
    here, there = group_of(recipe), group_of(recipe + " @ host(slots=1)")
    for group in (here, there):
        feed(group, *tokens(400))
        feed(group, *tokens(1, 5))
    for i, cheap in enumerate((True, False, True, True, False)):
        q = tokens(1, 20 + 3 * i)[0]
        before = census.traffic(there)
        torch.testing.assert_close(peek(there, q, cheap), peek(here, q, cheap), atol=1e-5, rtol=1e-5)
        after = census.traffic(there)
        assert (after.moved == before.moved) == cheap
        assert after.moved - before.moved == (after.misses - before.misses) * 4 * 2 * D // 2


def test_a_draft_reads_as_a_cache_of_one_plane_does():
    both, one = group_of(RECIPE), group_of(RECIPE.replace("16)", "16, planes=1)"))
    for group in (both, one):
        feed(group, *tokens(300))
        group.finish_prefill()
    q = tokens(1, 8)[0]
    torch.testing.assert_close(peek(both, q, cheap=True), peek(one, q))
    assert set(one.body.store.own) == {"k.upper", "v.upper", "v.range"}
    assert set(one.body.store.rows[8].parts) == {"k.range"}


def test_what_is_read_is_near_what_it_was_and_drafts_less_so():
    group, dense = group_of(RECIPE), group_of("full")
    for each in (group, dense):
        feed(each, *tokens(300))
        each.finish_prefill()
    q = 3 * tokens(1, 8)[0]
    exact = peek(dense, q)
    fine, rough = ((peek(group, q, cheap) - exact).norm() / exact.norm() for cheap in (False, True))
    assert fine < 0.01 < rough < 0.3
    assert fine < rough / 8


# ---------------------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_is_refused():
    for wrong, words in (
        ("hierarchical(planes=3)", "give 1 or 2"),
        ("hierarchical(planes=0)", "give 1 or 2"),
        ("hierarchical(planes=True)", "give 1 or 2"),
        ("hierarchical(group=1)", "group"),
        ("hierarchical(group=8) + block=12", "8 tokens together"),
        ("clusterkv(budget=64) + hierarchical(group=64)", "budget=128"),
    ):
        with pytest.raises(RecipeError, match=words):
            kvlib.Recipe.parse(wrong)
    with pytest.raises(RecipeError, match="divide the head size"):
        Hierarchical(group=48).fit(1, 1, 64)
    Hierarchical(group=256).fit(1, 1, 64)


def test_an_odd_head_size_is_refused():
    with pytest.raises(RecipeError, match="hierarchical"):
        Hierarchical().fit(1, 1, 15)
