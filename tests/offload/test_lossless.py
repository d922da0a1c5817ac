"""Pages of values, smaller and the same to the bit."""

import struct
import zlib

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.offload.lossless import bound, pack, unpack
from tests.offload.streams import needs_gpu

DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
OLD = bytes.fromhex(  # what a page was made of at version 1: [2, 12, 4] bf16, the numbers from 1 to 96
    "6b76706167650d0a01000301c0000000000000009300000000000000ef73c0b002000000000000000c0000000000000004000000000000000000"
    "80004080c00020406080a0c0e000102030405060708090a0b0c0d0e0f00008101820283038404850586068707880889098a0a8b0b8c0c8d0d8e0"
    "e8f0f80004080c1014181c2024282c3034383c4044484c5054585c6064686c7074787c8028b52ffd2068550100f082000001fdfefefeffffffff"
    "000000ff000000000101010102020201000104000017b81983839c734d"
)
OLD_RAW = bytes.fromhex("6b76706167650d0a0101010004000000000000000400000000000000d3a63f720200000000000000003c00c0")


def page_of(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def normal(*shape, dtype=torch.bfloat16, spread=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    scales = torch.exp(spread * torch.randn(shape[-1:], generator=rng))
    return (torch.randn(shape, generator=rng) * scales).to(dtype)


def noise(count, dtype, seed=0):
    data = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype)


def favouring(share, count=1 << 16):
    """bf16 [count] of random bits, but for one exponent that so many have in addition."""
    rng = np.random.default_rng(0)
    tops = np.where(rng.random(count) < share, 128, rng.integers(0, 256, count))
    rotated = (tops << 8 | rng.integers(0, 256, count)).astype(np.uint16)
    return torch.from_numpy(rotated >> 1 | rotated << 15).view(torch.bfloat16)


def small(coded=True):
    """A page of either kind, 200 bytes at most."""
    page = pack(normal(2, 9, 4) if coded else noise(12, torch.float16).view(3, 4))
    assert page[11] == coded and len(page) <= 200
    return page


def head_of(x):
    return 32 + 8 * x.ndim


def check(x):
    page = pack(x)
    back = unpack(page)
    assert page.dtype == torch.uint8 and page.device.type == "cpu" and page.dim() == 1 and page.is_contiguous()
    assert (back.dtype, back.shape, back.device.type) == (x.dtype, x.shape, "cpu") and back.is_contiguous()
    assert torch.equal(back.view(DTYPES[x.dtype]), x.detach().cpu().resolve_neg().contiguous().view(DTYPES[x.dtype]))
    assert len(page) <= x.numel() * x.itemsize + head_of(x)
    assert page.untyped_storage().nbytes() == len(page)
    return page


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(65536,), (1, 65536), (65536, 1), (256, 256), (4, 128, 128)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_pattern_of_16_bits(dtype, shape, shuffled):
    bits = torch.randperm(65536, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(65536)
    check(bits.to(torch.int16).view(dtype).view(shape))


def test_every_pattern_of_16_bits_among_ordinary_values():
    """The page is coded, unlike one of all patterns in any order."""
    for dtype in (torch.bfloat16, torch.float16):
        x = normal(16, 256, 64, dtype=dtype)
        for step in range(4):
            x.view(-1)[step::16] = torch.arange(step << 14, step + 1 << 14).to(torch.int16).view(dtype)
        assert check(x)[11] == 1


def test_special_values_of_fp32():
    signs, exponents = torch.tensor([0, 1]), torch.arange(256)
    mantissas = torch.tensor([0, 1, 2, 0x155555, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF])
    bits = signs[:, None, None] << 31 | exponents[:, None] << 23 | mantissas
    specials = bits.to(torch.int32).view(torch.float32)
    check(specials)
    x = normal(8, 256, 64, dtype=torch.float32)
    x.view(-1)[: specials.numel()] = specials.view(-1)
    assert check(x)[11] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (2,), (3,), (255,), (1, 1, 1), (1, 1, 5), (7, 1), (3, 5, 7), (2, 3, 1, 33, 17), (1, 1001, 3), (2, 64, 80)],
)
def test_any_shape(dtype, shape):
    check(normal(*shape, 1, dtype=dtype).view(shape))
    check(noise(int(np.prod(shape)), dtype).view(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 256, 64), (8, 0, 64), (8, 256, 0), (2, 0, 3, 4)])
def test_nothing_is_a_page_too(dtype, shape):
    x = torch.empty(shape, dtype=dtype)
    assert len(check(x)) == head_of(x)
    assert bound(x) == 0


