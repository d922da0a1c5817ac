"""Lossless pages behind a cache: the bits of `full @ host`, in fewer bytes."""

from copy import deepcopy

import numpy as np
import pytest
import torch

import kvlib
from kvlib.offload.lossless import pack
from kvlib.policies import RecipeError
from kvlib.policies.codec.lossless import Lossless, Pages
from kvlib.policies.encoding import DENSE
from kvlib.recipe import Recipe
from kvlib.store import Store
from kvlib.testing import prompts, tiny_model

DTYPES = [torch.float32, torch.bfloat16]
PROMPT, PAD = 4 + 64 + 3 * 64, 64  # what leaves the tail is whole pages in every row
PAIRS = [  # the same body, in pages and dense
    ("lossless @ host", "full @ host"),
    ("lossless @ host(attend=True)", "full @ host(attend=True)"),
    ("lossless(page=16) + block=16 @ host", "full + block=16 @ host"),
    ('kv(k="lossless", v="kv4") @ host', 'kv(k="full", v="kv4") + block=64 @ host'),
    ('kv(k="kivi(group=32)", v="lossless") @ host', 'kv(k="kivi(group=32)", v="full") + block=64 @ host'),
    ("duo_attention(sparsity=0.5, sink=4, recent=16) + lossless @ host",) * 2,
]
PAIRS[-1] = (PAIRS[-1][0], PAIRS[-1][0].replace("lossless", "full"))


def bits(x):
    return x.view(torch.int16 if x.itemsize == 2 else torch.int32)


@torch.no_grad()
def told(model, cache, steps=70):
    """Logits of a prompt, of steps across a sealed block, of drafts, some of which are taken back, and of a second turn."""
    ids, mask = prompts(2, PROMPT, PAD)
    follow, outs = prompts(2, 200, 0, seed=3)[0], []

    def feed(new):
        nonlocal mask
        first = cache.get_seq_length()
        mask = mask if not first else torch.nn.functional.pad(mask, (0, new.shape[1]), value=1)
        at = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        outs.append(model(new, attention_mask=mask, past_key_values=cache, position_ids=at).logits[:, -5:])

    feed(ids)
    for t in range(steps):
        feed(follow[:, t : t + 1])
    cache.activate_past_recording()
    feed(follow[:, 100:106])
    cache.crop(-4)
    mask = mask[:, :-4]
    for layer in cache.managed:
        layer.record_past = False
    feed(follow[:, 120:160])
    feed(follow[:, 160:161])
    return torch.cat(outs, 1)


def at_identity(slots):
    return slots


# ----------------------------------------------------------------------------------------------------------- the bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_the_same_bits_as_dense_in_host_memory(pair, dtype):
    model = tiny_model().to(dtype)
    caches = [kvlib.Cache(model, recipe) for recipe in pair]
    logits = [told(model, cache) for cache in caches]
    assert logits[0].isfinite().all()
    assert torch.equal(bits(logits[0]), bits(logits[1]))
    assert torch.equal(caches[0].kept(), caches[1].kept())
    bodies = [[group.body for layer in cache.managed for group in layer.store.groups if group.body] for cache in caches]
    assert all((body.counts >= 128).all() for found in bodies for body in found if hasattr(body, "store"))


def test_pages_of_a_selector_are_read_as_dense_ones_are():
    """Where a page of the selector is one of the codec."""
    model, select = tiny_model(), "quest(budget=96, page=16)"
    caches = [kvlib.Cache(model, recipe) for recipe in (select + " + lossless(page=16) @ host", select)]
    logits = [told(model, cache) for cache in caches]
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[1].abs().max()
    assert caches[0].attended().unique().tolist() == [96]


