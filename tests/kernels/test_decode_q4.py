"""Codes attended where they lie: against float64 over what the codecs themselves decode."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels import code_tiles
from kvlib.kernels.decode import chunk_of
from kvlib.kernels.decode_q4 import decode_q4, split_decode_q4, tile_of
from kvlib.kernels.quantise import pack
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import Stored, Tokens
from tests.kernels.poison import DEVICE, error, poisoned

FORMS = {
    "4 bits of channels, wide values": (Uniform(4, 128, per_channel=True), Uniform(4)),
    "4 bits of channels, halves": (Uniform(4, 64, per_channel=True), Uniform(4, 64)),
    "4 bits of channels, quarters": (Uniform(4, 32, per_channel=True), Uniform(4, 32)),
    "4 bits of a segment": (Uniform(4, 0, per_channel=True), Uniform(4)),
    "4 bits of tokens": (Uniform(4), Uniform(4)),
    "8 bits of tokens": (Uniform(8), Uniform(8)),
    "8 bits of channels": (Uniform(8, 64, per_channel=True), Uniform(8, 32)),
    "2 bits of channels": (Uniform(2, 32, per_channel=True), Uniform(2, 32)),
    "2 bits of tokens": (Uniform(2), Uniform(2)),
    "groups that no tile fits": (Uniform(4, 48, per_channel=True), Uniform(8, 16)),
}


def coded(form, x):
    """Parts of x [B, H, T, d], and the values they stand for, float64."""
    batch, heads, m, _ = x.shape
    slots = torch.arange(m)
    parts = form.encode(Tokens(x, slots.view(1, 1, -1), None, {}, slots[:1]))
    stored = Stored(heads, parts, {}, slots, lambda span: torch.zeros(batch, 1, m, dtype=torch.long), lambda: slots, None)
    return parts["codes"].to(DEVICE), parts["range"].to(DEVICE), form.decode(stored).double()


def cloud(batch, heads, tokens, d):
    """Keys and values whose channels differ as real ones do."""
    return torch.randn(batch, heads, tokens, d) * (0.2 + torch.rand(d)) + torch.randn(d) * 0.3


def wider(x, garbage, dim=2):
    """The same as a view of a larger buffer, garbage before and behind it."""
    shape = list(x.shape)
    shape[dim] += 48
    room = torch.full(shape, garbage, dtype=x.dtype, device=x.device)
    room.narrow(dim, 16, x.shape[dim]).copy_(x)
    return room.narrow(dim, 16, x.shape[dim])


def plain(q, keys, values, scale, slots, softcap=0.0):
    """Float64, one list at a time; slots[b][l] lists tokens of KV heads, or of query heads."""
    q = q.double().cpu()
    group, own = q.shape[1] // keys.shape[1], q.shape[1] // len(slots[0])
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            at = torch.as_tensor(slots[b][h // own], dtype=torch.long)
            if len(at):
                s = q[b, h] @ keys[b, h // group, at].T * scale
                s = softcap * torch.tanh(s / softcap) if softcap else s
                lse[b, h], out[b, h] = s.logsumexp(-1), torch.softmax(s, -1) @ values[b, h // group, at]
    return out, lse


def check(found, out, lse, tolerance):
    assert error(found[0], out) < tolerance and found[0].isfinite().all()
    dead = lse == -math.inf
    assert (found[1].cpu()[dead] == -math.inf).all() and (found[0].cpu()[dead] == 0).all()
    assert ((found[1].cpu().double() - lse)[~dead].abs() < 5 * tolerance).all()


def case(name, batch, heads, tokens, d):
    """A form's codes of random keys and values as the kernel takes them, the span, and what they stand for."""
    key, value = FORMS[name]
    k, k_range, keys = coded(key, cloud(batch, heads, tokens, d))
    v, v_range, values = coded(value, cloud(batch, heads, tokens, d))
    return (k, k_range, v, v_range), (key.group or tokens) if key.per_channel else 1, keys, values


