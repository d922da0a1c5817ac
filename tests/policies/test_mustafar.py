"""Mustafar keeps the largest entries of every token, as many of each, and a bitmap of where they stand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import census
from kvlib.kernels.quantise import unpack
from kvlib.policies import RecipeError
from kvlib.policies.codec.mustafar import Mustafar, Pruned
from kvlib.policies.encoding import DENSE, Stored, Tokens, attend
from kvlib.store import Store
from kvlib.testing import prompts, tiny_model
from tests.reference import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(form, x):
    """Tokens x [B, H, m, d] as the form keeps them."""
    slots = torch.arange(x.shape[2])
    parts = form.encode(Tokens(x, slots.expand(x.shape[:3]), None, {}, torch.zeros(len(x), dtype=torch.long)))
    return Stored(x.shape[1], parts, {}, slots, lambda span: slots, lambda: slots, None)


def restored(form, x):
    return form.decode(stored(form, x))


def largest(x, k):
    """Of each vector its k entries of largest magnitude, ties to the lower channel, written out."""
    y = torch.zeros_like(x)
    for at in np.ndindex(*x.shape[:-1]):
        channels = sorted(range(x.shape[-1]), key=lambda c: (-abs(float(x[at][c])), c))[:k]
        y[at][channels] = x[at][channels]
    return y


# ------------------------------------------------------------------------------------------------------- what is kept
@given(
    st.integers(0, 1000),
    st.sampled_from([8, 16, 40, 128]),
    st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.95]),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_the_largest_magnitudes_stay_and_ties_go_to_the_lower_channel(seed, d, sparsity, dtype, coarse):
    x = cloud(seed, 1, 2, 5, d)
    x = (x.mul(2).round() if coarse else x).to(dtype)  # of few values: many ties
    form = Pruned(sparsity)
    k = d - int(sparsity * d)
    assert form.k(d) == k
    y = restored(form, x)
    assert y.dtype == dtype
    assert torch.equal(y, largest(x, k))
    bitmap = unpack(stored(form, x).parts["bitmap"], 1)
    assert (bitmap.sum(-1) == k).all()
    assert set(bitmap.unique().tolist()) <= {0, 1}


def test_known_answer_with_its_bitmap():
    x = torch.tensor([4.0, -3, 2, -1, 0, 0, 0, 0]).view(1, 1, 1, 8)
    parts = stored(Pruned(0.75), x).parts
    assert parts["bitmap"].tolist() == [[[[0b00000011]]]]
    assert parts["kept"].tolist() == [[[[4.0, -3.0]]]]
    assert restored(Pruned(0.75), x).flatten().tolist() == [4, -3, 0, 0, 0, 0, 0, 0]
    x = torch.tensor([1.0, -1, 5, 1, -6, 1, 1, -1]).view(1, 1, 1, 8)
    parts = stored(Pruned(0.5), x).parts
    assert parts["bitmap"].tolist() == [[[[0b00010111]]]]
    assert parts["kept"].tolist() == [[[[1.0, -1.0, 5.0, -6.0]]]]


def test_how_many_stay():
    assert [Pruned(s).k(128) for s in (0.0, 0.5, 0.7, 0.95)] == [128, 64, 128 - 89, 128 - 121]
    assert [Pruned(s).k(16) for s in (0.0, 0.05, 0.7, 0.95)] == [16, 16, 5, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_sparsity_it_is_lossless_to_the_bit(dtype):
    """Also what is no number, and zeros with a sign."""
    x = cloud(0, 2, 2, 30, 16).to(dtype)
    x[0, 0, 0, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, torch.finfo(dtype).tiny])
    y = restored(Pruned(0.0), x)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(x.view(words), y.view(words))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_entry_stays_where_it_is(dtype):
    """It is kept, as the largest; neither its own dropped channels nor its neighbours know of it."""
    x = cloud(0, 2, 2, 6, 16).to(dtype)
    x[0, 0, 2, 15], x[0, 1, 5, 3], x[1, 0, 0, 0] = float("inf"), -float("inf"), float("inf")
    y = restored(Pruned(0.7), x)
    assert torch.equal(y, largest(x, 5))
    assert y.isinf().sum() == 3


def test_a_vector_of_zeros_stays_one():
    x = cloud(0, 1, 1, 3, 16)
    x[0, 0, 1] = 0
    y = restored(Pruned(0.7), x)
    assert (y[0, 0, 1] == 0).all()
    assert (y[0, 0, 0] != 0).sum() == 5


@given(st.integers(0, 1000), st.integers(1, 16))
def test_no_other_choice_of_as_many_entries_keeps_more(seed, tenths):
    d = 16
    x, fewer = cloud(seed, 1, 1, 6, d), Pruned(min(0.95, tenths / d))
    y = restored(fewer, x)
    assert (y.square().sum(-1) >= fewer.k(d) / d * x.square().sum(-1) - 1e-6).all()
    more = restored(Pruned((tenths - 1) / d), x)
    assert ((x - more).norm(dim=-1) <= (x - y).norm(dim=-1)).all()


# ------------------------------------------------------------------------------------------------------ how it is read
@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("forms", [(Pruned(0.7), Pruned(0.5)), (DENSE, Pruned(0.7)), (Pruned(0.5), DENSE)], ids=str)
def test_attention_is_that_over_the_pruned_vectors(forms, n):
    q, k, v = cloud(0, 2, 6, n, 16), cloud(1, 2, 2, 50, 16), cloud(2, 2, 2, 50, 16)
    part = attend(forms, q, tuple(stored(form, x) for form, x in zip(forms, (k, v), strict=True)), 0.25)
    near = [restored(form, x) for form, x in zip(forms, (k, v), strict=True)]
    out, lse, _ = reference(q, *near, 0.25)
    torch.testing.assert_close(part.out.double(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lse.double(), lse, atol=1e-5, rtol=1e-5)


def store_of(form, k, v, cuts):
    store = Store((form, form), len(k), k.shape[1], torch.device("cpu"))
    rows = np.arange(len(k))
    for lo, hi in itertools.pairwise(cuts):
        store.append(rows, k[:, :, lo:hi], v[:, :, lo:hi], torch.arange(lo, hi).expand(*k.shape[:2], -1))
    return store


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_in_pieces_is_what_comes_at_once(dtype):
    k, v = cloud(0, 2, 2, 512, 16).to(dtype), cloud(1, 2, 2, 512, 16).to(dtype)
    whole, halves, odd = (store_of(Pruned(0.7), k, v, cuts) for cuts in ((0, 512), (0, 256, 512), (0, 1, 77, 511, 512)))
    for name, x in whole.own.items():
        for other in (halves, odd):
            assert torch.equal(other.own[name][:, :, :512], x[:, :, :512])
    assert torch.equal(whole.forms[0].decode(whole.piece("k", 0, 512, lambda slots: slots)), restored(Pruned(0.7), k))


@pytest.mark.parametrize("lists", [1, 2, 6])
def test_picked_tokens_are_those_of_the_whole(lists):
    k, v = cloud(0, 2, 2, 100, 16), cloud(1, 2, 2, 100, 16)
    store, ids = store_of(Pruned(0.7), k, v, (0, 100)), cloud(2, 2, lists, 100).argsort(-1)[..., :30]
    for side, x in (("k", k), ("v", v)):
        form, wanted = Pruned(0.7), restored(Pruned(0.7), x).repeat_interleave(max(lists // 2, 1), 1)
        got = form.decode(store.take(side, ids, lambda slots: slots))
        index = ids.expand(-1, wanted.shape[1], -1).unsqueeze(-1).expand(-1, -1, -1, 16)
        assert torch.equal(got, wanted.gather(2, index))


# ------------------------------------------------------------------------------------------------- bytes and refusals
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sparsity", "d"), [(0.7, 128), (0.5, 64), (0.0, 16), (0.95, 8)])
def test_bytes_are_a_bit_per_channel_and_the_entries_that_stay(sparsity, d, dtype):
    form, k = Pruned(sparsity), d - int(sparsity * d)
    assert form.bytes_per_token(d, itemsize=dtype.itemsize) == d / 8 + k * dtype.itemsize
    parts = stored(form, cloud(0, 1, 2, 10, d).to(dtype)).parts
    assert sum(x.nbytes for x in parts.values()) == 20 * (d // 8 + k * dtype.itemsize)


def test_the_cards_example():
    assert Pruned(0.7).bytes_per_token(128) == 16 + 2 * 39  # the card's 38 rounds 0.3 * 128 down, we the entries dropped


@pytest.mark.parametrize("recipe", ["mustafar", "mustafar @ host", "mustafar(k_sparsity=0.5, v_sparsity=0.75)"])
def test_a_models_bytes_are_the_formulas(recipe):
    model, (ids, _) = tiny_model(), prompts(1, 140, 0)
    cache = kvlib.Cache(model, recipe)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    group = cache.managed[0].store.groups[0]
    body = census.kept(group)[0, 0] - group.tail.lengths[0] - 4
    assert body == group.body.counts[0] >= 64
    of_token = 2 + 4 * 8 + 2 + 4 * 4 if "v_" in recipe else 2 * (2 + 4 * 5)
    assert cache.nbytes(by="part", used=True)["body"] == 3 * 2 * body * of_token
    if "host" in recipe:
        assert cache.nbytes(used=True)["host"] == 3 * 2 * body * of_token
        assert cache.traffic().moved == 3 * 2 * body * of_token
    assert (cache.kept() == 141).all()


def test_keys_and_values_may_be_sparse_to_different_degrees():
    assert Mustafar(0, 0.6).forms() == (Pruned(0.6), Pruned(0.6))
    assert Mustafar(sparsity=0.6, k_sparsity=0.0).forms() == (Pruned(0.0), Pruned(0.6))
    assert Mustafar(sparsity=0.6, v_sparsity=0.2).forms() == (Pruned(0.6), Pruned(0.2))
    assert Mustafar().recent == 32


def test_what_cannot_be_is_refused():
    for wrong, words in (
        ("mustafar(sparsity=0.96)", "0.95 or less"),
        ("mustafar(k_sparsity=1.5)", "k_sparsity"),
        ("mustafar(v_sparsity=-0.5)", "v_sparsity"),
        ("mustafar(sparsity=-1)", "sparsity"),
        ("mustafar(recent=-1)", "recent"),
    ):
        with pytest.raises(RecipeError, match=words):
            kvlib.Recipe.parse(wrong)
    with pytest.raises(RecipeError, match="no multiple of 8"):
        Mustafar().fit(1, 1, 20)
    Mustafar().fit(1, 1, 24)