@torch.no_grad()
def test_pages_that_a_prompt_does_not_fill_wait_in_the_tail():
    """Fewer tokens have left it than under `full`, so sums come in another order; nothing else changes."""
    model, caches = tiny_model(), []
    outs = []
    for recipe in ("lossless @ host", "full @ host", "full"):
        cache, (ids, mask) = kvlib.Cache(model, recipe), prompts(2, 230, 17)
        first = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        at = mask.sum(-1, keepdim=True) - 1
        step = model(ids[:, :1], attention_mask=mask, past_key_values=cache, position_ids=at).logits
        outs.append(torch.cat([first, step], 1))
        caches.append(cache)
    for out in outs[:2]:
        torch.testing.assert_close(out, outs[2], atol=1e-5, rtol=1e-4)
    body = caches[0].managed[0].store.groups[0].body
    assert body.counts.tolist() == [(230 - 68) // 64 * 64, (213 - 68) // 64 * 64]
    assert (caches[0].kept() == torch.tensor([231, 214])[None, :, None]).all()


def awkward(dtype, seed=0, rows=2, m=64):
    """Vectors with whatever has a bit pattern among them."""
    x = torch.randn(rows, 2, m, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    kinds = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max]
    x[:, :, ::5, :7] = torch.tensor(kinds).to(dtype)
    x[:, 0, 1, 0] = -x[:, 0, 0, 0]  # a NaN with the other sign
    return x


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_no_number_is_lost_nor_what_is_none(dtype):
    store = Store(Lossless(page=16).forms(), 2, 2, torch.device("cpu"))
    k, v = awkward(dtype), awkward(dtype, 1)
    store.append(np.array([0, 1]), k, v, torch.arange(64).expand(2, 2, -1))
    for side, x in (("k", k), ("v", v)):
        stored = store.piece(side, 0, 64, at_identity)
        assert torch.equal(bits(store.forms[0].decode(stored)), bits(x))
        assert torch.equal(bits(store.piece(side, 16, 48, at_identity).parts["x"]), bits(x[:, :, 16:48]))


@torch.no_grad()
def test_an_infinite_value_is_attended_as_dense_ones_are():
    model = tiny_model()
    outs = []
    for recipe in ("lossless @ host", "full @ host"):
        group = kvlib.Cache(model, recipe).managed[0].store.groups[0]
        q, k = torch.randn(1, 8, PROMPT, 16), torch.randn(1, 2, PROMPT, 16)
        v = k.clone()
        v[0, 0, 30, 3] = float("inf")
        v[0, 1, 70, 5] = float("nan")
        group.take_in(k, v, None)
        group.finish_prefill()
        spec = group.spec
        outs.append(group.forward(q[:, :, :1], k[:, :, :1], v[:, :, :1], None, spec, recording=False))
        torch.manual_seed(0)
    assert torch.equal(outs[0].isnan(), outs[1].isnan())
    assert outs[0][0, :4, 0, 3].isinf().all()
    assert outs[0][0, 4:, 0, 5].isnan().all()
    assert outs[0][..., 6:].isfinite().all()


# ------------------------------------------------------------------------------------------------------ rows that move
@torch.no_grad()
def test_rows_are_reordered_repeated_and_copied():
    model, (ids, _) = tiny_model(), prompts(3, PROMPT, 0)
    caches = [kvlib.Cache(model, recipe) for recipe in PAIRS[0]]
    outs = []
    for cache in caches:
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        twin = deepcopy(cache)
        own, other = prompts(4, 80, 0, seed=5)[0], prompts(4, 80, 0, seed=6)[0]
        found = []
        for t in range(70):  # a block later, alternately
            found.append(model(own[:, t : t + 1], past_key_values=cache).logits)
            found.append(model(other[:, t : t + 1], past_key_values=twin).logits)
        cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
        found.append(model(own[:, :1], past_key_values=cache).logits)
        found.append(model(other[:, :1], past_key_values=twin).logits)
        outs.append(torch.cat(found, 1))
    assert torch.equal(*outs)
    assert caches[0].managed[0].store.groups[0].body.counts.tolist() == [256] * 4


def test_a_row_that_has_fewer_pages_reads_its_own():
    store = Store(Lossless(page=8).forms(), 3, 2, torch.device("cpu"))
    k = torch.randn(3, 2, 40, 16)
    for rows, lo, hi in (((0, 2), 0, 16), ((2,), 16, 40)):
        part = k[list(rows), :, lo:hi]
        store.append(np.array(rows), part, -part, torch.arange(lo, hi).expand(len(rows), 2, -1))
    x = store.piece("k", 8, 40, at_identity).parts["x"]
    assert torch.equal(x[0, :, :8], k[0, :, 8:16])
    assert torch.equal(x[2], k[2, :, 8:40])
    assert not x[0, :, 8:].any()
    assert not x[1].any()
    assert torch.equal(store.piece("v", 0, 40, at_identity).parts["x"][2], -k[2])


# -------------------------------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_bytes_are_those_of_the_pages_and_fewer_than_dense(dtype):
    model, (ids, _) = tiny_model().to(dtype), prompts(2, PROMPT, 0)
    cache, dense = (kvlib.Cache(model, recipe) for recipe in PAIRS[0])
    for each in (cache, dense):
        model(ids, past_key_values=each)
        model(ids[:, :1], past_key_values=each)
    total = 0
    for layer, other in zip(cache.managed, dense.managed, strict=True):
        body, its = layer.store.groups[0].body, other.store.groups[0].body
        for side in "kv":
            x = its.store.own[f"{side}.x"][:, :, :192]
            pages = [[pack(page) for page in row.split(64, 1)] for row in x]
            assert body.store.sizes[side] == [tuple(len(page) for page in row) for row in pages]
            for row, own in enumerate(pages):
                held = body.store.pages[side].parts["page"][row, 0]
                assert torch.equal(held[: sum(map(len, own))], torch.cat(own))
            total += sum(len(page) for row in pages for page in row)
    assert cache.nbytes(used=True)["host"] == total
    assert cache.nbytes(by="part", used=True)["body"] == total
    there = dense.nbytes(used=True)["host"]
    assert total < there * (0.82 if dtype == torch.bfloat16 else 0.95)
    allocated = cache.nbytes()["host"]
    assert total <= allocated <= 1.1 * total + 12 * 2 * 64
    assert cache.nbytes(used=True)["device"] == dense.nbytes(used=True)["device"]


@torch.no_grad()
def test_what_is_brought_to_the_device_is_counted():
    model, (ids, _) = tiny_model(), prompts(1, PROMPT, 0)
    cache, dense = (kvlib.Cache(model, recipe) for recipe in PAIRS[0])
    for each in (cache, dense):
        model(ids, past_key_values=each)
        model(ids[:, :1], past_key_values=each)
    assert dense.traffic().moved == 3 * 192 * 2 * 2 * 16 * 4
    assert cache.traffic().moved == dense.traffic().moved


@torch.no_grad()
def test_a_damaged_page_is_not_attended():
    model, (ids, _) = tiny_model(), prompts(1, PROMPT, 0)
    cache = kvlib.Cache(model, "lossless @ host")
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    cache.managed[1].store.groups[0].body.store.pages["v"].parts["page"][0, 0, 700] ^= 4
    with pytest.raises(ValueError, match="damaged"):
        model(ids[:, 1:2], past_key_values=cache)


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("lossless", "write '@ host'"),
        ("lossless @ device", "write '@ host'"),
        ('kv(k="kv4", v="lossless")', "write '@ host'"),
        ('kv(k="kv4", where="0: lossless")', "write '@ host'"),
        ("quest(budget=256) + lossless @ host", "64 tokens at a time.*quest reads fewer"),
        ("clusterkv(budget=256) + lossless @ host", "64 tokens at a time.*clusterkv reads fewer"),
        ('oracle(budget=256) + kv(k="kv4", v="lossless(page=8)") @ host', "8 tokens at a time.*oracle reads fewer"),
        ("h2o(budget=256) + lossless @ host", "online h2o cannot evict"),
        ("lossless(page=0) @ host", "page"),
        ("lossless(page=2.5) @ host", "page"),
        ("lossless(page=64) + block=96 @ host", "64 tokens together"),
    ],
)
def test_what_cannot_be_is_refused(recipe, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(recipe)


def test_forms_of_keys_and_values():
    assert Lossless(page=16).forms() == (Pages(16), Pages(16))
    assert Lossless().grain == 64
    mixed = Recipe.parse('kv(k="lossless(page=8)", v="full") @ host').codec
    assert mixed.forms() == (Pages(8), DENSE)
    assert str(Recipe.parse("lossless(page=8) @ host")) == "lossless(page=8) @ host"