def run(q, pieces, scale, span, **options):
    with poisoned():
        found = split_decode_q4(q, *pieces, scale, span, **options)
    twin = decode_q4(q, *pieces, scale, span, **options)
    assert error(found[0], twin[0]) < 2e-3
    return found


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("d", "group"), [(64, 1), (128, 4)])
def test_codes_of_every_layout_and_length(name, d, group):
    """Lengths one below, at and above a tile of 16, of 32 and of several."""
    tokens = 144 if "no tile" in name else 128
    lengths = [[0, 1, 15, 16], [17, 31, 32, 33]] if d == 64 else [[63, 128]]
    length = torch.tensor(lengths, dtype=torch.int32)
    batch, heads = length.shape
    pieces, span, keys, values = case(name, batch, heads, tokens, d)
    q = torch.randn(batch, heads * group, 1, d, device=DEVICE)
    found = run(q, pieces, d**-0.5, span, length=length.to(DEVICE))
    out, lse = plain(q, keys, values, d**-0.5, [[range(n) for n in row] for row in lengths])
    check(found, out, lse, 1e-3)
    exact = decode_q4(q.double(), *pieces, d**-0.5, span, length=length.to(DEVICE))
    assert error(exact[0], out) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_channel_is_its_own(bits, dtype):
    """A query for one channel finds the only key that has it, whose value is that channel alone."""
    d, form = 64, Uniform(bits)
    codes, found, values = coded(form, torch.eye(d)[None, None] * 3)
    q = 40 * torch.eye(d, device=DEVICE, dtype=dtype).view(1, d, 1, d)
    out, lse = run(q, (codes, found, codes, found), 1.0, 1)
    torch.testing.assert_close(out[0, :, 0].cpu(), values[0, 0].float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.cpu(), torch.full((1, d, 1), 120.0), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["4 bits of channels, halves", "2 bits of tokens", "8 bits of channels"])
def test_garbage_past_the_length_never_shows(name):
    """Not what lies behind a list's last token in its own buffer, nor around the buffer."""
    pieces, span, _, _ = case(name, 1, 2, 128, 64)
    q = torch.randn(1, 8, 1, 64, device=DEVICE)
    length = torch.tensor([[70, 128]], dtype=torch.int32, device=DEVICE)
    before = run(q, pieces, 0.125, span, length=length)
    worse = [wider(x, math.nan if x.is_floating_point() else 255) for x in pieces]
    for x in worse:
        if x.shape[2] == 128:
            x[:, 0, 70:] = math.nan if x.is_floating_point() else 255
    after = run(q, worse, 0.125, span, length=length)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_tokens_before_heads_and_rows_of_queries_between_sequences():
    pieces, span, keys, values = case("4 bits of channels, halves", 2, 3, 64, 64)
    pieces = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pieces]
    q = torch.randn(6, 3, 2, 64, device=DEVICE).permute(2, 0, 1, 3)
    found = run(q, pieces, 0.125, span)
    check(found, *plain(q, keys, values, 0.125, [[range(64)] * 3] * 2), 1e-3)


@pytest.mark.parametrize("name", ["4 bits of tokens", "4 bits of channels, halves"])
@pytest.mark.parametrize("lists", [1, 2, 4])
def test_lists_for_all_for_each_head_and_for_each_query_head(name, lists):
    pieces, span, keys, values = case(name, 1, 2, 128, 64)
    q = torch.randn(1, 4, 3, 64, device=DEVICE)
    ids = torch.randint(0, 128, (1, lists, 70), device=DEVICE)
    length = torch.tensor([50], dtype=torch.int32, device=DEVICE)
    ids[:, :, 50:] = 1 << 40  # beyond the length even what is no token may stand
    found = run(q, pieces, 0.2, span, softcap=5.0, length=length, ids=ids)
    listed = [[own[:50] for own in ids[0].expand(max(lists, 2), -1).tolist()]]
    check(found, *plain(q, keys, values, 0.2, listed, softcap=5.0), 1e-3)


@pytest.mark.parametrize(("group", "n"), [(7, 1), (4, 4), (7, 3)])
def test_as_many_rows_as_a_program_takes_and_more(group, n):
    pieces, span, keys, values = case("4 bits of channels, quarters", 1, 2, 64, 64)
    q = torch.randn(1, 2 * group, n, 64, device=DEVICE)
    check(run(q, pieces, 0.125, span), *plain(q, keys, values, 0.125, [[range(64)] * 2]), 1e-3)


@pytest.mark.parametrize("d", [32, 80, 96, 256])
def test_heads_of_other_sizes(d):
    pieces, span, keys, values = case("4 bits of channels, wide values", 1, 1, 128, d)
    length = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 4, 1, d, device=DEVICE)
    check(run(q, pieces, d**-0.5, span, length=length), *plain(q, keys, values, d**-0.5, [[range(40)]]), 1e-3)


def test_keys_and_values_of_different_bits():
    k, k_range, keys = coded(Uniform(2, 32, per_channel=True), cloud(1, 2, 64, 64))
    v, v_range, values = coded(Uniform(8), cloud(1, 2, 64, 64))
    q = torch.randn(1, 2, 1, 64, device=DEVICE)
    found = run(q, (k, k_range, v, v_range), 0.125, 32)
    check(found, *plain(q, keys, values, 0.125, [[range(64)] * 2]), 1e-3)


