"""What GEAR adds to tiles of codes in registers: a low-rank term, and entries that stand out.

An entry that stands out is compared with the place of every element of a tile: an instruction for two elements, no scatter,
no memory but the registers.  Keys are corrected themselves, values by one more product for each of a token's entries.
"""

from __future__ import annotations

from kvlib.kernels.code_tiles import channel_rows, half, key_planes, load, scaled
from kvlib.kernels.launch import INTERPRET, dot, jit, tl


@jit
def place_of(x):
    """Integers from 0 to 255 as fp16 numbers 1024 + x, of which an instruction compares two."""
    return (x.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)


@jit
def equal(a, b):
    """1 where fp16 numbers are equal, else 0, in fp16."""
    if INTERPRET:
        return (a == b).to(tl.float16)
    text: tl.constexpr = "set.eq.f16x2.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(text, "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)


@jit
def rank_of_queries(
    at, q, R: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr
):
    """Queries, of `load_queries`, times factors b [d, R] at `at`: fp16 [RANK, rows], zero from R on."""
    r = tl.arange(0, RANK)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    met = tl.zeros([RANK, q[0].shape[1]], tl.float32)
    for i in tl.static_range(COUNT):
        b = tl.load(at + ((c + i * WIDTH) * R + r), mask=(r < R) & (c < WIDTH), other=0.0)
        met = dot(b, q[i], met)
    return met.to(tl.float16)


@jit
def corrected_scores(
    s,
    q,
    k_at,
    k_offsets,
    range_at,
    range_offsets,
    error_at,
    place_at,
    here_at,
    ENTRIES: tl.constexpr,
    KEYS: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s plus products of queries with keys, WIDTH channels at a time: bytes at k_at + k_offsets [ROWS, 1], ranges as of
    `channel_keys`, and of each channel ENTRIES errors, each for the token whose place in the page, at here_at, it names."""
    PLANES: tl.constexpr = 8 // BITS
    BLOCKS: tl.constexpr = D // (PLANES * WIDTH)
    c = tl.arange(0, BLOCK)[None, :]
    one = tl.zeros([1, 1], tl.int32)
    for b in tl.static_range(BLOCKS):
        planes = key_planes(load(k_at + b * WIDTH, k_offsets, c, WIDTH, BLOCK), BITS, True)
        for i in tl.static_range(PLANES):
            channel = (i * BLOCKS + b) * WIDTH
            scale = channel_rows(range_at + channel, range_offsets, KEYS, ROWS, WIDTH, BLOCK, 2)
            least = channel_rows(range_at + (channel + D), range_offsets, KEYS, ROWS, WIDTH, BLOCK, 2)
            x = scaled(planes[i], scale, least)
            for e in tl.static_range(ENTRIES):
                error = channel_rows(error_at + (e * D + channel), one, "span", ROWS, WIDTH, BLOCK, 2)
                place = channel_rows(place_at + (e * D + channel), one, "span", ROWS, WIDTH, BLOCK, 1)
                x = scaled(equal(place_of(place), place_of(tl.load(here_at)[:, None])), error, x)
            s = dot(x, q[i * BLOCKS + b], s)
    return s


@jit
def add_entries(
    acc,
    p,
    error_at,
    place_at,
    COUNT,
    ENTRIES: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """acc, of `add_values`, plus under weights p ENTRIES errors of channels of each token: words of two at error_at
    [tokens], and at place_at bytes that say which channels."""
    PLANES: tl.constexpr = 8 // BITS
    BLOCKS: tl.constexpr = max(1, GROUPS // PLANES)
    WIDTH: tl.constexpr = D * BITS // 16 // BLOCKS
    c = tl.arange(0, BLOCK)[:, None]
    weights = ()
    places = ()
    for e in tl.static_range(ENTRIES):
        error = half(tl.load(error_at + e // 2), e % 2)
        weights = weights + ((p * error[:, None]).to(tl.float16),)
        places = places + (place_of(tl.load(place_at + e))[None, :],)
    even = place_of(tl.load(COUNT + 2 * c, mask=c < WIDTH, other=0))
    new = ()
    for b in tl.static_range(BLOCKS):
        for i in tl.static_range(2 * PLANES):
            here = even + tl.full([1, 1], i % PLANES * (D * BITS // 8) + i // PLANES + 2 * b * WIDTH, tl.float16)
            out = tl.zeros([BLOCK, p.shape[1]], tl.float32)
            for e in tl.static_range(ENTRIES):
                out = dot(equal(here, places[e]), weights[e], out)
            new = new + (acc[b * 2 * PLANES + i] + out * 2.0 ** (BITS * (i % PLANES) - 24),)
    return new


@jit
def add_rank(
    acc, met, total, at, R: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """acc, of `add_values`, plus met [RANK, rows] fp32 times factors b [d, R] at `at`; as shares of the weights' total met
    is no larger than the factors that it comes from, and fits fp16."""
    PLANES: tl.constexpr = 8 // BITS
    BLOCKS: tl.constexpr = max(1, GROUPS // PLANES)
    WIDTH: tl.constexpr = D * BITS // 16 // BLOCKS
    c = tl.arange(0, BLOCK)[:, None]
    r = tl.arange(0, met.shape[0])[None, :]
    total = tl.sum(total, axis=0)[None, :]
    share = (met * (1.0 / total)).to(tl.float16)
    new = ()
    for b in tl.static_range(BLOCKS):
        for i in tl.static_range(2 * PLANES):
            channel = i % PLANES * (D * BITS // 8) + i // PLANES + 2 * (c + b * WIDTH)
            factor = tl.load(at + (channel * R + r), mask=(r < R) & (c < WIDTH), other=0.0)
            out = dot(factor, share, None) * total
            new = new + (acc[b * 2 * PLANES + i] + out * 2.0 ** (BITS * (i % PLANES) - 24),)
    return new


@jit
def uniform(x):
    """An int32 x that a warp's threads all have, in a register that they share.  A loop so bounded is not compiled a second
    time for threads that part, which would spill."""
    return tl.max(tl.zeros([32], tl.int32) + x, axis=0)


@jit
def ended(at, ENDS, segments, BLOCK: tl.constexpr):
    """How many of the segments, whose ends ascend, end at `at` or before."""
    i = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, segments, BLOCK):
        found += (tl.load(ENDS + first + i, mask=first + i < segments, other=2147483647) <= at).to(tl.int32)
    return tl.sum(found, axis=0)
