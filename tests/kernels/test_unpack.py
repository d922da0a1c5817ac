"""Vectors of the kernel and of C++ are those of the torch function bit for bit, and those of plain arithmetic."""

import math

import pytest
import torch

from kvlib.kernels import host
from kvlib.kernels.pack import pack_codes
from kvlib.kernels.quantise import pack
from kvlib.kernels.ran import Noting
from kvlib.kernels.unpack import launched, unpack_codes, unpacked
from tests.kernels.poison import DEVICE, poisoned

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_width = pytest.mark.parametrize("bits", BITS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def made(bits, tokens, d, rows=None, groups=1, parts=2, batch=1):
    """Random codes uint8 [B, 2, m, d], packed ones, and ranges of so many rows (None: one per token)."""
    plain = torch.randint(0, 2**bits, (batch, 2, tokens, d), dtype=torch.uint8)
    found = torch.randn(batch, 2, tokens if rows is None else rows, parts, groups).half()
    return plain.to(DEVICE), pack(plain, bits).to(DEVICE), found.to(DEVICE)


def same(a, b):
    """Bit for bit, but for what NaN carries."""
    assert a.shape == b.shape and a.dtype == b.dtype
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


def check(codes, found, bits, span=1, upper=None, levels=None, dtype=torch.float32):
    """The kernel's vectors, after comparing them with those of the CPU."""
    with poisoned():
        x = launched(codes, found, bits, span, upper, levels, dtype).cpu()
    codes, found, upper, levels = (None if given is None else given.cpu() for given in (codes, found, upper, levels))
    assert x.is_contiguous() and same(x, unpacked(codes, found, bits, span, upper, levels, dtype))
    with poisoned(), Noting(set()) as notes:
        assert same(x, unpack_codes(codes, found, bits, span, upper, levels, dtype))
    assert notes == {("codes", host.describe() if host.available() else "torch")}
    return x


def plainly(plain, found, levels=None):
    """Values of codes in float64, rounded to fp32, which is where a kernel's one rounding is."""
    _, _, m, d = plain.shape
    scale, *least = (
        part.double().cpu().repeat_interleave(m // found.shape[2], 2).repeat_interleave(d // found.shape[4], 3)
        for part in found.unbind(3)
    )
    x = plain.double().cpu() if levels is None else levels.double().cpu()[plain.long().cpu()]
    return (x * scale + sum(least)).float()


@every_width
@every_dtype
def test_ranges_of_a_token(bits, dtype):
    for groups in (1, 4):
        plain, codes, found = made(bits, 7, 64, groups=groups)
        x = check(codes, found, bits, dtype=dtype)
        assert torch.equal(x, plainly(plain, found).to(dtype))
        c = 17 if bits == 3 else 13  # and one by hand, from its byte
        code = int(plain[0, 1, 6, c])
        size = 64 * bits // 8
        if bits == 3:  # 16 bytes of two bits, then 8 of one
            held = codes[0, 1, 6].tolist()
            assert code == (held[c % 16] >> (c // 16 * 2) & 3) + 4 * (held[16 + c % 8] >> (c // 8) & 1)
        else:
            assert code == codes[0, 1, 6, c % size].item() >> (c // size * bits) & (2**bits - 1)
        scale, least = found[0, 1, 6, :, c * groups // 64].tolist()
        assert x[0, 1, 6, c].item() == torch.tensor(code * scale + least, dtype=torch.float64).float().to(dtype).item()


@every_width
@every_dtype
@pytest.mark.parametrize(("tokens", "span"), [(5, 1), (96, 32), (66, 33), (70, 70), (70, 0)])
def test_ranges_of_a_channel(tokens, span, bits, dtype):
    plain, codes, found = made(bits, tokens, 32, rows=tokens // span if span else 1, groups=32)
    x = check(codes, found, bits, span or 1, dtype=dtype)  # one row of ranges is all tokens', whatever the span
    assert torch.equal(x, plainly(plain, found).to(dtype))


@every_width
def test_blocks_of_tokens_and_channels(bits):
    plain, codes, found = made(bits, 24, 32, rows=3, groups=4)
    assert torch.equal(check(codes, found, bits, 8), plainly(plain, found))


@every_width
@every_dtype
def test_scales_only_and_levels(bits, dtype):
    levels = torch.randn(2**bits, device=DEVICE)
    for groups in (1, 4):
        plain, codes, found = made(bits, 9, 32, groups=groups, parts=1)
        assert torch.equal(check(codes, found, bits, dtype=dtype), plainly(plain, found).to(dtype))
        assert torch.equal(check(codes, found, bits, levels=levels, dtype=dtype), plainly(plain, found, levels).to(dtype))


@every_width
def test_levels_and_a_least_value(bits):
    levels = torch.randn(2**bits, device=DEVICE)
    plain, codes, found = made(bits, 9, 32)
    for x in (launched(codes, found, bits, levels=levels), unpack_codes(codes, found, bits, levels=levels)):
        torch.testing.assert_close(x.cpu(), plainly(plain, found, levels), rtol=1e-6, atol=1e-6)  # fused or not


@every_dtype
@pytest.mark.parametrize(("bits", "more"), [(4, 4), (2, 4), (4, 2), (3, 2), (2, 3), (3, 3), (4, 1)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_bits_above_lie_elsewhere(per_channel, bits, more, dtype):
    plain, _, found = made(8, 8, 32, rows=2 if per_channel else None, groups=32 if per_channel else 1)
    plain = plain >> (8 - bits - more)
    codes, upper = pack(plain & (2**bits - 1), bits), pack(plain >> bits, more)
    x = check(codes, found, bits, 4 if per_channel else 1, upper, dtype=dtype)
    assert torch.equal(x, plainly(plain, found).to(dtype))


def test_levels_of_both_planes():
    plain, _, found = made(8, 8, 32, parts=1)
    plain = plain >> 2
    levels = torch.randn(64, device=DEVICE)
    x = check(pack(plain & 15, 4), found, 4, upper=pack(plain >> 4, 2), levels=levels)
    assert torch.equal(x, plainly(plain, found, levels))


@pytest.mark.parametrize("d", [32, 40, 96, 128, 256])
def test_any_number_of_tokens_and_width(d):
    tile = 4096 // {40: 64, 96: 128}.get(d, d)
    for i, tokens in enumerate((1, tile - 1, tile, tile + 1)):
        plain, codes, found = made(BITS[i], tokens, d)
        assert torch.equal(check(codes, found, BITS[i]), plainly(plain, found))
    plain, codes, found = made(4, tile + 1, d, rows=1, groups=d)
    assert torch.equal(check(codes, found, 4), plainly(plain, found))


@every_width
def test_no_tokens_and_no_rows(bits):
    for shape in ((2, 3, 0), (0, 3, 8)):
        codes = torch.empty(*shape, 16 * bits // 8, dtype=torch.uint8, device=DEVICE)
        for rows, groups, span in ((shape[2], 1, 1), (shape[2] // 4, 16, 4), (1, 16, 1)):
            found = torch.empty(*shape[:2], rows, 2, groups, dtype=torch.float16, device=DEVICE)
            for x in (launched(codes, found, bits, span), unpack_codes(codes, found, bits, span)):
                assert x.shape == (*shape, 16) and x.dtype == torch.float32


@every_width
def test_any_strides(bits):
    """Tokens, heads and sequences in any order, and an odd number of bytes between them."""
    plain = torch.randint(0, 2**bits, (5, 40, 3, 40), dtype=torch.uint8, device=DEVICE)
    pool = torch.full((5, 40, 3, 40 * bits // 8 + 8), 255, dtype=torch.uint8, device=DEVICE)
    pool[..., 3:-5] = pack(plain, bits)
    ranges = torch.full((7, 5, 3, 40, 9), math.nan, dtype=torch.float16, device=DEVICE)
    ranges[:2, ..., 1:6] = torch.randn(2, 5, 3, 40, 5).half()
    codes = pool[1:3, 4:37, :, 3:-5].transpose(1, 2)
    found = ranges[:2, 1:3, :, 4:37, 1:6].permute(1, 2, 3, 0, 4)
    x = check(codes, found, bits)
    assert torch.equal(x, plainly(plain[1:3, 4:37].transpose(1, 2), found))
    for many in (codes[:1].expand(4, -1, -1, -1), codes[:, :, ::2]):
        assert not many.is_contiguous()
        check(many, found[:1].expand(4, -1, -1, -1, -1) if len(many) == 4 else found[:, :, ::2], bits)


@pytest.mark.parametrize(("bits", "d", "bytes_"), [(4, 128, 68), (2, 128, 36), (3, 40, 20), (8, 40, 46)])
def test_codes_and_ranges_of_a_token_are_one_row_of_bytes(bits, d, bytes_):
    plain, codes, found = made(bits, 37, d)
    rows = torch.full((1, 2, 37, bytes_), 255, dtype=torch.uint8, device=DEVICE)  # fp16 of such bytes are NaN
    rows[..., :4] = found.flatten(3).view(torch.uint8)
    rows[..., 4 : 4 + codes.shape[3]] = codes
    ranges = rows[..., :4].view(torch.float16).unsqueeze(-1)
    assert torch.equal(check(rows[..., 4 : 4 + codes.shape[3]], ranges, bits), plainly(plain, found))


def test_rows_of_bytes_with_an_upper_plane_and_scales_for_channels():
    plain, _, found = made(8, 37, 32, groups=4, batch=2)
    rows = torch.full((2, 2, 37, 50), 255, dtype=torch.uint8, device=DEVICE)
    low, high, ranges = rows[..., :16], rows[..., 16:32], rows[..., 34:50].view(torch.float16).unflatten(-1, (2, 4))
    low.copy_(pack(plain & 15, 4)), high.copy_(pack(plain >> 4, 4)), ranges.copy_(found)
    assert torch.equal(check(low, ranges, 4, upper=high), plainly(plain, found))


@pytest.mark.parametrize("d", [32, 40])
def test_nothing_is_written_beyond_the_last_vector(d, monkeypatch):
    plain, codes, found = made(4, 5, d)
    pool = torch.full((2 * 5 * d + 64,), 7.0, device=DEVICE)
    monkeypatch.setattr("kvlib.kernels.unpack._empty", lambda *given: pool[:-64].view(1, 2, 5, d))
    assert torch.equal(launched(codes, found, 4).cpu(), plainly(plain, found)) and (pool[-64:] == 7).all()


def test_values_are_rounded_to_even():
    plain = torch.arange(16, dtype=torch.uint8, device=DEVICE).view(1, 1, 1, 16)
    for dtype, least in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        found = torch.tensor([1.0, least], dtype=torch.float16, device=DEVICE).view(1, 1, 1, 2, 1)
        x = check(pack(plain, 4), found, 4, dtype=dtype)
        assert x.flatten().tolist() == [2 * round((least + i) / 2) for i in range(16)]  # a step is two there


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_width
@every_dtype
def test_ranges_that_are_not_numbers(bits, dtype):
    _, codes, found = made(bits, 8, 32, groups=2)
    for i, pair in enumerate(
        ((math.nan, 0), (0, math.nan), (math.inf, 0), (1, -math.inf), (65504, 0), (0, -0.0), (6e-8, 0))
    ):
        found[0, 0, i, :, 1] = torch.tensor(pair, dtype=torch.float16, device=DEVICE)
    x = check(codes, found, bits, dtype=dtype)
    assert x[0, 0, :2, 16:].isnan().all() and x[0, 0, :, :16].isfinite().all()  # what has no range spoils no other
    assert (x[0, 0, 3, 16:] == -math.inf).all() and (x[0, 0, 5, 16:] == 0).all()


@every_width
@every_dtype
@pytest.mark.parametrize(("group", "per_channel"), [(0, False), (8, False), (0, True), (8, True)])
def test_what_was_packed_comes_back_within_half_a_step(group, per_channel, bits, dtype):
    x = torch.randn(2, 2, 24, 32).to(dtype).to(DEVICE)
    codes, found = pack_codes(x, bits, group, per_channel)
    span = group or 24 if per_channel else 1
    back = launched(codes, found, bits, span)
    scale, least = (
        found.double().repeat_interleave(24 // found.shape[2], 2).repeat_interleave(32 // found.shape[4], 4).unbind(3)
    )
    rounding = (least.abs() + 2**bits * scale) * 2.0**-11  # of the ranges, to fp16
    assert ((back.double() - x.double()).abs() <= scale / 2 + rounding + 1e-6).all()
    assert (back.double() - x.double()).abs().max() > scale.min() / 8
    assert same(back.to(dtype), launched(codes, found, bits, span, dtype=dtype))


def test_what_is_not_whole_is_refused():
    _, codes, found = made(4, 12, 32)
    wide = codes.new_zeros(1, 2, 12, 8)
    for arguments, said in (
        ((codes, found[:, :, :5], 4, 2), "whole groups"),
        ((codes, found[:, :, :6], 4), "whole groups"),
        ((codes, found.expand(-1, -1, -1, -1, 5), 4), "whole groups"),
        ((codes[..., :10], found, 3), "whole groups"),
        ((codes, found, 4, 1, wide[..., :5]), "bits"),
        ((codes, found, 4, 1, torch.cat([codes, wide], 3)), "more than 8"),
        ((torch.cat([codes, codes], 3), found, 8, 1, wide[..., :4]), "more than 8"),
    ):
        for function in (launched, unpacked, unpack_codes):
            with pytest.raises(ValueError, match=said):
                function(*arguments)


def test_the_operator_is_sound():
    plain, codes, found = made(4, 16, 32)
    channels = torch.randn(1, 2, 2, 2, 32, device=DEVICE).half()
    levels = torch.randn(16, device=DEVICE)
    for arguments, options in (
        ((codes, found, 4), {}),
        ((codes, channels, 4, 8), {"dtype": torch.bfloat16}),
        ((pack(plain & 7, 3), found, 3), {"dtype": torch.float16}),
        ((codes, found[:, :, :, :1], 4), {"levels": levels}),
        ((codes, found, 4), {"upper": codes}),
    ):
        torch.library.opcheck(unpack_codes, arguments, options)
        whole = launched(*arguments, **options)
        assert same(unpack_codes(*arguments, **options).cpu(), whole.cpu())


def test_without_a_library_torch_does_it(monkeypatch):
    monkeypatch.setattr(host, "_found", host.Library("torch (no C++ compiler found)"))
    _, codes, found = made(4, 5, 32)
    with Noting(set()) as notes:
        x = unpack_codes(codes.cpu(), found.cpu(), 4)
    assert same(x, unpacked(codes.cpu(), found.cpu(), 4)) and notes == {("codes", "torch")}
