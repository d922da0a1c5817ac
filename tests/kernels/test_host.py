import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.kernels import host
from kvlib.kernels.attention import Partial
from kvlib.kernels.merge import merge
from kvlib.kernels.quantise import decode, unpack
from kvlib.policies.codec.uniform import Uniform
from tests.kernels.poison import error, poisoned

pytestmark = pytest.mark.skipif(not host.available(), reason=host.describe())

SOURCE = Path(host.__file__)
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODED = 4e-5  # sums over codes, which are never negative, are larger than what is left once least values are added
EDGES = [0, 1, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025]  # a tile's, and a piece's


@pytest.fixture(autouse=True)
def _written():
    with poisoned():
        yield


def make(batch=2, heads=2, group=2, n=1, keys=70, d=64, dv=None, dtype=torch.float32):
    shapes = (batch, heads * group, n, d), (batch, heads, keys, d), (batch, heads, keys, dv or d)
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k.to(dtype), v.to(dtype)


def expected(q, k, v, scale, seen=None, softcap=None, bias=None):
    """out, lse and p in float64; seen and bias broadcast to [B, Hq, n, T]."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q.double() @ k.mT * scale
    if softcap:
        s = softcap * (s / softcap).tanh()
    if bias is not None:
        s = s + bias.double()
    if seen is not None:
        s = s.masked_fill(~seen, -INF)
    lse = s.logsumexp(-1)
    p = (s - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return p @ v, lse, p


def check(found, want, bound=2e-6):
    """found: out, lse and perhaps p; want: the same in float64."""
    dead = want[1] == -INF
    assert found[0].dtype == found[1].dtype == torch.float32 and found[0].isfinite().all()
    assert (found[0][dead] == 0).all() and (found[1][dead] == -INF).all()
    assert error(found[0], want[0]) <= bound
    torch.testing.assert_close(found[1].double()[~dead], want[1][~dead], atol=5 * bound, rtol=5 * bound)
    if len(found) > 2 and found[2] is not None:
        torch.testing.assert_close(found[2].double(), want[2][:, :, 0], atol=bound, rtol=50 * bound)
        assert (found[2][want[2][:, :, 0] == 0] == 0).all()


# -------------------------------------------------------------------------------------------------------------- dense
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "dv"), [(16, 16), (24, 40), (64, 64), (80, 96), (96, 80), (128, 128), (128, 64), (256, 512)])
def test_head_sizes_and_formats(dtype, d, dv):
    q, k, v = make(keys=70, d=d, dv=dv, dtype=dtype)
    assert host.serves(q, k, v)
    check(host.decode(q, k, v, d**-0.5), expected(q, k, v, d**-0.5))
    half = q.to(dtype)
    check(host.decode(half, k, v, d**-0.5), expected(half, k, v, d**-0.5))


@pytest.mark.parametrize("group", [1, 4, 5, 7])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 41])
def test_query_rows(group, n):
    q, k, v = make(group=group, n=n, keys=600, dtype=torch.bfloat16)
    check(host.decode(q, k, v, 0.2), expected(q, k, v, 0.2))
    seen = torch.ones(n, 600, dtype=torch.bool).tril(600 - n)
    check(host.decode(q, k, v, 0.2, causal=True), expected(q, k, v, 0.2, seen))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_tiles_and_pieces_with_anything_behind_them(dtype):
    q, k, v = make(batch=len(EDGES), heads=1, keys=1030, dtype=dtype)
    length = torch.tensor(EDGES)
    seen = (torch.arange(1030) < length[:, None])[:, None, None]
    want = expected(q, k, v, 0.2, seen)
    for row, end in enumerate(EDGES):
        for x, junk in ((k, INF), (v, NAN)):
            x[row, :, end:] = junk
            x[row, :, end + 1 :: 2] = -INF
    check(host.decode(q, k, v, 0.2, length=length, probabilities=True), want)
    q5 = torch.randn(len(EDGES), 2, 5, 64)
    seen = seen & torch.ones(5, 1030, dtype=torch.bool).tril(1030 - 5)
    want = expected(q5, k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0), 0.2, seen)
    check(host.decode(q5, k, v, 0.2, length=length, causal=True), want)


def test_starts_with_anything_before_them():
    start, length = (
        torch.tensor([0, 1, 63, 64, 511, 512, 700, 1030]),
        torch.tensor([1030, 2, 1030, 64, 600, 1030, 1030, 1030]),
    )
    q, k, v = make(batch=8, heads=2, n=2, keys=1030, dtype=torch.float16)
    key = torch.arange(1030)
    seen = ((key >= start[:, None]) & (key < length[:, None]))[:, None, None]
    causal = torch.ones(2, 1030, dtype=torch.bool).tril(1028)
    want = expected(q, k, v, 0.2, seen & causal, softcap=3.0)
    for row, (lo, hi) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
        for x in (k, v):
            x[row, :, :lo], x[row, :, hi:] = NAN, INF
    check(host.decode(q, k, v, 0.2, start=start, length=length, causal=True, softcap=3.0), want)
    first = q[:, :, 1:]
    want = [x[:, :, 1:] for x in want]
    check(host.decode(first, k, v, 0.2, start=start, length=length, softcap=3.0, probabilities=True), want)


@pytest.mark.parametrize("heads", [1, 3, 6])
@pytest.mark.parametrize("n", [1, 3])
def test_bias(heads, n):
    q, k, v = make(heads=3, n=n, keys=530)
    bias = torch.randn(2, heads, 530).mul_(3).masked_fill_(torch.rand(2, heads, 530) > 0.7, -INF)
    bias[1, 0] = -INF
    full = bias.repeat_interleave(6 // heads, 1).unsqueeze(2)
    check(host.decode(q, k, v, 0.3, bias=bias, softcap=20.0), expected(q, k, v, 0.3, softcap=20.0, bias=full))
    k[:, :, 5] = NAN  # a score of any kind, if the bias hides it; so the value is not looked at but must be finite
    bias[:, :, 5] = full[:, :, :, 5] = -INF
    check(host.decode(q, k, v, 0.3, bias=bias), expected(q, k.nan_to_num(0), v, 0.3, bias=full))


def test_exp_and_tanh_to_an_ulp_or_two():
    logits = torch.linspace(-86, 0, 4001)
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 4001, 16)
    q[..., 0], k[0, 0, :, 0] = 1, logits
    p = host.decode(q, k, k, 1.0, probabilities=True)[2]
    torch.testing.assert_close(p[0, 0].double(), logits.double().softmax(0), rtol=1e-6, atol=0)
    wide = torch.linspace(-12, 12, 999)
    many = torch.zeros(999, 1, 1, 16)
    many[..., 0] = wide.view(-1, 1, 1)
    lse = host.decode(q.expand(999, -1, -1, -1), many, many, 1.0, softcap=2.0)[1]  # one key: its logit
    torch.testing.assert_close(lse.flatten().double(), 2 * (wide.double() / 2).tanh(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["head major", "token major", "odd offset"])
def test_views_are_read_where_they_are(dtype, layout):
    q, k, v = make(n=2, keys=90, d=80, dtype=dtype)
    plain = host.decode(q, k, v, 0.2)

    def placed(x):
        b, h, t, d = x.shape
        room = torch.full((b, h, t + 9, d), NAN).to(dtype)
        if layout == "token major":
            room = torch.full((b, t + 9, h, d), NAN).to(dtype).transpose(1, 2)
        if layout == "odd offset":
            room = (
                torch.full((b * h * (t + 9) * (d + 24) + 3,), NAN).to(dtype)[3:].view(b, h, t + 9, d + 24)[..., 5 : d + 5]
            )
        room[:, :, 7 : 7 + t] = x
        return room[:, :, 7 : 7 + t]

    rows = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = host.decode(rows, placed(k), placed(v), 0.2)
    assert all(torch.equal(a, b) for a, b in zip(found[:2], plain[:2], strict=True))


def test_infinite_and_nan_values_that_are_seen_show():
    q, k, v = make(keys=70)
    v[0, 0, 3, 5] = INF
    out = host.decode(q, k, v, 0.2)[0]
    assert (out[0, :2, 0, 5] == INF).all() and out[0, :2, 0, :5].isfinite().all() and out[1].isfinite().all()
    k[1, 1, 69, 0] = NAN
    out, lse, _ = host.decode(q, k, v, 0.2)
    assert out[1, 2:].isnan().all() and lse[1, 2:].isnan().all() and lse[1, :2].isfinite().all()


# -------------------------------------------------------------------------------------------------------------- lists
def listed(x, ids, heads):
    """Entries ids of x for every query head, plainly."""
    x = x.repeat_interleave(heads // x.shape[1], 1)
    ids = ids.repeat_interleave(heads // ids.shape[1], 1).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lists", [1, 2, 6])
@pytest.mark.parametrize("n", [1, 3])
def test_lists_with_duplicates(dtype, lists, n):
    q, k, v = make(heads=2, group=3, n=n, keys=300, d=96, dtype=dtype)
    ids = torch.randint(300, (2, lists, 1100))
    ids[:, :, 7] = ids[:, :, 8]
    want = expected(q, listed(k, ids, 6), listed(v, ids, 6), 0.2)
    check(host.decode(q, k, v, 0.2, ids=ids, probabilities=n == 1), want)
    backwards = host.decode(q, k, v, 0.2, ids=ids.flip(2))
    check(backwards, want)


def test_list_lengths_per_row_and_per_list():
    q, k, v = make(batch=len(EDGES), heads=2, keys=90)
    ids = torch.randint(90, (len(EDGES), 2, 1030))
    bias = torch.randn(len(EDGES), 2, 1030)
    both = [x.repeat_interleave(2, 1) for x in (ids, bias)]
    for length in (torch.tensor(EDGES), torch.stack([torch.tensor(EDGES), torch.tensor(EDGES).flip(0)], 1)):
        ends = (length.view(len(EDGES), -1).expand(-1, 2)).repeat_interleave(2, 1)
        seen = (torch.arange(1030) < ends.unsqueeze(-1)).unsqueeze(2)
        want = expected(q, listed(k, both[0], 4), listed(v, both[0], 4), 0.2, seen, bias=both[1].unsqueeze(2))
        junk = ids.masked_fill(torch.arange(1030) >= length.view(len(EDGES), -1, 1), 1 << 60)
        check(host.decode(q, k, v, 0.2, ids=junk, length=length, bias=bias, probabilities=True), want)
    shared = ids[:, :1]
    want = expected(q, listed(k, shared, 4), listed(v, shared, 4), 0.2)
    check(host.decode(q, k, v, 0.2, ids=shared.expand(-1, 2, -1)), want)
    one = torch.randint(90, (1, 1, 50)).expand(len(EDGES), 1, 50)
    check(host.decode(q, k, v, 0.2, ids=one), expected(q, listed(k, one, 4), listed(v, one, 4), 0.2))


@pytest.mark.parametrize("wrong", [-1, 70, 1 << 40, -(1 << 62)])
def test_ids_of_no_key(wrong):
    q, k, v = make()
    ids = torch.zeros(2, 2, 600, dtype=torch.int64)
    ids[1, 1, 540] = wrong
    with pytest.raises(ValueError, match=str(wrong)):
        host.decode(q, k, v, 0.2, ids=ids)


# -------------------------------------------------------------------------------------------------------------- codes
def coded(x, bits, group=0, per_channel=False):
    """x as codes, and what they stand for."""
    form = Uniform(bits, group, per_channel)
    parts = form.quantise(x)
    codes = host.Codes(parts["codes"], parts["range"], bits, group if per_channel else 1)
    scale, least = (part.float() for part in parts["range"].unbind(3))
    if per_channel:
        scale, least = (part.repeat_interleave(group, 2) for part in (scale, least))
    else:
        scale, least = (part.repeat_interleave(x.shape[3] // part.shape[3], 3) for part in (scale, least))
    return codes, decode(unpack(parts["codes"], bits), scale, least)


FORMS = {
    (bits, d, *ranges)
    for bits, sizes in ((8, (16, 24, 80, 128, 256)), (4, (32, 64, 80, 96, 128)), (2, (64, 80, 96, 128, 256)))
    for d in sizes
    for ranges in ((0, False), (d // 2, False), (32, False), (16, True), (10, True))
    if ranges[1] or not ranges[0] or not (d % ranges[0] or ranges[0] % 16 or d * bits // 8 % 16)
}


@pytest.mark.parametrize(("bits", "d", "group", "per_channel"), sorted(FORMS))
def test_codes(bits, d, group, per_channel):
    q, k, v = make(heads=2, group=5, n=2, keys=560, d=d)
    k += 2 * torch.randn(d)
    (k, plain_k), (v, plain_v) = coded(k, bits, group, per_channel), coded(v, bits, 0 if per_channel else group)
    assert host.serves(q, k, v)
    want = expected(q, plain_k, plain_v, d**-0.5, softcap=30.0)
    check(host.decode_codes(q, k, v, d**-0.5, softcap=30.0), want, CODED)
    p = torch.rand(2, 10, 2, 560)
    assert error(host.scores(q, k), q.double() @ plain_k.double().repeat_interleave(5, 1).mT) < CODED
    assert error(host.weighted_sum(p, v), p.double() @ plain_v.double().repeat_interleave(5, 1)) < CODED
    for lists in (1, 2, 10):
        ids = torch.randint(560, (2, lists, 530))
        keys, values = listed(plain_k, ids, 10), listed(plain_v, ids, 10)
        check(host.decode_codes(q, k, v, d**-0.5, ids=ids), expected(q, keys, values, d**-0.5), CODED)
        assert error(host.scores(q, k, ids), q.double() @ keys.double().mT) < CODED
        assert error(host.weighted_sum(p[..., :530], v, ids), p[..., :530].double() @ values.double()) < CODED


@pytest.mark.parametrize("per_channel", [False, True])
def test_lengths_of_codes(per_channel):
    q, k, v = make(batch=len(EDGES), heads=1, keys=1040, d=128)
    (k, plain_k), (v, plain_v) = coded(k, 4, 16 if per_channel else 0, per_channel), coded(v, 4)
    length = torch.tensor(EDGES)
    seen = (torch.arange(1040) < length[:, None])[:, None, None]
    for row, end in enumerate(EDGES):
        v.range[row, :, end:] = NAN
        k.range[row, :, -(-end // k.span) :] = NAN
    check(host.decode_codes(q, k, v, 0.1, length=length), expected(q, plain_k, plain_v, 0.1, seen), CODED)


def test_probabilities_of_codes():
    q, k, v = make(batch=2, heads=2, group=3, keys=700, d=64)
    (k, plain_k), (v, _) = coded(k, 4), coded(v, 4)
    length = torch.tensor([700, 513])
    _, _, p = host.decode_codes(q, k, v, 0.2, length=length, probabilities=True)
    s = 0.2 * (q.double() @ plain_k.double().repeat_interleave(3, 1).mT)[:, :, 0]
    wanted = s.masked_fill(torch.arange(700) >= length.view(2, 1, 1), -math.inf).softmax(-1)
    assert error(p, wanted) < CODED and not p[1, :, 513:].any()
    with pytest.raises(ValueError, match="q has 2"):
        host.decode_codes(q.expand(-1, -1, 2, -1), k, v, 0.2, probabilities=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_beside_dense(dtype):
    q, k, v = make(keys=130, d=128, dtype=dtype)
    (ck, plain_k), (cv, plain_v) = coded(k.float(), 2, 10, True), coded(v.float(), 8, 64)
    check(host.decode_codes(q, ck, v, 0.1), expected(q, plain_k, v, 0.1), CODED)
    check(host.decode_codes(q, k, cv, 0.1), expected(q, k, plain_v, 0.1), CODED)
    check(host.decode_codes(q, k, v, 0.1), expected(q, k, v, 0.1))


def test_views_of_codes():
    q, k, v = make(keys=128, d=64)
    (k, plain_k), (v, plain_v) = coded(k, 4, 16, True), coded(v, 4, 32)

    def placed(x, axis):
        room = torch.full((*x.shape[:2], x.shape[2] + 5, *x.shape[3:]), 99).to(x.dtype).transpose(1, axis).contiguous()
        room = room.transpose(1, axis)
        room[:, :, 3:-2] = x
        return room[:, :, 3:-2]

    for axis in (1, 2):
        views = [x._replace(codes=placed(x.codes, axis), range=placed(x.range, axis)) for x in (k, v)]
        check(host.decode_codes(q, *views, 0.2), expected(q, plain_k, plain_v, 0.2), CODED)


# ------------------------------------------------------------------------------------------------------- all together
@given(st.data())
def test_any_call(data):
    draw = data.draw
    batch, heads, group, n = (draw(st.integers(1, 3)) for _ in range(4))
    keys, d, dv = draw(st.integers(1, 1100)), 8 * draw(st.integers(2, 20)), 8 * draw(st.integers(2, 20))
    q, k, v = make(batch, heads, group, n, keys, d, dv, draw(st.sampled_from(DTYPES)))
    softcap = draw(st.sampled_from([None, 4.0]))
    ends = [draw(st.integers(0, keys + 2)) for _ in range(batch)]
    length = torch.tensor(ends)
    seen = (torch.arange(keys) < length[:, None])[:, None, None]
    if draw(st.booleans()):
        lists = draw(st.sampled_from([1, heads, heads * group]))
        ids = torch.randint(keys, (batch, lists, keys))
        want = expected(q, listed(k, ids, heads * group), listed(v, ids, heads * group), d**-0.5, seen, softcap)
        check(host.decode(q, k, v, d**-0.5, ids=ids, length=length, softcap=softcap), want)
        return
    start = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)])
    seen = seen & (torch.arange(keys) >= start[:, None])[:, None, None]
    causal = draw(st.booleans())
    if causal:
        seen = seen & torch.ones(n, keys, dtype=torch.bool).tril(keys - n)
    want = expected(q, k, v, d**-0.5, seen, softcap)
    check(host.decode(q, k, v, d**-0.5, start=start, length=length, causal=causal, softcap=softcap), want)


def test_parts_merge_to_the_whole():
    q, k, v = make(n=2, keys=1300, dtype=torch.bfloat16)
    whole = host.decode(q, k, v, 0.2)
    parts = [Partial(*host.decode(q, k[:, :, a:b], v[:, :, a:b], 0.2)) for a, b in ((0, 0), (0, 700), (700, 1300))]
    merged = merge(parts)
    torch.testing.assert_close(merged.out, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.lse, whole[1], rtol=1e-6, atol=1e-6)


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    q, k, v = make(batch=3, heads=2, group=7, n=5, keys=3000, d=128, dtype=torch.bfloat16)
    ids = torch.randint(3000, (3, 14, 2100))
    (ck, _), (cv, _) = coded(k.float(), 4, 100, True), coded(v.float(), 4, 32)
    calls = [
        lambda: host.decode(q, k, v, 0.1, causal=True),
        lambda: host.decode(q[:, :, :1], k, v, 0.1, ids=ids, probabilities=True),
        lambda: host.decode_codes(q, ck, cv, 0.1),
        lambda: (host.scores(q, ck), host.weighted_sum(torch.ones(3, 14, 5, 3000), cv)),
    ]
    try:
        torch.set_num_threads(1)
        alone = [call() for call in calls]
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for call, want in zip(calls, alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(call(), want, strict=True) if a is not None)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads():
    q, k, v = make(keys=600, dtype=torch.bfloat16)
    want, wrong = host.decode(q, k, v, 0.2)[0], []

    def work():
        for _ in range(20):
            wrong.extend([1] * (not torch.equal(host.decode(q, k, v, 0.2)[0], want)))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_nothing_to_attend_to():
    q, k, v = make(keys=0)
    out, lse, p = host.decode(q, k, v, 0.2, probabilities=True)
    assert (out == 0).all() and (lse == -INF).all() and p.shape == (2, 4, 0)
    q, k, v = make()
    out, lse, _ = host.decode(q, k, v, 0.2, ids=torch.zeros(2, 1, 0, dtype=torch.int64))
    assert (out == 0).all() and (lse == -INF).all()
    (codes, _), ids = coded(v, 4), torch.zeros(2, 1, 0, dtype=torch.int64)
    assert (host.weighted_sum(torch.zeros(2, 4, 1, 0), codes, ids) == 0).all()
    assert host.decode(q[:0], k[:0], v[:0], 0.2)[0].shape == (0, 4, 1, 64)


# ------------------------------------------------------------------------------------------------ what it does not take
def test_what_is_served():
    q, k, v = make()
    assert host.serves(q, k, v) and host.serves(q, k, None) and host.serves(None, None, v)
    assert not host.serves(q.double(), k, v)
    assert not host.serves(*make(d=12)) and not host.serves(*make(d=20)) and not host.serves(*make(d=520))
    assert not host.serves(q, k.mT.contiguous().mT, v)
    assert not host.serves(q.to("meta"), k.to("meta"), v.to("meta"))
    assert not host.serves(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert host.serves(q, k, v)
    codes = coded(k, 4)[0]
    assert host.serves(None, codes, codes)
    assert not host.serves(None, codes._replace(bits=3), None)
    assert not host.serves(None, coded(k, 4, 8)[0], None)  # groups of half a register
    assert not host.serves(None, coded(make(d=32)[1], 2)[0], None)  # 8 bytes a row
    channels = coded(k, 4, 10, True)[0]
    assert host.serves(None, channels, codes) and not host.serves(None, codes, channels)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"probabilities.*has 3", lambda q, k, v: host.decode(q.expand(-1, -1, 3, -1), k, v, 1.0, probabilities=True)),
        (r"no start", lambda q, k, v: host.decode(q, k, v, 1.0, ids=torch.zeros(2, 1, 4).long(), causal=True)),
        (r"\(2, 2, 70\), \(2, 2, 69\)", lambda q, k, v: host.decode(q, k, v[:, :, 1:], 1.0)),
        (r"\(2, 3, 1, 64\)", lambda q, k, v: host.decode(q[:, :3], k, v, 1.0)),
        (r"\(1, 4, 1, 64\)", lambda q, k, v: host.decode(q[:1], k, v, 1.0)),
        (r"48.*64 channels", lambda q, k, v: host.decode(q[..., :48], k, v, 1.0)),
        (r"float64", lambda q, k, v: host.decode(q, k, v.double(), 1.0)),
        (r"ids.*int32", lambda q, k, v: host.decode(q, k, v, 1.0, ids=torch.zeros(2, 1, 4).int())),
        (r"ids \(2, 3, 4\)", lambda q, k, v: host.decode(q, k, v, 1.0, ids=torch.zeros(2, 3, 4).long())),
        (r"start.*\(3,\)", lambda q, k, v: host.decode(q, k, v, 1.0, start=torch.zeros(3).long())),
        (r"length.*int32", lambda q, k, v: host.decode(q, k, v, 1.0, length=torch.ones(2).int())),
        (r"length.*\(2, 4\)", lambda q, k, v: host.decode(q, k, v, 1.0, length=torch.ones(2, 4).long())),
        (r"bias.*\(2, 3, 70\)", lambda q, k, v: host.decode(q, k, v, 1.0, bias=torch.ones(2, 3, 70))),
        (r"bias.*\(2, 1, 69\)", lambda q, k, v: host.decode(q, k, v, 1.0, bias=torch.ones(2, 1, 69))),
        (r"codes.*over 9 tokens", lambda q, k, v: host.scores(q, coded(k, 4, 10, True)[0]._replace(span=9))),
        (r"p must.*70", lambda q, k, v: host.weighted_sum(torch.ones(2, 4, 1, 69), coded(v, 4)[0])),
    ],
)
def test_what_does_not_fit_is_named(message, change):
    with pytest.raises(ValueError, match=message):
        change(*make())


# ------------------------------------------------------------------------------------------------------- the compiler
ALONE = f"""
import importlib.util, sys, torch, warnings
spec = importlib.util.spec_from_file_location("host", {str(SOURCE)!r})
host = importlib.util.module_from_spec(spec)
sys.modules["host"] = host
spec.loader.exec_module(host)
torch.manual_seed(0)
"""


def alone(code, tmp_path, **environment):
    """What code prints in a process that has loaded host.py and nothing else of kvlib."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler(tmp_path):
    code = """
warnings.simplefilter("error")
print(host.available(), host.describe())
q = torch.randn(1, 1, 1, 64)
print(host.serves(q, q, q))
try:
    host.decode(q, q, q, 1.0)
except RuntimeError as error:
    print(error)
"""
    found = alone(code, tmp_path, CXX="/nonexistent", PATH="")
    reason = "torch (no C++ compiler found)"
    assert found.splitlines() == [f"False {reason}", "False", f"there is no compiled library: {reason}"]
    assert not list(tmp_path.iterdir())


