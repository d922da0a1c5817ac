"""GEAR's sum, codes + low rank + outliers, attended in one pass: against float64 over what the codec itself decodes."""

import math

import numpy as np
import pytest
import torch

from kvlib.kernels.decode_gear import MOST, decode_gear, split_decode_gear
from kvlib.policies.codec.gear import Corrected
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import MERGED, SEGMENT
from kvlib.store import Store
from tests.kernels.poison import DEVICE, error, poisoned
from tests.kernels.test_decode_q4 import check, cloud, plain, wider


def forms_of(bits, group, s, rank=4, page=128, width=0):
    """Of keys and values: `group` tokens of a channel share a range, `width` channels of a token."""
    key = Corrected(Uniform(bits, group, per_channel=True), rank, s, page if s else 0)
    return key, Corrected(Uniform(bits, width), rank, s)


def stored(forms, lengths, d, batch=1, heads=2):
    """Segments of these lengths, as the kernel takes them, and what they stand for."""
    store = Store(forms, batch, heads, torch.device("cpu"))
    for n in lengths:
        x = [cloud(batch, heads, n, d) * torch.where(torch.rand(batch, heads, n, d) > 0.97, 5.0, 1.0) for _ in "kv"]
        store.append(np.arange(batch), *x, torch.arange(n).expand(batch, heads, -1))
    k, v = (store.whole(side, lambda slots: slots) for side in "kv")
    pieces = [x.parts[name].to(DEVICE) for x in (k, v) for name in ("codes", "range", "a", "b")]
    options = {"span": forms[0].base.group, "page": forms[0].page}
    if len(lengths) > 1:
        options["ends"] = store.ends[MERGED].to(DEVICE)
    if options["span"] == 0 and store.ends[SEGMENT].shape[1] > store.ends[MERGED].shape[1]:
        options["range_ends"] = store.ends[SEGMENT].to(DEVICE)
    for side, x in (("k", k), ("v", v)):
        options |= {f"{side}_{name}": x.parts[name].to(DEVICE) for name in ("error", "place") if name in x.parts}
    return pieces, options, forms[0].decode(k).double(), forms[1].decode(v).double()


def run(q, pieces, scale, **options):
    with poisoned():
        found = split_decode_gear(q, *pieces, scale, **options)
    twin = decode_gear(q, *pieces, scale, **options)
    assert error(found[0], twin[0]) < 2e-3
    return found


