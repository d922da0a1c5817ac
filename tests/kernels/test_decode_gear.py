"""GEAR's sum, codes + low rank + outliers, attended in one pass: against float64 over what the codec itself decodes."""

import math

import numpy as np
import pytest
import torch

from kvlib.kernels.decode_gear import restored_decode, split_decode_gear
from kvlib.policies.codec.gear import Corrected
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import MERGED
from kvlib.store import Store
from tests.kernels.poison import DEVICE, poisoned
from tests.kernels.test_decode_q4 import check, plain


def forms_of(bits, group, s, rank=4):
    page = 128 if s else 0
    key = Corrected(Uniform(bits, group, per_channel=True), rank, s, page)
    return key, Corrected(Uniform(bits, group and min(group, 64)), rank, s)


def stored(forms, lengths, d, batch=1, heads=2):
    """Segments of these lengths, as the kernel takes them, and what they stand for."""
    store = Store(forms, batch, heads, torch.device("cpu"))
    for n in lengths:
        x = [torch.randn(batch, heads, n, d) * (1 + 4 * torch.rand(d)) for _ in "kv"]
        place = torch.arange(n).expand(batch, heads, -1)
        store.append(np.arange(batch), *x, place)
    k, v = (store.whole(side, lambda slots: slots) for side in "kv")
    names = ("codes", "range", "a", "b")
    pieces = [x.parts[name].to(DEVICE) for x in (k, v) for name in names]
    options = {"ends": store.ends[MERGED].to(DEVICE) if len(lengths) > 1 else None}
    for side, x in (("k", k), ("v", v)):
        options |= {f"{side}_{name}": x.parts[name].to(DEVICE) for name in ("error", "place") if name in x.parts}
    return pieces, options, forms[0].decode(k).double(), forms[1].decode(v).double()


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("bits", "group", "s", "rank"), [(4, 0, 0.02, 4), (4, 0, 0.0, 4), (2, 64, 0.02, 4), (4, 64, 0.02, 8), (8, 0, 0.02, 2)]
)
def test_all_three_terms(bits, group, s, rank, d):
    forms = forms_of(bits, group, s, rank)
    lengths = [256, 128] if d == 64 else [128]
    pieces, options, keys, values = stored(forms, lengths, d)
    total = sum(lengths)
    q = torch.randn(1, 8, 1, d, device=DEVICE)
    length = torch.tensor([[total - 63, total]], dtype=torch.int32, device=DEVICE)
    with poisoned():
        found = split_decode_gear(q, *pieces, d**-0.5, span=group, page=forms[0].page, length=length, **options)
    out, lse = plain(q, keys, values, d**-0.5, [[range(n) for n in length[0].tolist()]])
    check(found, out, lse, 3e-3)
    exact = restored_decode(q, *pieces, d**-0.5, span=group, page=forms[0].page, length=length, **options)
    check(exact, out, lse, 1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 63, 64, 65, 127])
def test_lengths_around_a_tile(tokens):
    forms = forms_of(4, 0, 0.02)
    pieces, options, keys, values = stored(forms, [128], 64)
    q = torch.randn(1, 8, 1, 64, device=DEVICE)
    length = torch.tensor([[tokens, 128]], dtype=torch.int32, device=DEVICE)
    found = split_decode_gear(q, *pieces, 0.125, page=128, length=length, **options)
    check(found, *plain(q, keys, values, 0.125, [[range(tokens), range(128)]]), 3e-3)


def test_garbage_past_the_length_never_shows():
    forms = forms_of(4, 0, 0.02)
    pieces, options, _, _ = stored(forms, [128], 64)
    q = torch.randn(1, 8, 1, 64, device=DEVICE)
    length = torch.tensor([[70, 128]], dtype=torch.int32, device=DEVICE)
    before = split_decode_gear(q, *pieces, 0.125, page=128, length=length, **options)
    for at in (0, 4):
        pieces[at][:, 0, 70:] = 255
    for at in (2, 6, 5):
        pieces[at][:, 0, 70:] = math.nan
    options["v_error"][:, 0, 70:] = math.nan
    after = split_decode_gear(q, *pieces, 0.125, page=128, length=length, **options)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
