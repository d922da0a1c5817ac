"""KIVI keeps keys by channel and values by token, encodes every token once, and nobody's neighbours matter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib import census
from kvlib.group import HeadGroup
from kvlib.kernels.attention import EVERYTHING, Visible, attention
from kvlib.policies import Kivi, RecipeError
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import FEW, attend
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.store import Store
from kvlib.testing import prompts, tiny_model

HEADS, D = 2, 8
SMALL = "kivi(group=8, recent=16) + sink=4 + block=8"  # seals whenever eight tokens are old enough


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slots(ids):
    """Positions of a store that was filled from the first token on."""
    return ids


def store_of(codec, k, v, cuts=(), rotary=None):
    """Keys and values [B, H, n, d] taken in at once, or in pieces that end at `cuts`."""
    store = Store(codec.forms(), *k.shape[:2], torch.device("cpu"), rotary=rotary)
    for lo, hi in zip((0, *cuts), (*cuts, k.shape[2]), strict=True):
        position = torch.arange(lo, hi).expand(*k.shape[:2], -1)
        store.append(np.arange(len(k)), k[:, :, lo:hi], v[:, :, lo:hi], position)
    return store


def pieces(store):
    """All of the keys and all of the values of rows equally long."""
    return [store.piece(side, 0, int(store.counts[0]), slots) for side in "kv"]


def decoded(store):
    """Keys and values as they are read, [B, H, n, d]."""
    found = zip(store.forms, pieces(store), strict=True)
    return [form.epilogue(form.decode(stored), stored) for form, stored in found]


def held(store, row=0):
    """What a store keeps of a row, by part."""
    parts = {}
    for rows in store.rows.values():
        parts |= {name: x[row, :, : int(rows.counts[row])].clone() for name, x in rows.parts.items()}
    return parts


def same(a, b):
    """Whether two rows are kept to the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def group_of(recipe, heads=HEADS):
    recipe = Recipe.parse(recipe)
    at = np.arange(heads)
    return HeadGroup(recipe.evictor, recipe.sizes, selector=recipe.select, heads=at, tier=recipe.tier, codec=recipe.codec)


def feed(group, k, v, new=None, recording=False):
    """Take in a chunk whose queries are its keys, two to a KV head."""
    spec = Spec(k.shape[3] ** -0.5)
    return group.forward(k.repeat_interleave(2, 1), k, v, None if new is None else np.array(new), spec, recording)


def prompt_and_steps(recipe, k, v, prompt):
    """A group that took in a prompt, and the other tokens one by one."""
    group = group_of(recipe, k.shape[1])
    feed(group, k[:, :, :prompt], v[:, :, :prompt])
    group.finish_prefill()
    for t in range(prompt, k.shape[2]):
        feed(group, k[:, :, t : t + 1], v[:, :, t : t + 1])
    return group


def split_of(group, row=0):
    """Tokens of a row among the sinks, in the body and in the tail."""
    sinks = 0 if group.sink is None else int(group.sink.counts[row, 0])
    return sinks, 0 if group.body is None else int(group.body.counts[row]), int(group.tail.lengths[row])


# ---------------------------------------------------------------------------------------- an independent quantiser
def unpacked(packed, bits):
    """Codes [..., d] of bytes as `kernels.quantise` lays them out, in numpy."""
    packed = np.asarray(packed)
    return np.concatenate([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)


def check_quantised(x, codes, scale, least, found, bits, axis):
    """Groups of x along `axis`, in float64: their ranges to an ulp of fp16, the codes that these ranges make, and what they
    stand for."""
    x, scale, least = (np.asarray(each, dtype=np.float64) for each in (x, scale, least))
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    levels = 2**bits - 1
    np.testing.assert_allclose(least, low, rtol=2**-11, atol=2**-24)
    np.testing.assert_allclose(scale, (high - low) / levels, rtol=2**-10, atol=2**-24)
    steps = (x - least) / np.where(scale > 0, scale, np.inf)
    wanted, near_a_half = np.clip(np.rint(steps), 0, levels), np.abs(steps % 1 - 0.5) < 1e-3
    assert near_a_half.mean() < 0.05
    assert np.array_equal(codes[~near_a_half], wanted[~near_a_half])
    assert np.abs(codes - wanted).max() <= 1
    assert codes.max() <= levels
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), codes * scale + least, rtol=1e-6, atol=1e-6)