@settings(max_examples=200)
@given(
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 6), max_size=4),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20),
    st.integers(1, 60),
)
def test_whatever_is_packed_comes_back(dtype, shape, values, longest):
    """Few values, so that some pages are coded."""
    shape = [*shape, longest]
    bits = np.resize(np.array(values, dtype=np.uint32), int(np.prod(shape))).astype(f"u{dtype.itemsize}")
    check(torch.from_numpy(bits).view(dtype).view(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_stored_as_it_is(dtype):
    x = noise(8 * 256 * 64, dtype).view(8, 256, 64)
    page = check(x)
    assert len(page) == x.nbytes + head_of(x)
    assert page[head_of(x) :].numpy().tobytes() == x.view(torch.uint8).numpy().tobytes()


def test_what_saves_less_than_a_64th_is_not_coded():
    x = favouring(0.075)
    assert x.nbytes * 63 / 64 < bound(x) < x.nbytes * 79 / 80
    assert len(check(x)) == x.nbytes + head_of(x)
    x = favouring(0.09)
    assert x.nbytes * 49 / 50 < bound(x) < len(check(x)) < x.nbytes * 63 / 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponents_that_do_not_vary_take_nothing(dtype):
    for value in (0.0, 1.5, -1.0, float("inf"), float("nan")):
        x = torch.full((8, 256, 64), value, dtype=dtype)
        assert len(check(x)) <= x.nbytes - x.numel() + head_of(x) + 64
    x = torch.ones(8, 256, 64, dtype=dtype) * 2.0 ** torch.arange(-10, 11)[torch.arange(64) % 21]
    assert len(check(x)) <= x.nbytes - x.numel() + head_of(x) + 512


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 1.5])
def test_a_page_is_as_small_as_can_be(dtype, spread):
    """Within a tenth of a bit per value of Shannon's bound, and that does not depend on how scales differ."""
    x = normal(8, 256, 64, dtype=dtype, spread=spread)
    page = check(x)
    assert bound(x) < len(page) - head_of(x) <= bound(x) + x.numel() * 0.1 / 8
    bits = {torch.bfloat16: 10.65, torch.float16: 13.6, torch.float32: 26.65}[dtype]
    assert bits - 0.25 < bound(x) * 8 / x.numel() < bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_counts_plain_bytes_and_the_entropy_of_the_rest(dtype):
    def entropy(*counts):
        return sum(c * np.log2(sum(counts) / c) for c in counts)

    x = torch.tensor([1.0, 2.0, 2.0, 2.0], dtype=dtype)  # one channel: a mean, three alike and one below
    assert bound(x) == pytest.approx(4 * (x.itemsize - 1) + entropy(1, 3, 1) / 8)
    x = (x[:, None] * torch.tensor([1, 4, 16])).expand(2, 4, 3)  # means: the first, four steps up, a step down
    assert bound(x) == pytest.approx(24 * (x.itemsize - 1) + entropy(1, 4, 1, 18, 6) / 8)


@pytest.mark.parametrize("coded", [False, True])
def test_every_bit_flipped_is_found(coded):
    page = small(coded)
    unpack(page)
    for byte in range(len(page)):
        for bit in range(8):
            page[byte] ^= 1 << bit
            with pytest.raises(ValueError, match="must be computed again"):
                unpack(page)
            page[byte] ^= 1 << bit
    unpack(page)


@pytest.mark.parametrize("coded", [False, True])
def test_a_page_cut_off_or_too_long_is_found(coded):
    page = small(coded)
    for length in range(len(page)):
        with pytest.raises(ValueError, match=f"damaged: {length} bytes.*must be computed again"):
            unpack(page[:length])
    for extra in (1, 8, 1000):
        with pytest.raises(ValueError, match=f"{len(page) + extra} bytes, expected {len(page)}"):
            unpack(torch.cat([page, torch.zeros(extra, dtype=torch.uint8)]))


@settings(max_examples=200)
@given(st.booleans(), st.integers(0, 60), st.binary(max_size=150))
def test_any_damage_is_found(coded, first, data):
    page = small(coded)
    whole = page.clone()
    data = page_of(data)[: len(page) - first] if data else page[:0]
    page[first : first + len(data)] = data
    if torch.equal(page, whole):
        unpack(page)
    else:
        with pytest.raises(ValueError, match="must be computed again"):
            unpack(page)


def forge(page, at, form, *values):
    """The page with other numbers in its head, and the checksum that belongs to it if nothing else changed."""
    data = bytearray(page.numpy().tobytes())
    struct.pack_into(form, data, at, *values)
    struct.pack_into(
        "<I", data, 28, zlib.crc32(data[32 + 8 * data[10] :], zlib.crc32(data[:28] + data[32:][: 8 * data[10]]))
    )
    return page_of(data)