CASES = {
    "the paper's 4 bits": forms_of(4, 0, 0.02),
    "without outliers": forms_of(4, 0, 0.0),
    "2 bits": forms_of(2, 64, 0.02, width=32),
    "2 bits without outliers": forms_of(2, 64, 0.0, width=16),
    "4 bits in groups, rank 8": forms_of(4, 64, 0.02, rank=8, width=16),
    "8 bits, rank 3": forms_of(8, 0, 0.02, rank=3),
    "more than the rank of a product": forms_of(4, 32, 0.0, rank=20),
    "many outliers": forms_of(4, 64, 0.06, page=64),
    "groups that no tile fits": forms_of(4, 48, 0.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("d", "group"), [(64, 4), (128, 1)])
def test_all_three_terms(name, d, group):
    forms = CASES[name]
    lengths = [192] if "no tile" in name else [128, 64] if "without" in name else [128]
    pieces, options, keys, values = stored(forms, lengths, d)
    total = sum(lengths)
    q = torch.randn(1, 2 * group, 1, d, device=DEVICE)
    length = torch.tensor([[total - 63, total]], dtype=torch.int32, device=DEVICE)
    found = run(q, pieces, d**-0.5, length=length, **options)
    out, lse = plain(q, keys, values, d**-0.5, [[range(n) for n in length[0].tolist()]])
    check(found, out, lse, 1e-3)
    exact = decode_gear(q.double(), *pieces, d**-0.5, length=length, **options)
    assert error(exact[0], out) < 1e-6


@pytest.mark.parametrize("most", [None, 16384])
@pytest.mark.parametrize("name", ["the paper's 4 bits", "2 bits without outliers"])
def test_chunks_that_end_within_segments_and_segments_that_end_within_chunks(name, most):
    """Chunks of 64 tokens, or with room for many one of 256."""
    forms = CASES[name]
    lengths = [128, 128, 256] if forms[0].s else [64, 128, 64, 192]
    pieces, options, keys, values = stored(forms, lengths, 64)
    q = torch.randn(1, 2, 1, 64, device=DEVICE)
    length = torch.tensor([[sum(lengths[:2]), sum(lengths) - 5]], dtype=torch.int32, device=DEVICE)
    found = run(q, pieces, 0.125, length=length, most=most, **options)
    check(found, *plain(q, keys, values, 0.125, [[range(n) for n in length[0].tolist()]]), 1e-3)


def test_sequences_have_segments_of_their_own():
    forms = CASES["without outliers"]
    pieces, options, keys, values = stored(forms, [128, 64], 64, batch=2)
    other, rest, *decoded = stored(forms, [64, 128], 64, batch=2)
    pieces = [torch.cat([x[:1], y[1:]]) for x, y in zip(pieces, other, strict=True)]
    options["ends"] = torch.cat([options["ends"][:1], rest["ends"][1:]])
    options["ends"] = torch.nn.functional.pad(options["ends"], (0, 1), value=2**31 - 1)  # a third that went had one more
    keys, values = (torch.cat([x[:1], y[1:]]) for x, y in zip((keys, values), decoded, strict=True))
    q = torch.randn(2, 2, 1, 64, device=DEVICE)
    check(run(q, pieces, 0.125, **options), *plain(q, keys, values, 0.125, [[range(192)] * 2] * 2), 1e-3)


@pytest.mark.parametrize(
    ("forms", "lengths", "left", "most"),
    [
        (forms_of(4, 0, 0.0), [40, *[24] * 8, 37], 3, None),  # segments of any length
        (forms_of(4, 0, 0.0), [40, *[24] * 8, 37], 3, 16384),
        (forms_of(4, 0, 0.0), [16] * 8, 1, None),  # one alone
        (forms_of(4, 0, 0.03, page=32), [64, *[32] * 8, 32], 3, 16384),
        (forms_of(2, 32, 0.0, width=16), [96, *[32] * 8], 2, 16384),  # ranges are not of segments
    ],
)
def test_segments_with_ranges_of_their_own_share_factors_that_were_merged(forms, lengths, left, most):
    pieces, options, keys, values = stored(forms, lengths, 64, heads=1)
    assert pieces[3].shape[2] == left
    assert ("range_ends" in options) == (forms[0].base.group == 0)
    q, tokens = torch.randn(1, 2, 1, 64, device=DEVICE), sum(lengths) - 9
    length = torch.tensor([[tokens]], dtype=torch.int32, device=DEVICE)
    found = run(q, pieces, 0.125, length=length, most=most, **options)
    check(found, *plain(q, keys, values, 0.125, [[range(tokens)]]), 1e-3)


def test_sequences_merge_when_they_will():
    """One has two segments with factors, the other ten; of ranges both have ten, which end elsewhere."""
    forms = CASES["without outliers"]
    merged, few, *decoded = stored(forms, [16, *[24] * 8, 48], 64, batch=2)
    loose, many, *rest = stored(forms, [32, *[24] * 7, 16, 40], 64, batch=2)
    assert (few["ends"].shape[1], many["ends"].shape[1]) == (3, 10)
    keys, values = (torch.cat([x[:1], y[1:]]) for x, y in zip(decoded, rest, strict=True))
    wide = [torch.zeros_like(y) for y in loose]
    for x, y, z in zip(wide, merged, loose, strict=True):
        x[0, :, : y.shape[2]], x[1] = y[0], z[1]
    ends = torch.nn.functional.pad(few["ends"][:1], (0, 7), value=2**31 - 1)
    options = {**few, "ends": torch.cat([ends, many["ends"][1:]])}
    options["range_ends"] = torch.cat([few["range_ends"][:1], many["ends"][1:]])
    q = torch.randn(2, 2, 1, 64, device=DEVICE)
    check(run(q, wide, 0.125, **options), *plain(q, keys, values, 0.125, [[range(256)] * 2] * 2), 1e-3)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 63, 64, 65, 127])
