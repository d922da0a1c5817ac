"""Votes and exact top-k of many units in one launch, or a few where a row does not fit a multiprocessor's registers.

A program holds up to 8192 units of one list: it adds up the votes of the list's query heads, finds the k-th largest key bit
by bit, moves the k units that reach it together and sorts them, their places below their keys so that no two are equal.
More units are cut into such pieces, whose best are the entries of the next round.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvlib.kernels.launch import Example, jit, power, softcapped, tl

HELD = 8192  # units that one program holds; more would not fit its registers
_LEAST = 1024


@jit
def sortable(x):
    """fp32 x as int32 in the same order, NaN as -inf and -0 as 0; more than the least int32."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def packed(key, place):
    """A key and a place [N] int32 as one int64: larger for a larger key, then for a lower place."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@jit
def place_of(entry):
    """The place in what `packed` made."""
    return 0x7FFFFFFF - (entry & 0x7FFFFFFF)


@jit
def reached(key, k):
    """A threshold that the k largest of key [N] int32 reach, as uint32, found from its highest bit down: the k-th largest
    key, unless exactly k reach a lower one."""
    bits = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    least = tl.zeros([], tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    reach = tl.full([], key.shape[0], tl.int32)
    while (bit != 0) & (reach != k):
        trial = least | bit
        count = tl.sum((bits >= trial).to(tl.int32), 0)
        least = tl.where(count >= k, trial, least)
        reach = tl.where(count >= k, count, reach)
        bit = bit >> 1
    return least


@jit
def best_first(key, entry, least, OUT, k, SORT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write the k entries [N] whose key is largest to OUT: in their order, or with SORT their places, best first.  Of those
    that just reach `least`, the first are taken."""
    bits = key.to(tl.uint32, bitcast=True) ^ 0x80000000
    above, equal = bits > least, bits == least
    places = tl.cumsum((above.to(tl.int32) << 16) | equal.to(tl.int32), 0)
    wanted = k - tl.sum(above.to(tl.int32), 0)
    equals = places & 0xFFFF
    at = (places >> 16) + tl.minimum(equals, wanted) - 1
    tl.store(OUT + at, entry, mask=above | (equal & (equals <= wanted)))
    if SORT:
        tl.debug_barrier()
        j = tl.arange(0, BLOCK_K)
        chosen = tl.load(OUT + j, mask=j < k, other=-0x8000000000000000)
        tl.debug_barrier()
        tl.store(OUT + j, place_of(tl.sort(chosen, descending=True)), mask=j < k)


@jit
def log_sum(x):
    """Base-2 log of the sum of 2^x, x [N]; -inf where all are."""
    top = tl.max(x, 0)
    safe = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(x - safe), 0)
    return tl.where(total == 0.0, float("-inf"), safe + tl.log2(tl.where(total == 0.0, 1.0, total)))


