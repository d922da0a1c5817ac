"""Codes are packed as written down, in range whatever comes in, and as near as the stored scale allows."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvlib.kernels.quantise import BITS, decode, encode, folded, pack, ranges, unpack

every_width = pytest.mark.parametrize("bits", BITS)
widths = st.sampled_from(BITS)


def whole(bits):
    """Codes that fill bytes."""
    return 8 if bits == 3 else 8 // bits


def random_codes(seed, bits, *shape):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def packed_by_hand(codes, bits):
    """The bytes of one vector of codes, as the module describes them, in Python's integers."""
    if bits == 3:
        return packed_by_hand([c % 4 for c in codes], 2) + packed_by_hand([c // 4 for c in codes], 1)
    size = len(codes) * bits // 8
    return [sum(codes[j + i * size] * 2 ** (bits * i) for i in range(8 // bits)) for j in range(size)]


# ------------------------------------------------------------------------------------------------------------- packing
@given(widths, st.integers(1, 9), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 10**6))
def test_packed_codes_come_back_from_as_many_bytes_as_their_bits_need(bits, n, lead, seed):
    d = n * whole(bits)
    codes = random_codes(seed, bits, *lead, d)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, d * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    assert unpack(packed, bits).dtype == torch.uint8


@given(widths, st.integers(1, 5), st.integers(0, 10**6))
def test_bytes_are_laid_out_in_planes(bits, n, seed):
    codes = random_codes(seed, bits, 3, n * whole(bits))
    assert pack(codes, bits).tolist() == [packed_by_hand(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize(
    ("bits", "codes", "found"),
    [
        (1, [1, 0, 0, 1, 0, 0, 0, 1], [0b10001001]),
        (2, [0, 1, 2, 3], [0b11100100]),  # 228, KIVI's example
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0 + 4 * 2 + 16 * 3 + 64 * 1, 1 + 4 * 3 + 16 * 2 + 64 * 0]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b10001000, 0b11011101, 0b11110000]),  # low bits 0 2 0 2 and 1 3 1 3; high bits
        (4, [1, 2], [0x21]),
        (4, [1, 2, 3, 4], [0x31, 0x42]),
        (8, [7, 255], [7, 255]),
    ],
)
def test_known_bytes(bits, codes, found):
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == found


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_byte_is_some_codes(bits):
    every = torch.arange(256, dtype=torch.uint8).unsqueeze(-1)
    codes = unpack(every, bits)
    assert int(codes.max()) == 2**bits - 1
    assert torch.equal(pack(codes, bits), every)


@every_width
def test_a_vector_is_packed_alone_and_from_any_layout_in_memory(bits):
    codes = random_codes(3, bits, 4, 2 * whole(bits), 5)
    turned = codes.transpose(1, 2)
    packed = pack(turned, bits)
    assert torch.equal(packed, pack(turned.contiguous(), bits))
    assert torch.equal(packed[2, 3], pack(turned[2, 3], bits))
    assert torch.equal(unpack(packed[1:, ::2], bits), turned[1:, ::2])


def test_folding_cuts_one_axis_into_pieces():
    x = torch.arange(24).view(2, 6, 2)
    assert torch.equal(folded(x, 1, 3), torch.stack([x[:, :3], x[:, 3:]], 1))
    assert torch.equal(folded(x, 1, 3).flatten(1, 2), x)


# ------------------------------------------------------------------------------------------------------------ ranges
def coded(x, bits, dim=-1):
    """Codes and values of x, and the ranges."""
    scale, least = ranges(x, bits, dim)
    codes = encode(x, bits, scale, least)
    return codes, decode(codes, scale, least), scale, least


def bound(x, bits, scale, dim=-1):
    """What x may be off: half a step, or where that is more what fp16 makes of the least value and of all steps together;
    below 2^-14 fp16 has steps of 2^-24.  Then fp32's own rounding."""
    x = x.double()
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = 2**bits - 1

    def rounding(y):
        return (y.abs() * 2.0**-11).clamp(min=2.0**-25)

    ends = rounding(least) + levels * rounding((most - least) / levels)
    return torch.maximum(scale.double() / 2, ends) + 1e-6 * torch.maximum(least.abs(), most.abs())


def check_codes(x, bits, dim=-1):
    codes, found, scale, least = coded(x, bits, dim)
    assert scale.dtype == least.dtype == torch.float16
    assert scale.shape == least.shape == x.amin(dim, keepdim=True).shape
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert found.dtype == torch.float32
    error = (found.double() - x.double()).abs()
    assert (error <= bound(x, bits, scale, dim)).all()


@given(
    widths,
    st.sampled_from([(5, 1), (4, 2), (3, 64), (2, 3, 4, 8)]),
    st.floats(-1000, 1000),
    st.floats(-7, 4),
    st.integers(0, 2),
    st.integers(0, 10**6),
)
def test_a_value_is_off_by_half_a_step_and_what_fp16_rounds(bits, shape, offset, magnitude, dim, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10**magnitude + offset
    check_codes(x, bits, min(dim, x.dim() - 1))


@every_width
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_groups_lie_along_the_axis_named(bits, dim):
    x = torch.randn(3, 4, 5)
    scale, least = ranges(x, bits, dim)
    assert torch.equal(least, x.amin(dim, keepdim=True).half())
    torch.testing.assert_close(
        scale.float() * (2**bits - 1), x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_of_a_grid_are_exact(bits):
    """Both ends of every group occur, and steps that fp16 has."""
    codes = random_codes(0, bits, 6, 32)
    codes[:, 3], codes[:, 5] = 0, 2**bits - 1
    scale, least = torch.tensor([0.5, 1, 0.25, 2, 1, 0.125])[:, None], torch.tensor([0.0, -3, 7, 100, 0.5, -8])[:, None]
    x = codes * scale + least
    found, values, s, m = coded(x, bits)
    assert torch.equal(s.float(), scale)
    assert torch.equal(m.float(), least)
    assert torch.equal(found, codes)
    assert torch.equal(values, x)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_halves_are_rounded_to_even(bits):
    most = 2**bits - 1
    x = torch.tensor([0.0, *(i + 0.5 for i in range(most)), most])
    codes, _, scale, least = coded(x, bits)
    assert (scale.item(), least.item()) == (1, 0)
    assert codes.tolist() == [0, *(i + i % 2 for i in range(most)), most]


@given(widths, st.floats(-4, 4), st.floats(-3, 3), st.integers(0, 10**6))
def test_what_was_decoded_has_the_same_codes(bits, magnitude, offset, seed):
    """Where fp16 holds the least value and the step well enough for the ends to have the first and the last code."""
    x = (torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) + offset) * 10**magnitude
    codes, found, scale, least = coded(x, bits)
    assume(bool(((least.abs().float() * 2**-11 < scale.float() / 4) & (scale >= 2**-14)).all()))
    again, twice, s, m = coded(found, bits)
    assert torch.equal(again, codes)
    assert torch.equal(s, scale)
    assert torch.equal(m, least)
    assert torch.equal(twice, found)


# -------------------------------------------------------------------------------------------------------- hostile input
@every_width
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3333, 1e-4, 65504.0, -65504.0, 1e-9])
def test_a_constant_group_is_exact_to_fp16(bits, value):
    x = torch.full((3, 16), value)
    codes, found, scale, _ = coded(x, bits)
    assert (codes == 0).all()
    assert (scale == 0).all()
    assert torch.equal(found, x.half().float())


@every_width
def test_a_group_of_one_is_exact_to_fp16(bits):
    x = torch.randn(50, 1)
    assert torch.equal(coded(x, bits)[1], x.half().float())


@every_width
@pytest.mark.parametrize(
    "x",
    [
        1e4 + torch.linspace(0, 1e-2, 16),
        -3e4 + torch.linspace(0, 1, 16),
        1 + torch.linspace(0, 1e-6, 16),
        torch.linspace(0, 3e-8, 16),
        torch.linspace(-1e-7, 1e-7, 16),
        torch.tensor([0.0] * 15 + [1e-12]),
        torch.tensor([0.0] * 15 + [6e4]),
        torch.tensor([-6e4] + [0.0] * 14 + [6e4]) / 2,
    ],
)
def test_a_tiny_range_beside_a_huge_offset_stays_in_range(bits, x):
    check_codes(x, bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_beyond_fp16_saturate_to_finite_ones(bits):
    for x in (torch.full((16,), 1e6), torch.linspace(7e4, 8e4, 16), torch.linspace(-1e5, 5e4, 16), torch.full((8,), -1e30)):
        codes, found, scale, least = coded(x, bits)
        assert int(codes.max()) < 2**bits
        assert found.isfinite().all()
        assert scale.isfinite().all() and least.isfinite().all()
        assert least.float().item() == max(-65504.0, min(65504.0, x.half().clamp(-65504, 65504).min().item()))


@every_width
def test_a_range_whose_step_fp16_does_not_have_is_finite(bits):
    x = torch.tensor([-1e8, 1e8, 0, 1])
    assert coded(x, bits)[1].isfinite().all()


@every_width
def test_codes_stay_in_range_under_a_range_that_is_not_their_own(bits):
    """Also where the scale is 0, which divides nothing."""
    x = torch.tensor([-1e6, -1, 0, 0.4, 1, 1e6])
    for scale, least in ((1.0, 0.0), (0.0, 0.0), (1e-3, 5.0), (6e-8, 0.0)):
        codes = encode(x, bits, torch.tensor([scale]).half(), torch.tensor([least]).half())
        assert int(codes.max()) <= 2**bits - 1
        assert codes[0] == 0
        assert codes[-1] == (2**bits - 1 if scale else 0)


def test_ranges_are_those_of_each_group_alone():
    x = torch.randn(4, 3, 16)
    for part, one in zip(coded(x, 4), coded(x[2:3, 1:2], 4), strict=True):
        assert torch.equal(part[2:3, 1:2], one)