def test_lengths_around_a_tile(tokens):
    pieces, options, keys, values = stored(CASES["the paper's 4 bits"], [128], 64, heads=1)
    q = torch.randn(1, 4, 1, 64, device=DEVICE)
    length = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    found = run(q, pieces, 0.125, length=length, **options)
    check(found, *plain(q, keys, values, 0.125, [[range(tokens)]]), 1e-3)


def test_rows_of_a_draft_and_a_softcap():
    pieces, options, keys, values = stored(CASES["4 bits in groups, rank 8"], [128], 64)
    q = torch.randn(1, 14, 2, 64, device=DEVICE)
    found = run(q, pieces, 0.125, softcap=4.0, **options)
    check(found, *plain(q, keys, values, 0.125, [[range(128)] * 2], softcap=4.0), 1e-3)


def test_an_outlier_is_where_it_was():
    """One entry of one key and one of one value, far out of all ranges, by their errors alone."""
    d, forms = 64, CASES["the paper's 4 bits"]
    pieces, options, _, _ = stored(forms, [128], d, heads=1)
    for x in (*pieces, options["k_error"], options["v_error"]):
        x.zero_()
    token, key_channel, value_channel = 77, 13, 50
    options["k_error"][0, 0, 0, 1, key_channel], options["k_place"][0, 0, 0, 1, key_channel] = 30.0, token
    options["v_error"][0, 0, token, 0], options["v_place"][0, 0, token, 0] = -7.0, value_channel
    q = torch.eye(d, device=DEVICE)[None, :, None]  # as many query heads, each of which asks for one channel
    out, _ = run(q, pieces, 1.0, **options)
    weight = torch.full((d,), 1 / 128)
    weight[key_channel] = 1.0
    wanted = torch.zeros(d, d)
    wanted[:, value_channel] = -7 * weight
    torch.testing.assert_close(out[0, :, 0].cpu(), wanted, atol=1e-4, rtol=1e-3)


def test_garbage_past_the_length_never_shows():
    """Neither behind the last token nor around the buffers, nor where a sequence has nothing at all."""
    pieces, options, _, _ = stored(CASES["the paper's 4 bits"], [128, 128], 64)
    q = torch.randn(1, 8, 1, 64, device=DEVICE)
    length = torch.tensor([[128, 0]], dtype=torch.int32, device=DEVICE)
    before = run(q, pieces, 0.125, length=length, **options)
    parts = {f"piece {i}": x for i, x in enumerate(pieces)} | {n: x for n, x in options.items() if n[1] == "_"}
    for name, x in parts.items():
        garbage = math.nan if x.is_floating_point() else 255
        parts[name] = wider(x, garbage)
        parts[name][:, 0, x.shape[2] // 2 :] = garbage  # the second segment, and what belongs to its tokens
        parts[name][:, 1] = garbage
    worse = {name: parts.get(name, x) for name, x in options.items()}
    after = run(q, [parts[f"piece {i}"] for i in range(8)], 0.125, length=length, **worse)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_what_does_not_fit_is_said():
    pieces, options, _, _ = stored(CASES["many outliers"], [128, 128], 64)
    q = torch.randn(1, 2, 1, 64, device=DEVICE)
    with pytest.raises(ValueError, match="2 segments"):
        split_decode_gear(q, *pieces, 0.125, **{**options, "ends": None})
    many = [options[name].repeat(1, 1, 1, 3) for name in ("v_error", "v_place")]
    assert many[0].shape[3] > MOST
    with pytest.raises(ValueError, match=f"at most {MOST}"):
        split_decode_gear(q, *pieces, 0.125, **{**options, "v_error": many[0], "v_place": many[1]})


def test_the_operator_in_a_compiler_s_eyes():
    pieces, options, _, _ = stored(CASES["the paper's 4 bits"], [128], 64)
    q = torch.randn(1, 4, 1, 64, device=DEVICE)
    torch.library.opcheck(torch.ops.kvlib.decode_gear.default, (q, *pieces, 0.125), options)
