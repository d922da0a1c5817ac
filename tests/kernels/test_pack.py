"""Codes and ranges of the kernel are those of the torch function bit for bit, and those of plain arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.pack import launched, pack_codes, quantised
from kvlib.kernels.quantise import unpack
from tests.kernels.poison import DEVICE, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_width = pytest.mark.parametrize("bits", [2, 4, 8])


def alike(a, b):
    """Equal, NaN where the other is; the sign of zero does not count."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def check(x, bits, group, per_channel):
    """The kernel's codes and ranges, after comparing them with those of the CPU."""
    with poisoned():
        codes, found = launched(x, bits, group, per_channel)
    want_codes, want = quantised(x.cpu(), bits, group, per_channel)
    assert codes.dtype == torch.uint8 and found.dtype == torch.float16
    assert torch.equal(codes.cpu(), want_codes)
    assert alike(found.cpu(), want)
    return codes.cpu(), found.cpu()


def plainly(x, bits):
    """Scale, least value and codes of one group, a list of floats, in Python's arithmetic."""
    least = torch.tensor(min(x)).half().item()
    scale = torch.tensor((max(x) - min(x)) / (2**bits - 1), dtype=torch.float64).float().half().item()
    codes = [0 if scale == 0 else max(0, min(2**bits - 1, round((v - least) / scale))) for v in x]
    return scale, least, codes


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_channels_of_a_token_share_a_range(tokens, dtype, bits):
    x = torch.randn(1, 2, tokens, 64).to(dtype).to(DEVICE)
    check(x, bits, 0, False)
    codes, found = check(x, bits, 32, False)
    own = x.double().cpu()[0, 1, -1, 32:].tolist()
    scale, least, plain = plainly(own, bits)
    assert found[0, 1, -1, :, 1].tolist() == [scale, least]
    near = unpack(codes, bits)[0, 1, -1, 32:].int() - torch.tensor(plain)
    assert near.abs().max() <= 1 and near.count_nonzero() <= 1  # a tie may go the other way in fp32


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "group"), [(1, 0), (16, 8), (63, 0), (64, 64), (65, 0), (66, 33)])
def test_tokens_of_a_channel_share_a_range(tokens, group, dtype, bits):
    x = torch.randn(1, 2, tokens, 32).to(dtype).to(DEVICE)
    codes, found = check(x, bits, group, True)
    own = x.double().cpu()[0, 1, -(group or tokens) :, 5].tolist()
    scale, least, plain = plainly(own, bits)
    assert found[0, 1, -1, :, 5].tolist() == [scale, least]
    near = unpack(codes, bits)[0, 1, -(group or tokens) :, 5].int() - torch.tensor(plain)
    assert near.abs().max() <= 1 and near.count_nonzero() <= 1


@pytest.mark.parametrize(
    ("d", "bits", "group", "per_channel"),
    [(80, 2, 40, False), (96, 4, 32, False), (128, 4, 32, True), (40, 8, 5, False), (24, 2, 4, True), (256, 8, 0, False)],
)
def test_heads_and_groups_that_are_no_powers_of_two(d, bits, group, per_channel):
    check(torch.randn(1, 2, 32, d, device=DEVICE), bits, group, per_channel)


@every_width
@pytest.mark.parametrize("per_channel", [False, True])
def test_any_strides(per_channel, bits):
    pool = torch.randn(5, 40, 3, 2, 72, device=DEVICE)
    x = pool[1:3, 4:36, :, 1, 4:68].transpose(1, 2)
    turned = torch.randn(2, 64, 3, 32, device=DEVICE).permute(0, 2, 3, 1)
    for strided in (x, turned):
        assert not strided.is_contiguous()
        check(strided, bits, 16, per_channel)


@every_width
@pytest.mark.parametrize("per_channel", [False, True])
def test_no_tokens_and_no_rows(per_channel, bits):
    for shape in ((2, 3, 0, 16), (0, 3, 8, 16)):
        found = launched(torch.empty(shape, device=DEVICE), bits, 8, per_channel)
        assert [x.shape for x in found] == [x.shape for x in pack_codes(torch.empty(shape), bits, 8, per_channel)]


@every_width
@pytest.mark.parametrize("per_channel", [False, True])
def test_halves_are_rounded_to_even(per_channel, bits):
    most = 2**bits - 1
    line = torch.tensor([0.0, *(i + 0.5 for i in range(min(most, 14))), most]).repeat(16, 1)[:, :16]
    line = torch.nn.functional.pad(line, (0, 16 - line.shape[1]))
    x = (line.T.contiguous() if per_channel else line)[None, None].to(DEVICE)
    codes, found = check(x, bits, 0, per_channel)
    assert (found.select(3, 0) == 1).all()
    held = unpack(codes, bits)[0, 0]
    assert (held[:, 0] if per_channel else held[0]).tolist() == [round(v) for v in line[0].tolist()]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@every_width
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_is_not_a_number_and_what_fp16_cannot_hold(per_channel, bits):
    x = torch.randn(1, 1, 16, 16)  # one group to a line
    for i, values in enumerate(
        ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [math.inf, math.nan], [1e30, -1e30], [7e4], [1e-9])
    ):
        x[0, 0, i, 3 : 3 + len(values)] = torch.tensor(values)
    x[0, 0, 8], x[0, 0, 9], x[0, 0, 10], x[0, 0, 11] = math.inf, 3.3333, 1e6, -0.0
    x[0, 0, 12] = torch.linspace(-1e-7, 1e-7, 16)
    codes, found = check((x.transpose(2, 3) if per_channel else x).to(DEVICE), bits, 0, per_channel)
    assert found[0, 0, 0, :, 0].isnan().all()
    held = unpack(codes, bits)[0, 0]
    assert ((held[:, 0] if per_channel else held[0]) == 0).all()


@settings(max_examples=30)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([0, 4, 16]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.floats(-5, 4),
    st.floats(-100, 100),
    st.integers(0, 10**6),
)
def test_any_magnitude_and_offset(bits, group, per_channel, dtype, magnitude, offset, seed):
    x = torch.randn(1, 1, 16, 32, generator=torch.Generator().manual_seed(seed)) * 10**magnitude + offset
    check(x.to(dtype).to(DEVICE), bits, group, per_channel)


def test_three_bits_and_groups_that_are_not_whole():
    x = torch.randn(1, 2, 16, 32, device=DEVICE)
    check(x, 3, 8, False)
    for bits, group, per_channel in ((4, 5, True), (4, 5, False), (2, 32, True)):
        with pytest.raises(ValueError, match="whole"):
            launched(x, bits, group, per_channel)
        with pytest.raises(RuntimeError):
            quantised(x, bits, group, per_channel)


def test_the_operator_is_sound():
    x = torch.randn(2, 2, 16, 32, device=DEVICE)
    for arguments in ((x, 4), (x, 2, 8, True), (x.half(), 8, 8), (x, 3)):
        torch.library.opcheck(pack_codes, arguments)