@jit
def held(COUNT, SIZE, b, head, u, units, stride_zb, stride_zh, SHARE):
    """Which of units u [N] a row has and are not empty."""
    some = u < units
    if COUNT is not None:
        some = some & (u < tl.load(COUNT + b))
    if SIZE is not None:
        at = SIZE + b * stride_zb + (head // SHARE).to(tl.int64) * stride_zh + u
        some = some & (tl.load(at, mask=some, other=0) != 0)
    return some


@jit
def scaled_logits(LOGITS, some, b, head, u, scale, stride_b, stride_h, CAP):
    """The logits [N] of units u for a query head; -inf where there is no such unit."""
    s = tl.load(LOGITS + b * stride_b + head.to(tl.int64) * stride_h + u, mask=some, other=0.0).to(tl.float32)
    return tl.where(some, softcapped(s * scale, CAP), float("-inf"))


@jit(do_not_specialize=["units"])
def part_sums(
    LOGITS,
    PARTS,
    COUNT,
    SIZE,
    units,
    scale,
    stride_b,
    stride_h,
    stride_zb,
    stride_zh,
    Q_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Base-2 log-sum-exp of one piece of a query head's logits."""
    row = tl.program_id(0)
    u = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = (row // Q_HEADS).to(tl.int64)
    head = row % Q_HEADS
    some = held(COUNT, SIZE, b, head, u, units, stride_zb, stride_zh, SHARE)
    s = scaled_logits(LOGITS, some, b, head, u, scale, stride_b, stride_h, CAP)
    tl.store(PARTS + row * tl.num_programs(1) + tl.program_id(1), log_sum(s * 1.4426950408889634))


@jit(do_not_specialize=["units", "k", "pieces"])
def rank_units(
    LOGITS,
    PARTS,
    REST,
    COUNT,
    SIZE,
    ALWAYS,
    OUT,
    units,
    k,
    pieces,
    scale,
    stride_b,
    stride_h,
    stride_zb,
    stride_zh,
    stride_ab,
    stride_ah,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per list
    SHARE: tl.constexpr,  # query heads per row of SIZE
    CAP: tl.constexpr,
    VOTE: tl.constexpr,
    LOUDEST: tl.constexpr,
    SELECT: tl.constexpr,  # else the scores themselves are written
    SORT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The best of one piece of a list's units; all of them where PARTS is None."""
    row = tl.program_id(0)
    piece = tl.program_id(1)
    b = (row // LISTS).to(tl.int64)
    h = row % LISTS
    u = piece * BLOCK + tl.arange(0, BLOCK)
    score = tl.zeros([BLOCK], tl.float32)
    for g in range(GROUP):
        head = h * GROUP + g
        some = held(COUNT, SIZE, b, head, u, units, stride_zb, stride_zh, SHARE)
        s = scaled_logits(LOGITS, some, b, head, u, scale, stride_b, stride_h, CAP)
        if VOTE:
            s *= 1.4426950408889634
            if PARTS is None:
                total = log_sum(s)
            else:
                i = tl.arange(0, BLOCK_P)
                at = PARTS + (b * LISTS * GROUP + head) * pieces + i
                total = log_sum(tl.load(at, mask=i < pieces, other=float("-inf")))
            if REST is not None:
                rest = tl.load(REST + b * LISTS * GROUP + head) * 1.4426950408889634
                two = tl.arange(0, 2)
                total = log_sum(tl.where(two == 0, total, rest))
            p = tl.exp2(s - tl.where(total == float("-inf"), 0.0, total))
            score = tl.maximum(score, p) if LOUDEST else score + p
        else:
            score = s
    if ALWAYS is not None:
        some = held(COUNT, SIZE, b, h * GROUP, u, units, stride_zb, stride_zh, SHARE)
        always = tl.load(ALWAYS + b * stride_ab + h.to(tl.int64) * stride_ah + u, mask=some, other=0) != 0
        score = tl.where(always, float("inf"), score)
    if SELECT:
        key = tl.where(u < units, sortable(score), -0x80000000)
        out = OUT + (row.to(tl.int64) * tl.num_programs(1) + piece) * k
        least = reached(key, k)
        best_first(key, packed(key, u), least, out, k, SORT, BLOCK_K)
    else:
        tl.store(OUT + row.to(tl.int64) * units + u, score, mask=u < units)


@jit(do_not_specialize=["many", "k"])
def rank_entries(ENTRIES, OUT, many, k, SORT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The best of one piece of a list's entries, which earlier rounds left."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    i = piece * BLOCK + tl.arange(0, BLOCK)
    out = OUT + (row * tl.num_programs(1) + piece) * k
    entry = tl.load(ENTRIES + row * many + i, mask=i < many, other=-0x8000000000000000)
    key = (entry >> 32).to(tl.int32)
    least = reached(key, k)
    best_first(key, entry, least, out, k, SORT, BLOCK_K)


def fits(units: int, k: int) -> bool:
    """Whether every round leaves at most half of what it is given, or one is enough."""
    return units <= HELD or k <= HELD // 2


def _block(many: int) -> int:
    return min(HELD, max(_LEAST, power(many)))


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def ranked(
    logits: Tensor,
    k: int,
    heads: int,
    scale: float = 1.0,
    softcap: float = 0.0,
    loudest: bool = False,
    rest: Tensor | None = None,
    count: Tensor | None = None,
    size: Tensor | None = None,
    always: Tensor | None = None,
    select: bool = True,
) -> Tensor:
    """Launch `rank_units`, before it `part_sums` and after it `rank_entries` where there are many units.  Arguments as of
    `kvlib.kernels.selection.rank`, for a k that `fits`; without `select` the scores [B, L, U] fp32 that it would rank."""
    batch, q_heads, units = logits.shape
    vote, lists = heads > 0, heads or q_heads
    block = _block(units)
    pieces, warps = -(-units // block), _warps(block)
    share = 1 if size is None else q_heads // size.shape[1]
    strides = (*logits.stride()[:2], *((0, 0) if size is None else size.stride()[:2]))
    parts = None
    if vote and pieces > 1:
        parts = logits.new_empty((batch * q_heads, pieces), dtype=torch.float32)
        part_sums[(batch * q_heads, pieces)](
            logits,
            parts,
            count,
            size,
            units,
            scale,
            *strides,
            Q_HEADS=q_heads,
            SHARE=share,
            CAP=softcap,
            BLOCK=block,
            num_warps=warps,
        )
    width, dtype = (pieces * k, torch.int64) if select else (units, torch.float32)
    out = logits.new_empty((batch, lists, width), dtype=dtype)
    rank_units[(batch * lists, pieces)](
        logits,
        parts,
        rest.contiguous() if vote and rest is not None else None,
        count,
        size,
        always if vote else None,
        out,
        units,
        k,
        pieces,
        scale,
        *strides,
        *((0, 0) if always is None else always.stride()[:2]),
        LISTS=lists,
        GROUP=q_heads // lists,
        SHARE=share,
        CAP=softcap,
        VOTE=vote,
        LOUDEST=loudest,
        SELECT=select,
        SORT=pieces == 1,
        BLOCK=block,
        BLOCK_K=max(16, power(k)),
        BLOCK_P=max(16, power(pieces)),
        num_warps=warps,
    )
    return best_entries(out, k) if select and pieces > 1 else out


def best_entries(entries: Tensor, k: int) -> Tensor:
    """Rounds of `rank_entries` over entries [B, L, M], until one program ranks all that is left."""
    while True:
        batch, lists, many = entries.shape
        block = _block(many)
        pieces = -(-many // block)
        out = entries.new_empty((batch, lists, pieces * k))
        rank_entries[(batch * lists, pieces)](
            entries, out, many, k, SORT=pieces == 1, BLOCK=block, BLOCK_K=max(16, power(k)), num_warps=_warps(block)
        )
        if pieces == 1:
            return out
        entries = out


def examples() -> Iterator[Example]:
    """Launches to compile: 128k tokens in pages of 16 first."""
    for units, k, heads, group, full in (
        (8192, 64, 8, 4, False),
        (8192, 64, 8, 4, True),
        (1024, 1024, 8, 4, False),
        (8192, 8192, 8, 4, True),
        (8192, 256, 1, 32, False),
        (131072, 2048, 8, 4, True),
        (131072, 4096, 0, 1, False),
    ):
        q_heads = max(heads, 8) * group if heads != 1 else group
        logits = torch.empty(1, q_heads, units)
        kv = max(1, heads)
        optional: dict[str, Any] = {
            "rest": torch.empty(1, q_heads),
            "count": torch.zeros(1, dtype=torch.int32),
            "size": torch.zeros(1, kv, units, dtype=torch.int32),
            "always": torch.zeros(1, kv, units, dtype=torch.bool),
        }

        def launch(
            logits: Tensor = logits, k: int = k, heads: int = heads, optional: dict[str, Any] = optional if full else {}
        ) -> object:
            return ranked(logits, k, heads, 0.1, 30.0 if optional else 0.0, **optional)

        yield Example(f"{k} of {units} for {heads} lists of {group}{', all options' if full else ''}", launch)