def test_with_a_compiler_that_fails(tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text(
        '#!/bin/sh\n[ "$2" = --version ] && exit 0\n[ "$1" = --version ] && exit 0\necho "no such thing" >&2\nexit 3\n'
    )
    broken.chmod(0o755)
    code = """
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print(host.available(), host.available(), host.describe())
print(len(said), said[0].message)
"""
    found = alone(code, tmp_path, CXX="/bin/false").splitlines()
    assert found[0].startswith("False False torch (the compiler failed: ") and "/bin/false" in found[0]
    assert found[1].startswith("1 ") and "/bin/false" in found[1]
    found = alone(code, tmp_path, CXX=str(broken)).splitlines()
    assert found[0] == "False False torch (the compiler failed: no such thing)"
    assert found[1].startswith("1 ") and "no such thing" in found[1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 processors")
@pytest.mark.parametrize(("target", "name"), [("x86-64", "128-bit vectors"), ("haswell", "AVX2")])
def test_on_processors_with_smaller_registers(target, name, tmp_path):
    """Numbers, one OpenMP runtime for torch and the library, and a library that is compiled once."""
    if target == "haswell" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AVX2 here")
    code = """
print(host.describe())
def error(a, b):
    return float((a.double() - b).norm() / b.norm())
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for d in (16, 80, 128):
        q, k, v = torch.randn(2, 6, 2, d), torch.randn(2, 2, 1100, d).to(dtype), torch.randn(2, 2, 1100, d).to(dtype)
        k[0, 0, 7], v[0, 0, 7] = 1e-7, 3e-8  # subnormal in fp16
        s = q.double() @ k.double().repeat_interleave(3, 1).mT / 9
        want = (3 * (s / 3).tanh()).softmax(-1) @ v.double().repeat_interleave(3, 1)
        assert error(host.decode(q, k, v, 1 / 9, softcap=3.0)[0], want) < 2e-6, (dtype, d)
for bits in (2, 4, 8):
    for span, groups in ((1, 1), (1, 4), (32, 1)):
        d = 128
        shape = (2, 2, 1120, 2, groups) if span == 1 else (2, 2, 35, 2, d)
        k, v = (host.Codes(torch.randint(256, (2, 2, 1120, d * bits // 8)).byte(), torch.rand(x).half(), bits, y)
                for x, y in ((shape, span), ((2, 2, 1120, 2, groups), 1)))
        def plain(x):
            planes = torch.stack([(x.codes >> i) & (2**bits - 1) for i in range(0, 8, bits)], 3).flatten(3)
            scale, least = x.range.double().unbind(3)
            if x.span > 1:
                scale, least = (y.repeat_interleave(span, 2) for y in (scale, least))
            else:
                scale, least = (y.repeat_interleave(d // groups, 3) for y in (scale, least))
            return (planes * scale + least).repeat_interleave(3, 1)
        q = torch.randn(2, 6, 2, d)
        ids = torch.randint(1120, (2, 6, 600))
        at = ids.unsqueeze(-1).expand(-1, -1, -1, d)
        for which in (None, ids):
            keys, values = (plain(x) if which is None else plain(x).gather(2, at) for x in (k, v))
            want = (q.double() @ keys.mT / 900).softmax(-1) @ values
            assert error(host.decode_codes(q, k, v, 1 / 900, ids=which)[0], want) < 5e-6, (bits, span, groups)
import kvlib.kernels.host
from kvlib.kernels.expand import expand, expanded
from kvlib.kernels.quantise import pack
from kvlib.kernels.unpack import unpack_codes, unpacked
kvlib.kernels.host._found = host.library()
for d, bits in ((40, 8), (96, 3), (128, 4), (256, 2)):
    codes, found = torch.randint(256, (2, 2, 300, d * bits // 8)).byte(), torch.randn(2, 2, 300, 2, d).half()
    found[0, 0, 0, :, :4] = torch.tensor([3e-8, 0.0, -0.0, float("inf")])
    for x in (found, found[..., :1]):
        torch.testing.assert_close(unpack_codes(codes, x, bits), unpacked(codes, x, bits), atol=0, rtol=0, equal_nan=True)
    mask = torch.rand(2, 2, 300, d).argsort(-1) < d // 3
    for dtype in (torch.float32, torch.bfloat16):
        bitmap, kept = pack(mask.byte(), 1), torch.randn(2, 2, 300, d // 3).to(dtype)
        assert torch.equal(expand(bitmap, kept), expanded(bitmap, kept))
torch.set_num_threads(2)
torch.randn(400, 400) @ torch.randn(400, 400)
host.scores(q, k)
lines = open("/proc/self/maps").read().splitlines()
print(len({x.split()[-1] for x in lines if any(y in x for y in ("libgomp", "libiomp", "libomp"))}))
"""
    compiler = host.describe().split("(")[1].split()[0]
    found = alone(code, tmp_path, CXX=f"{compiler} -march={target}").splitlines()
    assert found[0].startswith("C++ (") and found[0].endswith(f", {name})")
    assert found[1] == "1"
    (built,) = (tmp_path / "kvlib" / "host").iterdir()
    before = built.stat().st_mtime_ns
    assert alone("print(host.describe())", tmp_path, CXX=f"{compiler} -march={target}").strip() == found[0]
    assert [x.stat().st_mtime_ns for x in (tmp_path / "kvlib" / "host").iterdir()] == [before]