def test_long_lists_are_split_and_merged_and_short_ones_beside_them_too():
    pieces, span, keys, values = case("4 bits of tokens", 1, 2, 3000, 64)
    assert chunk_of(1500) == 64 and tile_of(4, 64) == 32
    q = torch.randn(1, 2, 1, 64, device=DEVICE)
    for lengths in ([3000, 65], [0, 64]):
        length = torch.tensor([lengths], dtype=torch.int32, device=DEVICE)
        check(
            run(q, pieces, 0.125, span, length=length), *plain(q, keys, values, 0.125, [[range(n) for n in lengths]]), 1e-3
        )
    check(run(q, pieces, 0.125, span, most=100), *plain(q, keys, values, 0.125, [[range(100)] * 2]), 1e-3)


def test_a_row_does_not_depend_on_its_batch():
    pieces, span, _, _ = case("4 bits of channels, halves", 3, 2, 256, 64)
    q = torch.randn(3, 8, 1, 64, device=DEVICE)
    length = torch.tensor([200, 3, 129], dtype=torch.int32, device=DEVICE)
    found = run(q, pieces, 0.125, span, length=length)
    alone = run(q[2:], [x[2:] for x in pieces], 0.125, span, length=length[2:])
    assert torch.equal(found[0][2:], alone[0]) and torch.equal(found[1][2:], alone[1])


def test_nothing_is_read_where_nothing_is():
    pieces, span, _, _ = case("4 bits of tokens", 2, 2, 32, 64)
    q = torch.randn(2, 2, 1, 64, device=DEVICE)
    out, lse = run(q, [x[:, :, :0] for x in pieces], 0.125, span)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_what_does_not_fit_is_said():
    pieces, *_ = case("4 bits of tokens", 1, 1, 32, 64)
    q = torch.randn(1, 1, 1, 64, device=DEVICE)
    with pytest.raises(ValueError, match="64 channels"):
        split_decode_q4(q, pieces[0][..., :24], *pieces[1:], 0.125)
    with pytest.raises(ValueError, match="3 groups"):
        split_decode_q4(q, *pieces[:3], pieces[3].expand(-1, -1, -1, -1, 3).contiguous(), 0.125)


def test_the_operator_in_a_compiler_s_eyes():
    pieces, span, _, _ = case("4 bits of channels, halves", 1, 2, 64, 64)
    q = torch.randn(1, 4, 1, 64, device=DEVICE)
    length = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.kvlib.decode_q4.default, (q, *pieces, 0.125, span), {"length": length})


def executed(text, word):
    """What the few PTX instructions of `code_tiles` make of a register, each result as two fp16 numbers."""
    registers = {}
    results = max(int(x) for x in re.findall(r"\$(\d+)", text))

    def value(name):
        name = name.strip()
        return word if name == f"${results}" else registers[name] if name in registers else int(name, 0)

    for line in text.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        to, *of = (x.strip() for x in rest.split(","))
        x = [value(name) for name in of]
        if name == "prmt.b32":
            both = x[0] | x[1] << 32
            y = sum((both >> 8 * (x[2] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        elif name == "lop3.b32":
            assert x[3] == 0xEA  # (a & b) | c
            y = x[0] & x[1] | x[2]
        elif name == "add.rn.f16x2":
            a, b = (np.array([n & 0xFFFF, n >> 16], np.uint16).view(np.float16) for n in x)
            low, high = (a + b).view(np.uint16)
            y = int(low) | int(high) << 16
        elif name == "shr.b32":
            y = x[0] >> x[1]
        elif name == "and.b32":
            y = x[0] & x[1]
        else:
            assert name == "mov.b32"
            y = x[0]
        registers[to] = y
    return [
        np.array([y & 0xFFFF, y >> 16], np.uint16).view(np.float16) for y in (registers[f"${i}"] for i in range(results))
    ]


@settings(max_examples=60)
@given(st.sampled_from([2, 4, 8]), st.integers(0, 2**32 - 1))
def test_the_instructions_of_a_gpu_take_apart_what_was_packed(bits, word):
    """The interpreter knows no PTX: here it is carried out by hand."""
    planes = 8 // bits
    stored = [word >> 8 * i & 255 for i in range(4)]
    codes = [[byte >> bits * i & 2**bits - 1 for byte in stored] for i in range(planes)]  # by plane
    packed = pack(torch.tensor(codes, dtype=torch.uint8).flatten(), bits)
    assert packed.tolist() == stored
    for exact in (False, True):
        found = executed(code_tiles._instructions(bits, False, exact), word)
        unit = [1.0 if exact else 2.0 ** (bits * i - 24) for i in range(planes)]
        for i in range(planes):
            assert np.concatenate(found[2 * i : 2 * i + 2]).tolist() == [c * unit[i] for c in codes[i]]
    found = executed(code_tiles._instructions(bits, True, False), word)
    for i in range(2 * planes):  # a half of the register is a word of a token: the planes of its lower byte, then its upper
        at = [codes[i % planes][i // planes], codes[i % planes][2 + i // planes]]
        assert found[i].tolist() == [c * 2.0 ** (bits * (i % planes) - 24) for c in at]