def test_what_is_wrong_is_named():
    page = pack(noise(12, torch.float16).view(3, 4))  # stored as it is: 24 bytes after a head of 48
    assert torch.equal(unpack(forge(page, 32, "<2q", 4, 3)).view(torch.int16), unpack(page).view(torch.int16).view(4, 3))
    for at, form, values, message in [
        (0, "<8s", [b"\x89PNG\r\n\x1a\n"], "not a page: it begins with b'.x89PNG"),
        (8, "<B", [2], "page of version 2, only 1 can be read"),
        (8, "<B", [0], "page of version 0, only 1 can be read"),
        (9, "<B", [3], "damaged: dtype 3 and mode 0"),
        (9, "<B", [2], r"damaged: 24 bytes of values are not \[3, 4\] of torch.float32"),
        (10, "<B", [255], "damaged: 72 bytes, expected 2096"),
        (10, "<B", [1], "damaged: 72 bytes, expected 64"),
        (11, "<B", [2], "damaged: dtype 1 and mode 2"),
        (11, "<B", [1], "damaged: its exponents cannot be decoded to 16 bytes"),
        (12, "<Q", [1 << 60], "damaged: 1152921504606846976 bytes of values"),
        (12, "<Qi", [1 << 60, 24], "damaged: 1152921504606846976 bytes of values"),
        (20, "<Q", [1 << 63], "damaged: 72 bytes, expected 9223372036854775856"),
        (32, "<2q", [-3, -4], "damaged: 24 bytes of values"),
        (32, "<2q", [1 << 62, 1 << 62], "damaged: 24 bytes of values"),
        (32, "<2q", [3, 5], "damaged: 24 bytes of values"),
    ]:
        with pytest.raises(ValueError, match=message + ".*must be computed again"):
            unpack(forge(page, at, form, *values))
    huge = forge(forge(page, 32, "<2q", 1 << 31, 1 << 28), 12, "<Q", 1 << 60)
    for mode in (0, 1):
        with pytest.raises(ValueError, match="damaged: a body of 24 bytes does not hold"):
            unpack(forge(huge, 11, "<B", mode))
    none = forge(forge(page, 32, "<2q", 0, 4), 12, "<Q", 0)
    with pytest.raises(ValueError, match="damaged: a body of 24 bytes does not hold"):
        unpack(none)
    with pytest.raises(ValueError, match=r"damaged: checksum [0-9a-f]{8}, expected [0-9a-f]{8}"):
        unpack(torch.cat([page[:-1], page[-1:] ^ 1]))


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 0, 4)])
def test_a_bomb_is_not_set_off(shape):
    """Room is made for as many exponents as the shape has, whatever the coder's own frame promises."""
    plain = bytes(int(np.prod(shape)))
    vast = zstandard.ZstdCompressor().compressobj(size=1 << 40)
    for frame in (
        vast.compress(bytes(1000)) + vast.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
        zstandard.ZstdCompressor().compress(bytes(1 << 20)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(80)),
        zstandard.ZstdCompressor().compress(bytes(80)) + b"more",
        b"\xff" * 40,
    ):
        head = struct.pack("<8s4BQQI3q", b"kvpage\r\n", 1, 0, 3, 1, 2 * len(plain), len(plain) + len(frame), 0, *shape)
        with pytest.raises(ValueError, match="damaged: its exponents cannot be decoded"):
            unpack(page_of(head + plain + frame))


def test_pages_of_version_1_can_be_read():
    back = unpack(page_of(OLD))
    assert back.dtype == torch.bfloat16 and torch.equal(back, torch.arange(1, 97).view(2, 12, 4).bfloat16())
    assert torch.equal(unpack(page_of(OLD_RAW)), torch.tensor([1.0, -2.0]).half())
    assert pack(torch.tensor([1.0, -2.0]).half()).numpy().tobytes() == OLD_RAW


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(dtype):
    x = normal(4, 6, 32, 16, dtype=dtype)
    for view in (
        x.transpose(1, 2),
        x[:, ::2, 3:],
        x[..., 5],
        x[:1].expand(3, -1, -1, -1),
        x.permute(3, 2, 1, 0),
        x.flip(2),
    ):
        check(view)
    check(torch._neg_view(x))
    check(x.requires_grad_())
    page = pack(x)
    assert torch.equal(unpack(torch.stack([page, page], 1)[:, 1]), x)


@pytest.mark.parametrize("coded", [False, True])
def test_modes_mix(coded):
    with torch.inference_mode():
        x = normal(2, 64, 16) if coded else noise(2048, torch.bfloat16).view(2, 64, 16)
        page = pack(x)
        back = unpack(page)
    assert x.is_inference() and not page.is_inference() and not back.is_inference()
    bits, whole = x.view(torch.int16).clone(), page.clone()
    assert torch.equal(back.view(torch.int16), bits)
    back.zero_()  # a tensor of its own
    x.view(torch.int16).numpy().fill(7)
    assert torch.equal(page, whole) and torch.equal(unpack(page).view(torch.int16), bits)
    with torch.inference_mode():
        assert not unpack(page.clone()).is_inference()


def test_what_is_no_tensor_of_values_or_no_page_is_refused():
    for dtype in (torch.int8, torch.int16, torch.float64, torch.complex64, torch.float8_e4m3fn):
        for call in (pack, bound):
            with pytest.raises(ValueError, match=f"cannot pack {dtype}, only torch.bfloat16, torch.float16, torch.float32"):
                call(torch.zeros(3, dtype=dtype))
    page = small()
    for wrong in (page[None], page.to(torch.int8), page.float(), page.to("meta")):
        with pytest.raises(ValueError, match="a page is uint8"):
            unpack(wrong)


@needs_gpu
def test_from_a_gpu():
    for dtype in DTYPES:
        x = normal(8, 256, 64, dtype=dtype)
        assert torch.equal(pack(x.cuda().transpose(0, 1)), pack(x.transpose(0, 1)))
        check(x.cuda())
