"""Quantise on write: codes in byte planes and their ranges, in one launch; see `kvlib.kernels.quantise` for the layout.

Whatever a compiler fuses, the codes are those of the torch function: no product feeds a sum without a clamp between, all
divisions are rounded to nearest, and the halves go to even by adding and taking away 2^23.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels.launch import Example, jit, power, tl
from kvlib.kernels.ops import register
from kvlib.kernels.quantise import encode, folded, pack, ranges
from kvlib.kernels.ran import note

_TOKENS = 16  # of a program, where channels share a range
_PROGRAMS = 256  # where tokens share one, spans are cut into so few channels, but not less than 8 bytes, to fill a GPU
_TILE = 4096  # elements that such a program holds at once


@jit
def _range(least, most, bad, BITS: tl.constexpr):
    """fp16 scale and least value of groups between two fp32 values, NaN where a group is `bad`, with a NaN; and both as
    `_codes` wants them."""
    least = tl.where(bad, float("nan"), least)
    step = tl.div_rn(most - least, tl.full(most.shape, 2**BITS - 1, tl.float32))
    scale = tl.where(step > 65504.0, 65504.0, step).to(tl.float16)  # a comparison with NaN is false, so NaN stays
    least = tl.where(least > 65504.0, 65504.0, tl.where(least < -65504.0, -65504.0, least)).to(tl.float16)
    step = scale.to(tl.float32)
    some = step > 0.0
    inverse = tl.where(some, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), tl.where(some, step, 1.0)), 0.0)
    return scale, least, inverse, least.to(tl.float32)


@jit
def _codes(x, inverse, least, BITS: tl.constexpr):
    """Codes int32 of fp32 x; what is NaN has the code 0."""
    t = (x - least) * inverse
    t = tl.where(t > 0.0, t, 0.0)
    t = tl.where(t < 2.0**BITS - 1, t, 2.0**BITS - 1)
    return ((t + 8388608.0) - 8388608.0).to(tl.int32)


@jit(do_not_specialize=["tokens", "heads"])
def pack_tokens(
    X,
    CODES,
    RANGE,
    heads,
    tokens,
    stride_r,
    stride_h,
    stride_m,
    stride_d,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a range
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Some tokens of one (row, head): each group's ranges, then all codes."""
    PLANES: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = D // PLANES
    GROUPS: tl.constexpr = D // GROUP
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    t = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = t < tokens
    p = tl.arange(0, PLANES)
    j = tl.arange(0, BLOCK_J)
    channel = (p[:, None] * BYTES + j[None, :])[None, :, :]
    inside = live[:, None, None] & (j < BYTES)[None, None, :]
    x_at = X + (row // heads).to(tl.int64) * stride_r + (row % heads).to(tl.int64) * stride_h
    x_at = x_at + (t.to(tl.int64) * stride_m)[:, None, None] + channel * stride_d
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)

    place = row.to(tl.int64) * tokens + t
    inverse = tl.zeros([BLOCK_M, PLANES, BLOCK_J], tl.float32)
    low = tl.zeros([BLOCK_M, PLANES, BLOCK_J], tl.float32)
    for g in range(GROUPS):
        own = inside & (channel // GROUP == g)
        least = tl.min(tl.min(tl.where(own, x, float("inf")), axis=2), axis=1)
        most = tl.max(tl.max(tl.where(own, x, float("-inf")), axis=2), axis=1)
        bad = tl.max(tl.max((own & (x != x)).to(tl.int32), axis=2), axis=1) > 0
        scale, least, steps, least_wide = _range(least, most, bad, BITS)
        tl.store(RANGE + place * (2 * GROUPS) + g, scale, mask=live)
        tl.store(RANGE + place * (2 * GROUPS) + GROUPS + g, least, mask=live)
        inverse = tl.where(own, steps[:, None, None], inverse)
        low = tl.where(own, least_wide[:, None, None], low)
    codes = tl.sum(_codes(x, inverse, low, BITS) << (p * BITS)[None, :, None], axis=1)
    at = CODES + place[:, None] * BYTES + j[None, :]
    tl.store(at, codes.to(tl.uint8), mask=live[:, None] & (j < BYTES)[None, :])


@jit(do_not_specialize=["tokens", "heads", "span"])
def pack_channels(
    X,
    CODES,
    RANGE,
    heads,
    tokens,
    span,  # tokens that share a range
    stride_r,
    stride_h,
    stride_m,
    stride_d,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Some bytes of all tokens of one span of one (row, head): the channels' ranges, then codes."""
    PLANES: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = D // PLANES
    spans = tokens // span
    row = tl.program_id(0) // spans
    first = (tl.program_id(0) % spans) * span
    x_at = X + (row // heads).to(tl.int64) * stride_r + (row % heads).to(tl.int64) * stride_h
    p = tl.arange(0, PLANES)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    channel = p[:, None] * BYTES + j[None, :]
    mine = (j < BYTES)[None, :]
    x_at = x_at + channel * stride_d
    i = tl.arange(0, BLOCK_M)

    least = tl.full([PLANES, BLOCK_J], float("inf"), tl.float32)
    most = tl.full([PLANES, BLOCK_J], float("-inf"), tl.float32)
    bad = tl.zeros([PLANES, BLOCK_J], tl.int32)
    for begin in range(0, span, BLOCK_M):
        inside = (begin + i < span)[:, None, None] & mine[None, :, :]
        t = (first + begin + i).to(tl.int64)
        x = tl.load(x_at[None, :, :] + t[:, None, None] * stride_m, mask=inside, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.min(tl.where(inside, x, float("inf")), axis=0))
        most = tl.maximum(most, tl.max(tl.where(inside, x, float("-inf")), axis=0))
        bad = tl.maximum(bad, tl.max((x != x).to(tl.int32), axis=0))
    scale, least, inverse, low = _range(least, most, bad > 0, BITS)
    range_at = RANGE + tl.program_id(0).to(tl.int64) * (2 * D) + channel
    tl.store(range_at, scale, mask=mine)
    tl.store(range_at + D, least, mask=mine)

    code_at = CODES + (row.to(tl.int64) * tokens + first) * BYTES + j
    for begin in range(0, span, BLOCK_M):
        inside = (begin + i < span)[:, None, None] & mine[None, :, :]
        t = (first + begin + i).to(tl.int64)
        x = tl.load(x_at[None, :, :] + t[:, None, None] * stride_m, mask=inside, other=0.0).to(tl.float32)
        codes = tl.sum(_codes(x, inverse[None, :, :], low[None, :, :], BITS) << (p * BITS)[None, :, None], axis=1)
        live = (begin + i < span)[:, None] & (j < BYTES)[None, :]
        tl.store(code_at[None, :] + (begin + i).to(tl.int64)[:, None] * BYTES, codes.to(tl.uint8), mask=live)


def launched(x: Tensor, bits: int, group: int = 0, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """Launch `pack_channels` or `pack_tokens`; arguments as of `pack_codes`.  3 bits, two sorts of planes, are torch's."""
    note("encoding", "Triton")
    if bits == 3:
        return quantised(x, bits, group, per_channel)
    codes, found = _empty(x, bits, group, per_channel)
    rows, heads, m, d = x.shape
    width = codes.shape[3]
    if x.numel() == 0:
        return codes, found
    if per_channel:
        span, spans = group or m, rows * heads * found.shape[2]
        block_j = min(power(width), max(8, power(width * spans // _PROGRAMS)))
        pack_channels[(spans, -(-width // block_j))](
            x,
            codes,
            found,
            heads,
            m,
            span,
            *x.stride(),
            D=d,
            BITS=bits,
            BLOCK_M=min(power(span), _TILE // (block_j * 8 // bits)),
            BLOCK_J=block_j,
            num_warps=4,
        )
        return codes, found
    size = d // found.shape[4]
    pack_tokens[(rows * heads * -(-m // _TOKENS),)](
        x,
        codes,
        found,
        heads,
        m,
        *x.stride(),
        D=d,
        BITS=bits,
        GROUP=size,
        BLOCK_M=_TOKENS,
        BLOCK_J=power(width),
        num_warps=4,
    )
    return codes, found


def quantised(x: Tensor, bits: int, group: int = 0, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """The same in torch; arguments as of `pack_codes`."""
    note("encoding", "torch")
    x = x.float()
    if per_channel:
        grouped, dim = folded(x, 2, group or x.shape[2]), 3
    else:
        grouped, dim = folded(x, 3, min(group or x.shape[3], x.shape[3])), 4
    scale, least = ranges(grouped, bits, dim)
    codes = encode(grouped, bits, scale, least).view(x.shape)
    return pack(codes, bits), torch.stack([scale, least], 3).squeeze(dim + 1)


def _empty(x: Tensor, bits: int, group: int = 0, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    rows, heads, m, d = x.shape
    size = (group or m) if per_channel else min(group or d, d)
    if (m if per_channel else d) % size or d * bits % 8:
        raise ValueError(f"{m} tokens of {d} channels at {bits} bits do not make whole groups of {group} and whole bytes")
    shape = (m // size, 2, d) if per_channel else (m, 2, d // size)
    return (
        x.new_empty((rows, heads, m, d * bits // 8), dtype=torch.uint8),
        x.new_empty((rows, heads, *shape), dtype=torch.float16),
    )


pack_codes = register(
    "pack(Tensor x, int bits, int group=0, bool per_channel=False) -> (Tensor, Tensor)",
    cpu=quantised,
    cuda=launched,
    fake=_empty,
)
"""Codes uint8 [R, H, m, d * bits / 8] of x [R, H, m, d], any float dtype and strides, in 2, 3, 4 or 8 bits, and fp16
ranges, scale and least value: [R, H, m, 2, d / group] of `group` neighbouring channels (0, or more than d: all) of each
token, or `per_channel` [R, H, m / group, 2, d] of `group` neighbouring tokens (0: all).

A group with a NaN has NaN ranges and codes 0; infinite values saturate.  The sign of a range's zero is not defined.
Raises ValueError or RuntimeError where groups or bytes would not be whole.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: KIVI's keys and values first, then whole tokens, other widths, long spans, fp32."""
    for dtype, d, bits, group, per_channel in (
        (torch.bfloat16, 128, 4, 32, True),
        (torch.bfloat16, 128, 4, 32, False),
        (torch.bfloat16, 128, 4, 0, False),
        (torch.bfloat16, 128, 2, 32, False),
        (torch.bfloat16, 128, 8, 128, True),
        (torch.float32, 128, 4, 0, True),
        (torch.float32, 128, 4, 0, False),
        (torch.float16, 80, 2, 40, False),
        (torch.float32, 256, 8, 64, False),
        (torch.float16, 96, 4, 32, True),
    ):
        x = torch.empty(1, 8, 4096, d, dtype=dtype)

        def launch(x: Tensor = x, bits: int = bits, group: int = group, per_channel: bool = per_channel) -> object:
            return launched(x, bits, group, per_channel)

        kind = f"{group or 'all'} {'tokens' if per_channel else 'channels'}"
        yield Example(f"{bits} bits, {kind}, {str(dtype)[6:]}, d {d}", launch)
