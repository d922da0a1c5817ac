"""Vectors of the kernel and of C++ are those of the torch function bit for bit, and those made entry by entry."""

import math

import pytest
import torch

from kvlib.kernels import host
from kvlib.kernels.expand import expand, expanded, launched
from kvlib.kernels.quantise import pack
from kvlib.kernels.ran import Noting
from tests.kernels.poison import DEVICE, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def made(tokens, d, k, dtype=torch.float32, batch=1, heads=2):
    """Masks with k entries of d, their bitmaps, and values."""
    mask = torch.rand(batch, heads, tokens, d).argsort(-1) < k
    kept = torch.randn(batch, heads, tokens, k).to(dtype)
    return mask, pack(mask.byte(), 1).to(DEVICE), kept.to(DEVICE)


def same(a, b):
    """Bit for bit."""
    assert a.shape == b.shape and a.dtype == b.dtype
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(whole), b.view(whole))


def plainly(mask, kept):
    """One vector, a list of floats, of lists."""
    values = iter(kept)
    return [next(values, 0.0) if bit else 0.0 for bit in mask]


def check(mask, bitmap, kept):
    """The kernel's vectors, after comparing them with those of the CPU and with a few made by hand."""
    with poisoned():
        x = launched(bitmap, kept).cpu()
    bitmap, kept = bitmap.cpu(), kept.cpu()
    assert x.is_contiguous() and same(x, expanded(bitmap, kept))
    with poisoned(), Noting(set()) as notes:
        assert same(x, expand(bitmap, kept))
    assert notes == {("codes", host.describe() if host.available() else "torch")}
    for b, h, t in {(0, 0, 0), (x.shape[0] - 1, x.shape[1] - 1, x.shape[2] - 1), (0, x.shape[1] - 1, x.shape[2] // 2)}:
        assert x[b, h, t].tolist() == plainly(mask[b, h, t].tolist(), kept[b, h, t].tolist())
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 32, 40, 96, 128, 256])
def test_any_number_of_tokens_and_width(d, dtype):
    tile = 2048 // {40: 64, 96: 128}.get(d, d)
    for tokens in (1, tile - 1, tile, tile + 1):
        check(*made(tokens, d, max(1, d * 3 // 10), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 63, 64])
def test_any_number_of_entries(k, dtype):
    mask, bitmap, kept = made(3, 64, k, dtype, batch=2)
    x = check(mask, bitmap, kept)
    assert torch.equal(x[mask], kept.cpu().flatten()) and not x[~mask].any()


@pytest.mark.parametrize("k", [1, 5])
def test_known_bitmaps(k):
    """Bit i of byte j is channel j + 2 i."""
    bitmap = torch.tensor([[0b10000001, 0b00000000], [0b00100010, 0b01000101]], dtype=torch.uint8, device=DEVICE)
    kept = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]], device=DEVICE)[:, :k]
    x = launched(bitmap[None, None], kept[None, None])[0, 0].tolist()
    for found, places, values in zip(x, ([0, 14], [1, 2, 5, 10, 13]), ([1, 2], [6, 7, 8, 9, 10]), strict=True):
        want = dict(zip(places, values[:k], strict=False))
        assert found == [want.get(c, 0.0) for c in range(16)]


def test_no_tokens_and_no_rows():
    for shape in ((2, 3, 0), (0, 3, 8)):
        bitmap, kept = torch.empty(*shape, 4, dtype=torch.uint8, device=DEVICE), torch.empty(*shape, 9, device=DEVICE)
        for x in (launched(bitmap, kept), expand(bitmap, kept)):
            assert x.shape == (*shape, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Tokens, heads and sequences in any order, and bitmaps and values in pools with other things between."""
    mask, bits, values = made(33, 40, 11, dtype, batch=2, heads=3)
    rows = torch.full((5, 40, 3, 13), 255, dtype=torch.uint8, device=DEVICE)
    pool = torch.full((4, 3, 40, 14), math.nan, dtype=dtype, device=DEVICE)
    bitmap, kept = rows[1:3, 4:37, :, 3:8].transpose(1, 2), pool[2:, :, 5:38, 2:13]
    bitmap.copy_(bits), kept.copy_(values)
    check(mask, bitmap, kept)
    check(mask[:, :, ::3], bitmap[:, :, ::3], kept[:, :, ::3])
    check(mask[:1].expand(2, -1, -1, -1), bitmap[:1].expand(2, -1, -1, -1), kept[:1].expand(2, -1, -1, -1))


def test_a_bitmap_and_values_are_one_row_of_bytes():
    mask, bits, values = made(37, 128, 39, torch.bfloat16)
    rows = torch.full((1, 2, 37, 94), 255, dtype=torch.uint8, device=DEVICE)
    rows[..., :16], rows[..., 16:] = bits, values.view(torch.uint8)
    check(mask, rows[..., :16], rows[..., 16:].view(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_where_it_is(dtype):
    mask, bitmap, kept = made(4, 32, 8, dtype, heads=1)
    kept[0, 0, 1, 3], kept[0, 0, 2, 0], kept[0, 0, 3, 7] = math.nan, math.inf, -0.0
    x = launched(bitmap, kept).cpu()
    assert same(x, expanded(bitmap.cpu(), kept.cpu()))
    assert same(x[mask], kept.cpu().flatten()) and x.isnan().sum() == 1 and x.isinf().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 8])
def test_a_bitmap_of_too_many_bits_reads_no_other_values(k, dtype):
    """What lies beyond the values is NaN; a bitmap's first k bits are served."""
    pool = torch.full((1, 2, 5, k + 40), math.nan, dtype=dtype, device=DEVICE)
    kept = pool[..., :k]
    kept.copy_(torch.randn(1, 2, 5, k))
    for bitmap in (
        torch.full((1, 2, 5, 5), 255, dtype=torch.uint8, device=DEVICE),
        torch.randint(0, 256, (1, 2, 5, 5), dtype=torch.uint8).to(DEVICE),
    ):
        with poisoned():
            x = launched(bitmap, kept).cpu()
        for h, t in ((0, 0), (1, 4)):
            mask = [bitmap[0, h, t, c % 5].item() >> (c // 5) & 1 for c in range(40)]
            assert x[0, h, t].tolist() == plainly(mask, kept[0, h, t].tolist())
        assert x.isfinite().all()


@pytest.mark.parametrize("d", [32, 40])
def test_nothing_is_written_beyond_the_last_vector(d, monkeypatch):
    mask, bitmap, kept = made(5, d, 9)
    pool = torch.full((2 * 5 * d + 64,), 7.0, device=DEVICE)
    monkeypatch.setattr("kvlib.kernels.expand._empty", lambda *given: pool[:-64].view(1, 2, 5, d))
    assert torch.equal(launched(bitmap, kept).cpu()[mask], kept.cpu().flatten()) and (pool[-64:] == 7).all()


def test_a_bitmap_of_too_few_bits_leaves_values_out():
    mask, bitmap, kept = made(5, 64, 7)
    with poisoned():
        x = launched(bitmap & 0x0F, kept).cpu()
    mask[..., 32:] = False
    assert same(x, expanded(bitmap.cpu() & 0x0F, kept.cpu()))
    assert x[0, 1, 4].tolist() == plainly(mask[0, 1, 4].tolist(), kept[0, 1, 4].tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_is_sound(dtype):
    _, bitmap, kept = made(9, 64, 20, dtype)
    torch.library.opcheck(expand, (bitmap, kept))
    assert same(expand(bitmap, kept).cpu(), launched(bitmap, kept).cpu())