def check_values(x, store, bits, group):
    """Values x [B, H, n, d] in groups of `group` channels of one token."""
    parts, (_, found) = pieces(store)[1].parts, decoded(store)
    fold = (*x.shape[:3], -1, group)
    codes = unpacked(parts["codes"], bits).reshape(fold)
    scale, least = parts["range"][:, :, :, 0, :, None], parts["range"][:, :, :, 1, :, None]
    check_quantised(x.reshape(fold), codes, scale, least, found.reshape(fold), bits, 4)


def check_keys(x, store, bits, group):
    """Keys x [B, H, n, d] in groups of `group` tokens of one channel."""
    parts, (found, _) = pieces(store)[0].parts, decoded(store)
    fold = (*x.shape[:2], -1, group, x.shape[3])
    codes = unpacked(parts["codes"], bits).reshape(fold)
    scale, least = parts["range"][:, :, :, 0:1], parts["range"][:, :, :, 1:2]
    check_quantised(x.reshape(fold), codes, scale, least, found.reshape(fold), bits, 3)


@pytest.mark.parametrize(("group", "n", "d"), [(4, 12, 8), (8, 40, 16), (16, 16, 64), (32, 96, 128)])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(2, 2), (4, 2), (2, 8), (8, 4)])
def test_keys_and_values_against_an_independent_quantiser(group, n, d, k_bits, v_bits):
    k, v = 3 * cloud(0, 2, 3, n, d) + 1, cloud(1, 2, 3, n, d) - 2
    store = store_of(Kivi(group=group, k_bits=k_bits, v_bits=v_bits), k, v)
    check_keys(k, store, k_bits, group)
    check_values(v, store, v_bits, min(group, d))


def test_without_groups_all_that_comes_together_and_a_whole_head_share_a_range():
    k, v = cloud(0, 2, 3, 24, 16), cloud(1, 2, 3, 24, 16)
    check_keys(k, store_of(Kivi(group=0, bits=4), k, v), 4, 24)
    check_values(v, store_of(Kivi(group=0, bits=4), k, v), 4, 16)
    parted = store_of(Kivi(group=0, bits=4), k, v, cuts=(5, 21))
    assert held(parted)["k.range"].shape == (3, 3, 2, 16)
    for lo, hi in ((0, 5), (5, 21), (21, 24)):
        one = store_of(Kivi(group=0, bits=4), k[:, :, lo:hi], v[:, :, lo:hi])
        assert torch.equal(decoded(parted)[0][:, :, lo:hi], decoded(one)[0])


def test_known_answer():
    """The channel 0, 1, 2, 3 has the step 1 and the codes 0, 1, 2, 3; as a vector it is the byte 228."""
    ramp = torch.arange(4.0)
    k, v = ramp.view(1, 1, 4, 1).expand(1, 1, 4, 4), ramp.expand(1, 1, 4, 4)
    parts = held(store_of(Kivi(group=4), k, v))
    assert parts["k.range"].tolist() == [[[[1] * 4, [0] * 4]]]
    assert parts["k.codes"].flatten().tolist() == [0, 0b01010101, 0b10101010, 0b11111111]
    assert parts["v.range"].tolist() == [[[[1.0], [0.0]]] * 4]
    assert parts["v.codes"].flatten().tolist() == [228] * 4
    assert all(torch.equal(x, y) for x, y in zip(decoded(store_of(Kivi(group=4), k, v)), (k, v), strict=True))


def test_what_stands_out_harms_only_its_own_channel_of_keys_and_its_own_token_of_values():
    k, v = cloud(0, 1, 1, 32, 16), cloud(1, 1, 1, 32, 16)
    plain = decoded(store_of(Kivi(), k, v))
    k[..., 5] *= 50
    v[:, :, 7] *= 50
    loud = decoded(store_of(Kivi(), k, v))
    quiet = torch.arange(16) != 5
    assert torch.equal(loud[0][..., quiet], plain[0][..., quiet])
    assert not torch.equal(loud[0][..., 5], plain[0][..., 5])
    others = torch.arange(32) != 7
    assert torch.equal(loud[1][:, :, others], plain[1][:, :, others])
    assert not torch.equal(loud[1][:, :, 7], plain[1][:, :, 7])


@given(st.sampled_from([2, 4, 8]), st.floats(-3, 3), st.floats(-100, 100), st.integers(0, 10**6))
def test_nothing_is_off_by_more_than_half_a_step_and_what_fp16_rounds(bits, magnitude, offset, seed):
    k = cloud(seed, 1, 2, 16, 8) * 10**magnitude + offset
    k[:, 1, :, 3] = offset  # constant: a range of zero
    k[:, :, 8:] = k[:, :, 8:].abs()
    store = store_of(Kivi(bits=bits, group=8), k, k)
    for side, x, found in zip("kv", (k, k), decoded(store), strict=True):
        scale, least = held(store)[f"{side}.range"].double().unbind(2)
        axis = (2, 8, D) if side == "k" else (16, 1, D)
        error = (found - x)[0].double().abs().view(2, *axis)
        step, low = (y.unsqueeze(2) if side == "k" else y.view(2, 16, 1, 1) for y in (scale, least))
        assert (error <= step / 2 + (2**bits - 1) * step * 2**-11 + low.abs() * 2**-11 + bits * 1e-6).all()
    assert torch.equal(decoded(store)[0][:, 1, :, 3], k[:, 1, :, 3].half().float())


# ------------------------------------------------------------------------------------------------------------- reading
CODECS = ["kivi(group=8)", "kivi(group=8, bits=4)", "kivi(group=4, k_bits=8)", "kivi(group=0)"]


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("lists", [1, 2, 6])
def test_a_token_picked_alone_is_the_same_token(text, lists):
    """Lists that all heads share, one per KV head, one per query head."""
    k, v = cloud(0, 2, HEADS, 48, D), cloud(1, 2, HEADS, 48, D)
    store = store_of(Recipe.parse(text).codec, k, v, cuts=(16, 40))
    ids = torch.randint(0, 48, (2, lists, 11), generator=torch.Generator().manual_seed(2))
    wide = max(lists, HEADS)
    for side, form, whole in zip("kv", store.forms, decoded(store), strict=True):
        stored = store.take(side, ids, slots)
        assert stored.heads == wide
        found, index = form.decode(stored), ids.expand(-1, wide, -1).unsqueeze(-1).expand(-1, -1, -1, D)
        assert torch.equal(found, whole.repeat_interleave(wide // HEADS, 1).gather(2, index))


@pytest.mark.parametrize("text", CODECS)
def test_a_piece_is_cut_out_of_the_whole(text):
    store = store_of(Recipe.parse(text).codec, *cloud(0, 2, 2, HEADS, 48, D), cuts=(16, 40))
    for side, form, whole in zip("kv", store.forms, decoded(store), strict=True):
        assert torch.equal(form.decode(store.piece(side, 16, 40, slots)), whole[:, :, 16:40])


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("n", [1, 3, FEW, FEW + 1])
def test_reading_codes_is_attention_over_what_they_stand_for(text, n):
    codec = Recipe.parse(text).codec
    store = store_of(codec, *cloud(0, 2, 2, HEADS, 48, D))
    q, stored, (k, v) = cloud(2, 2, 6, n, D), pieces(store), decoded(store)
    key, value = store.forms
    dense = torch.einsum("bhgnd,bhmd->bhgnm", q.unflatten(1, (HEADS, 3)), k).flatten(1, 2)
    torch.testing.assert_close(key.scores(key.prologue(q, stored[0]), stored[0]), dense, atol=1e-5, rtol=1e-5)
    p = dense.softmax(-1)
    wanted = torch.einsum("bhgnm,bhmd->bhgnd", p.unflatten(1, (HEADS, 3)), v).flatten(1, 2)
    torch.testing.assert_close(value.epilogue(value.weighted_sum(p, stored[1]), stored[1]), wanted, atol=1e-5, rtol=1e-5)
    for visible in (EVERYTHING, Visible(length=torch.tensor([48, 13]))):
        for softcap in (None, 2.0):
            found = attend(store.forms, q, tuple(stored), 0.3, visible, softcap)
            dense = attention(q, k, v, 0.3, visible, softcap)
            torch.testing.assert_close(found.out, dense.out, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.lse, dense.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("text", "per_token"),  # bytes per token and KV head, from the card: 2 D (b/8 + 4/g), groups no larger than a head
    [
        ("kivi(recent=8)", lambda d: 2 * d * (2 / 8 + 4 / 32)),
        ("kivi(recent=8, group=16, bits=4)", lambda d: 2 * d * (4 / 8 + 4 / 16)),
        ("kivi(recent=8, group=32, k_bits=4, v_bits=8)", lambda d: d * (4 / 8 + 4 / 32) + d * (1 + 4 / 32)),
        ("kivi(recent=8, group=128)", lambda d: d * (2 / 8 + 4 / 128) + d * 2 / 8 + 4),
    ],
)
def test_the_body_takes_the_bytes_of_the_cards_formula(d, text, per_token):
    model, (ids, mask) = tiny_model(num_hidden_layers=2, head_dim=d), prompts(2, 160, 33)
    cache = kvlib.Cache(model, text)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.finish_prefill()
    block = max(64, cache.recipe.codec.grain)
    tokens = sum((n - 4 - 8) // block * block for n in (160, 127))
    assert tokens == sum(cache.managed[0].store.groups[0].body.counts)
    assert cache.nbytes(by="part", used=True)["body"] == 2 * 2 * tokens * per_token(d)
    assert sum(form.bytes_per_token(d) for form in cache.recipe.codec.forms()) == per_token(d)


# -------------------------------------------------------------------------------------------------- taking in: streams
@settings(max_examples=25)
@given(
    st.integers(1, 70),
    st.integers(0, 40),
    st.sampled_from([SMALL, SMALL + " @ host", "kivi(group=4, recent=0) + sink=0 + block=4"]),
)
def test_a_stream_of_tokens_has_the_codes_of_one_prompt(prompt, steps, recipe):
    """No token is encoded twice, and each is in exactly one place."""
    k, v = cloud(0, 1, HEADS, prompt + steps, D), cloud(1, 1, HEADS, prompt + steps, D)
    seen, encode = [], Uniform.encode

    def noted(self, tokens):
        seen.append((self.per_channel, tokens.positions.clone()))
        return encode(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Uniform, "encode", noted)
        stream = prompt_and_steps(recipe, k, v, prompt)
    sinks, body, tail = split_of(stream)
    assert sinks + body + tail == prompt + steps
    assert body % stream.grain == 0
    assert tail < stream.grain + Recipe.parse(recipe).codec.recent + (0 if sinks else 4)
    for keys in (True, False):
        once = [position for per_channel, position in seen if per_channel == keys]
        assert all((position == position[:, :1]).all() for position in once)
        assert [t for position in once for t in position[0, 0].tolist()] == list(range(sinks, sinks + body))
    at_once = prompt_and_steps(recipe, k, v, prompt + steps)
    assert split_of(at_once) == (sinks, body, tail)
    if body:
        assert same(held(stream.body.store), held(at_once.body.store))
        assert same(held(stream.body.store), held(store_of(stream.codec, *(x[:, :, sinks : sinks + body] for x in (k, v)))))
    for part in census.positions(stream)[0]:
        assert torch.equal(part, torch.arange(prompt + steps, dtype=torch.int32))
    assert torch.equal(stream.tail.k[:, :, stream.tail.begin : stream.tail.end], k[:, :, sinks + body :])


def test_prompts_in_chunks_have_the_codes_of_whole_ones():
    k, v = cloud(0, 2, 1, HEADS, 100, D)
    whole, chunked = prompt_and_steps(SMALL, k, v, 100), group_of(SMALL)
    for lo in range(0, 100, 23):
        feed(chunked, k[:, :, lo : lo + 23], v[:, :, lo : lo + 23])
    chunked.finish_prefill()
    assert same(held(whole.body.store), held(chunked.body.store))


def test_newest_tokens_are_dense_as_long_as_the_recipe_says():
    k, v = cloud(0, 2, 1, HEADS, 400, D)
    group = prompt_and_steps("kivi(group=32)", k, v, 300)
    assert split_of(group) == (4, (400 - 4 - 128) // 64 * 64, 140)
    assert group.tail.lengths[0] >= 128
    large = prompt_and_steps("kivi(group=96, recent=8)", k[:, :, :110], v[:, :, :110], 108)  # blocks are whole groups
    assert split_of(large) == (4, 96, 10)


@pytest.mark.parametrize("text", [SMALL, "kivi(group=0, recent=16) + sink=4 + block=8"])
@pytest.mark.parametrize("lengths", [(60, 60), (60, 43), (60, 9), (31, 60)])
def test_a_neighbour_changes_no_code(text, lengths):
    """Nor does the padding, which is not finite here, before the shorter row."""
    n = max(lengths)
    k, v = cloud(0, 2, 2, HEADS, n + 20, D)
    padded = [x[:, :, :n].clone() for x in (k, v)]
    for row, length in enumerate(lengths):
        for x, full in zip(padded, (k, v), strict=True):
            x[row, :, n - length :] = full[row, :, :length]
            x[row, :, : n - length] = 1e4
    both = group_of(text)
    feed(both, *padded, None if lengths == (n, n) else lengths)
    both.finish_prefill()
    for t in range(20):
        rows = [torch.stack([x[row, :, lengths[row] + t][:, None] for row in range(2)]) for x in (k, v)]
        feed(both, *rows)
    for row, length in enumerate(lengths):
        own = (x[row : row + 1, :, : length + 20] for x in (k, v))
        alone = prompt_and_steps(text, *own, length)
        assert split_of(both, row) == split_of(alone)
        if alone.body is not None:
            assert same(held(both.body.store, row), held(alone.body.store))


# ------------------------------------------------------------------------------------------------------------ rollback
@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(sum), max_size=8), st.sampled_from([40, 29]))
def test_drafts_that_are_taken_back_leave_no_trace_in_the_codes(drafts, prompt):
    """Also where a wrong token had been sealed with right ones."""
    total = prompt + sum(good for good, _ in drafts)
    k, v = cloud(0, 1, HEADS, total, D), cloud(1, 1, HEADS, total, D)
    plain, drafted = prompt_and_steps(SMALL, k, v, total), group_of(SMALL)
    feed(drafted, k[:, :, :prompt], v[:, :, :prompt])
    drafted.finish_prefill()
    at = prompt
    for good, wrong in drafts:
        bad = torch.full((1, HEADS, wrong, D), 77.0)
        feed(drafted, *(torch.cat([x[:, :, at : at + good], bad], 2) for x in (k, v)), recording=True)
        drafted.crop(wrong)
        at += good
    assert split_of(drafted) == split_of(plain)
    if plain.body is not None:
        assert same(held(drafted.body.store), held(plain.body.store))


def test_a_draft_across_the_border_of_a_block_is_undone():
    k, v = cloud(0, 2, 1, HEADS, 40, D)
    group = prompt_and_steps(SMALL, k[:, :, :32], v[:, :, :32], 30)
    before, kept = split_of(group), held(group.body.store)
    bad = torch.full((1, HEADS, 20, D), 77.0)
    feed(group, bad, bad, recording=True)
    assert split_of(group)[1] > before[1]
    group.crop(20)
    assert split_of(group) == before
    assert same(held(group.body.store), kept)
    for t in range(32, 40):
        feed(group, k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert same(held(group.body.store), held(prompt_and_steps(SMALL, k, v, 40).body.store))


# -------------------------------------------------------------------------------------------------------------- copies
@pytest.mark.parametrize("text", [SMALL, "kivi(group=0, recent=16) + sink=4 + block=8", SMALL + " @ host"])
def test_reordered_rows_go_on_as_their_own(text):
    k, v = cloud(0, 2, 2, HEADS, 60, D)
    group = prompt_and_steps(text, k, v, 40)
    group.reorder(torch.tensor([1, 0, 1]))
    more_k, more_v = cloud(1, 2, 3, HEADS, 30, D)
    for t in range(30):
        feed(group, more_k[:, :, t : t + 1], more_v[:, :, t : t + 1])
    for row, source in enumerate((1, 0, 1)):
        own = [torch.cat([x[source : source + 1], y[row : row + 1]], 2) for x, y in ((k, more_k), (v, more_v))]
        assert same(held(group.body.store, row), held(prompt_and_steps(text, *own, 40).body.store))


@pytest.mark.parametrize("text", [SMALL, "kivi(group=0, recent=16) + sink=4 + block=8"])
def test_a_copy_and_its_original_do_not_touch_each_other(text):
    k, v = cloud(0, 2, 1, HEADS, 60, D)
    group = prompt_and_steps(text, k[:, :, :40], v[:, :, :40], 40)
    twin, other = group.copy(None), torch.full((1, HEADS, 1, D), 5.0)
    for t in range(40, 60):
        feed(twin, other, other)
        feed(group, k[:, :, t : t + 1], v[:, :, t : t + 1])
    apart = [torch.cat([x[:, :, :40], other.expand(-1, -1, 20, -1)], 2) for x in (k, v)]
    assert same(held(group.body.store), held(prompt_and_steps(text, k, v, 40).body.store))
    assert same(held(twin.body.store), held(prompt_and_steps(text, *apart, 40).body.store))


def test_a_snapshot_reads_what_was_there():
    k, v = cloud(0, 2, 2, HEADS, 120, D)
    store = store_of(Kivi(group=0), k[:, :, :16], v[:, :, :16], cuts=(8,))
    then, before = store.snapshot(), decoded(store)
    for lo in range(16, 120, 8):
        part = slice(lo, lo + 8)
        store.append(np.arange(2), k[:, :, part], v[:, :, part], torch.arange(lo, lo + 8).expand(2, HEADS, -1))
    assert (then.counts == 16).all()
    assert (store.counts == 120).all()
    assert all(torch.equal(x, y) for x, y in zip(decoded(then), before, strict=True))
    assert all(torch.equal(x[:, :, :16], y) for x, y in zip(decoded(store), before, strict=True))
    assert then.used() != store.used()


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivi(bits=3)", ["kivi(bits=3)", "2, 4, 8"]),
        ("kivi(bits=0)", ["bits=0"]),
        ("kivi(bits=True)", ["bits=True"]),
        ("kivi(bits=two)", ["bits=two"]),
        ("kivi(bits=2.0)", ["bits=2.0", "2, 4, 8"]),
        ("kivi(k_bits=1)", ["k_bits=1", "2, 4, 8"]),
        ("kivi(v_bits=False)", ["v_bits=False"]),
        ("kivi(v_bits=16)", ["v_bits=16"]),
        ("kivi(group=1)", ["group=1", "2 or more"]),
        ("kivi(group=-4)", ["group=-4"]),
        ("kivi(group=1.5)", ["group=1.5", "whole number"]),
        ("kivi(recent=-1)", ["recent=-1"]),
        ("kivi(recent=True)", ["recent=True"]),
        ("kivi + kv4", ["kivi and kv4", "codecs", "takes one"]),
        ("h2o + kivi", ["kivi", "32 tokens at a time", "online h2o", "h2o_prefill"]),
        ("h2o + kivi(group=0)", ["online h2o", "h2o_prefill"]),
        ("streaming_llm + kivi", ["online streaming_llm", "32 tokens"]),
        ("snapkv(adaptive=True) + kivi", ["snapkv(adaptive=True)", "leave it out"]),
        ("h2o_prefill(adaptive=True) + kivi", ["h2o_prefill(adaptive=True)"]),
        ("sentencekv(r=inf) + kivi", ["32 tokens together", "units end anywhere", "kv4"]),
        ("quest(budget=60) + kivi", ["quest(budget=60)", "seals 32 tokens", "budget=64"]),
        ("quest(budget=90, page=12) + kivi", ["seals 96", "budget=192"]),
        ("tokenselect(budget=63) + kivi", ["budget=64"]),
        ("kivi + block=40", ["block=40", "32 tokens together", "multiple"]),
        ("quest(budget=500) + kivi + block=40", ["block=40"]),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(text, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "h2o_prefill(budget=64) + kivi",
        "snapkv(budget=64) + kivi",
        "sentencekv(r=inf) + kivi(group=0)",
        "clusterkv(budget=64) + kivi",
        "quest(budget=64) + kivi",
        "quest(budget=192, page=12) + kivi",
        "tokenselect(budget=64) + kivi",
        "kivi + block=64",
        "kivi + sink=0 + recent=0",
        "duo_attention + kivi @ host",
        "h2o(budget=1.0)",
    ],
)
def test_what_works_is_accepted_and_reads_back(text):
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "d", "words"),
    [
        ("kivi(group=2)", 6, ["bits=2", "head size 6", "multiple of 4", "bits=8"]),
        ("kivi(bits=4, group=7)", 7, ["bits=4", "multiple of 2"]),
        ("kivi(bits=8, v_bits=4, group=7)", 7, ["bits=4"]),
        ("kivi(group=32)", 48, ["kivi(group=32)", "divide the head size 48"]),
        ("kivi(group=12)", 32, ["group=12"]),
    ],
)
def test_head_sizes_that_cannot_be_kept_are_refused(text, d, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text).codec.fit(2, 2, d)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("text", "d"), [("kivi", 16), ("kivi", 64), ("kivi(group=16)", 48), ("kivi(bits=8, group=7)", 7)])
def test_head_sizes_that_can_be_kept_are_not(text, d):
    """A group larger than the head is the head."""
    codec = Recipe.parse(text).codec
    codec.fit(2, 2, d)
    k, v = cloud(0, 2, 1, 1, codec.grain, d)
    for found, x in zip(decoded(store_of(codec, k, v)), (k, v), strict=True):
        assert (found - x).abs().max() < 1.1
