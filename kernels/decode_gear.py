"""Attention over GEAR's keys and values in one pass (arXiv 2403.05527): codes, a low-rank term, entries that stand out.

The loop is that of `kvlib.kernels.decode_q4`.  A chunk is walked segment by segment, since each has its own factors b: the
query meets them before the segment's tokens, which then meet a mere vector of the rank; weights meet the tokens' factors,
and their sum meets the segment's after its last token.  Merging leaves several segments with ranges of their own the same
factors: then those are walked, and each time the factors met anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvlib.kernels.code_tiles import (
    add_values,
    find_chunk,
    group_weights,
    load_queries,
    of_head,
    softmax_rows,
    store_rows,
    zeros,
)
from kvlib.kernels.decode import chunk_of
from kvlib.kernels.decode_q4 import attend_listed, bits_of, flat, groups_of, levels, merged, tile_of, words
from kvlib.kernels.gear_tiles import add_entries, add_rank, corrected_scores, ended, rank_of_queries, uniform
from kvlib.kernels.launch import Example, dot, jit, power, softcapped, tl
from kvlib.kernels.ops import register
from kvlib.kernels.quantise import folded
from kvlib.kernels.ran import note

MOST = 8  # entries of a vector that may stand out: each is compared with every element
ALL = tl.constexpr(1 << 30)  # what is divided by it is 0, but not known to be, and so stays in its loop


@jit(do_not_specialize=["rows", "n", "most", "segments", "range_segments"])
def decode_corrected(
    Q,
    K,
    K_RANGE,
    K_A,
    K_B,
    K_ERROR,
    K_PLACE,
    V,
    V_RANGE,
    V_A,
    V_B,
    V_ERROR,
    V_PLACE,
    OUT,
    LSE,
    LENGTH,
    ENDS,
    RANGE_ENDS,
    COUNT,  # 0 to 255
    factor,
    rows,
    n,
    most,
    segments,
    range_segments,
    q_steps,  # strides of sequences, heads, and rows, tokens, pages or segments
    k_steps,
    k_range_steps,
    k_a_steps,
    k_b_steps,
    k_error_steps,
    k_place_steps,
    v_steps,
    v_range_steps,
    v_a_steps,
    v_b_steps,
    v_error_steps,
    v_place_steps,
    K_A_STEP: tl.constexpr,  # strides of tokens in K_A and V_A, whose rows are so short that their alignment must be known
    V_A_STEP: tl.constexpr,
    HEADS: tl.constexpr,  # KV heads
    GROUP: tl.constexpr,  # query heads per KV head
    D: tl.constexpr,
    R: tl.constexpr,  # rank
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,  # tokens of a row of K_RANGE; 0: a segment's
    PAGE: tl.constexpr,  # tokens of a row of K_ERROR
    K_ENTRIES: tl.constexpr,  # of a channel in a page that stand out
    V_ENTRIES: tl.constexpr,  # of a token that stand out
    GROUPS: tl.constexpr,  # of channels of a value
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of one product with keys
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    R_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr,
):
    """One chunk of one head's tokens: its softmax-normalised output and log-sum-exp."""
    w = tl.program_id(0)
    row, lo, hi = find_chunk(LENGTH, w, rows, most, CHUNK, WHOLE, R_BLOCK)
    row = uniform(row)
    lo = uniform(lo)
    hi = uniform(hi)
    if row >= rows:
        return
    b = (row // HEADS).to(tl.int64)
    h = (row % HEADS).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = m < GROUP * n
    j = tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    q_at = of_head(Q, q_steps, b, h * GROUP)
    offsets = (m // n).to(tl.int64) * q_steps[1] + m % n * q_steps[2]
    q = load_queries(q_at, offsets, mine, factor, WIDTH, BLOCK_K, 0, D // WIDTH)
    k_at, k_range_at = of_head(K, k_steps, b, h), of_head(K_RANGE, k_range_steps, b, h)
    v_at, v_range_at = of_head(V, v_steps, b, h), of_head(V_RANGE, v_range_steps, b, h)
    k_a_at, k_b_at = of_head(K_A, k_a_steps, b, h), of_head(K_B, k_b_steps, b, h)
    v_a_at, v_b_at = of_head(V_A, v_a_steps, b, h), of_head(V_B, v_b_steps, b, h)
    own = 0  # segment by its factors
    segment = 0  # by its ranges, if those are of segments, else the same
    behind = tl.minimum(hi - lo, 1)
    if ENDS is not None:
        ENDS += b * segments
        own = ended(lo, ENDS, segments, S_BLOCK)
    ends = ENDS
    if RANGE_ENDS is not None:
        ends = RANGE_ENDS + b * range_segments
        segment = ended(lo, ends, range_segments, S_BLOCK)
        behind = tl.where(hi > lo, ended(hi - 1, ends, range_segments, S_BLOCK) + 1, segment)
    elif ENDS is not None:
        segment = own
        behind = tl.where(hi > lo, ended(hi - 1, ends, segments, S_BLOCK) + 1, segment)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    lows = zeros(BLOCK_N, BLOCK_M, GROUPS)
    acc = zeros(BLOCK_V, BLOCK_M, max(16 // V_BITS, 2 * GROUPS))
    for number in range(segment, behind):
        start = lo
        stop = hi
        if ends is not None:
            start = uniform(tl.maximum(lo, tl.load(ends + number - 1, mask=number > 0, other=0)))
            stop = uniform(tl.minimum(hi, tl.load(ends + number)))
        if RANGE_ENDS is None:
            own = number
        elif ENDS is not None:
            own += (tl.load(ENDS + own) <= start).to(tl.int32)
        k_b = k_b_at + tl.cast(own, tl.int64) * k_b_steps[2]
        v_b = v_b_at + tl.cast(own, tl.int64) * v_b_steps[2]
        k_met = rank_of_queries(k_b, q, R, WIDTH, RANK, BLOCK_K, D // WIDTH)
        v_met = tl.zeros([RANK, BLOCK_M], tl.float32)
        for begin in range(start, stop, BLOCK_N):
            first = tl.cast(begin, tl.int64)
            slot = tl.minimum(j, stop - begin - 1)  # past the end the last token again, whose weight is then 0
            a_at = k_a_at + first * K_A_STEP + ((slot * K_A_STEP)[:, None] + r[None, :])
            s = dot(tl.load(a_at, mask=(r < R)[None, :], other=0.0), k_met, None)
            range_row = tl.zeros([1, 1], tl.int64)
            if SPAN == 0:
                range_row += first // ALL + number
            elif KEYS == "span":
                range_row += first // SPAN
            else:
                range_row = ((first + slot) // SPAN)[:, None]
            error_at, place_at = K_ERROR, K_PLACE
            if K_ENTRIES > 0:
                error_at = of_head(K_ERROR, k_error_steps, b, h) + first // PAGE * k_error_steps[2]
                place_at = of_head(K_PLACE, k_place_steps, b, h) + first // PAGE * k_place_steps[2]
            s = corrected_scores(
                s,
                q,
                k_at + first * k_steps[2],
                (slot * k_steps[2])[:, None],
                k_range_at,
                range_row * k_range_steps[2],
                error_at,
                place_at,
                COUNT + begin % PAGE + j,
                K_ENTRIES,
                KEYS,
                K_BITS,
                D,
                BLOCK_N,
                WIDTH,
                BLOCK_K,
            )
            if CAP > 0:
                s = softcapped(s, CAP) * 1.4426950408889634
            s = tl.where((j < stop - begin)[:, None], s, float("-inf"))
            p, alpha, top, total = softmax_rows(s, top, total)
            range_at = v_range_at + first * v_range_steps[2]
            weights, lows = group_weights(p, alpha, lows, range_at, slot * v_range_steps[2], GROUPS)
            value_at = v_at + first * v_steps[2]
            acc = add_values(acc, alpha, weights, value_at, slot * v_steps[2], V_BITS, GROUPS, D, BLOCK_V)
            if V_ENTRIES > 0:
                error_at = of_head(V_ERROR, v_error_steps, b, h) + first * v_error_steps[2] + slot * v_error_steps[2]
                place_at = of_head(V_PLACE, v_place_steps, b, h) + first * v_place_steps[2] + slot * v_place_steps[2]
                count_at = COUNT + begin // ALL
                acc = add_entries(acc, p, error_at, place_at, count_at, V_ENTRIES, V_BITS, GROUPS, D, BLOCK_V)
            a_at = v_a_at + first * V_A_STEP + ((slot * V_A_STEP)[None, :] + r[:, None])
            a = tl.load(a_at, mask=(r < R)[:, None], other=0.0)
            v_met = dot(a, p.to(tl.float16), v_met * alpha[None, :])
        acc = add_rank(acc, v_met, total, v_b, R, V_BITS, GROUPS, D, BLOCK_V)

    at_rows = (row if WHOLE else w).to(tl.int64) * GROUP * n
    store_rows(OUT, LSE, at_rows, m, mine, top, total, acc, lows, V_BITS, GROUPS, D, BLOCK_V, WHOLE)


def rows_of(least: int, most: int, d: int, entries: int) -> int:
    """Tokens of a round, for codes of `least` to `most` bits and vectors of which `entries` stand out."""
    return 16 if entries > 2 or (entries and least == 2) else tile_of(most, d)


@lru_cache
def _count(device: torch.device) -> Tensor:
    """0 to 255: numbers that a kernel loads can be laid out as a product wants them, numbers that it counts cannot."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.int32, device=device)


def split_decode_gear(
    q: Tensor,
    k: Tensor,
    k_range: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    v: Tensor,
    v_range: Tensor,
    v_a: Tensor,
    v_b: Tensor,
    scale: float,
    span: int = 0,
    page: int = 0,
    k_error: Tensor | None = None,
    k_place: Tensor | None = None,
    v_error: Tensor | None = None,
    v_place: Tensor | None = None,
    softcap: float = 0.0,
    most: int | None = None,
    length: Tensor | None = None,
    ends: Tensor | None = None,
    range_ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `decode_corrected`, and `merge_splits` where a head has several chunks; arguments as of `decode_gear`."""
    note("codes", "Triton")
    batch, q_heads, n, d = q.shape
    heads, k_bits, v_bits, groups = k.shape[1], bits_of(k, d), bits_of(v, d), groups_of(v_range, d)
    group, rows, rank = q_heads // heads, batch * heads, k_a.shape[3]
    ends = ends if k_b.shape[2] > 1 else None
    given = [0 if x is None else x.shape[1] for x in (ends, range_ends)]  # rows of the batch that went may have had more
    entries = [0 if x is None else x.shape[3] for x in (k_error, v_error)]
    tile = rows_of(min(k_bits, v_bits), max(k_bits, v_bits), d, max(entries))
    if max(entries) > MOST:
        raise ValueError(f"{max(entries)} entries of a vector stand out: give at most {MOST}")
    needed = (k_b.shape[2], k_range.shape[2] if span == 0 else 1)
    if needed[0] > max(given[0], 1) or needed[1] > max(given[1] or given[0], 1) or page % tile:
        found = f"{max(needed)} segments, pages of {page} tokens"
        raise ValueError(f"{found}: give the ends of all segments, and pages of whole tiles of {tile}")
    most = k.shape[2] if most is None else most
    keys = "entry" if span % tile else "span"
    k_rows = k_range.view(*k_range.shape[:3], 2 * d)
    v, v_words = v.view(torch.int16), words(v_range)
    v_errors = None if v_error is None else v_error.view(torch.int32)
    length = flat(length, batch, heads)
    chunk = chunk_of(most // 2)  # a program is one warp: more of them than of larger ones fill a GPU
    whole = most <= chunk
    items = rows * max(1, -(-most // chunk))
    out = q.new_empty((batch, q_heads, n, d), dtype=torch.float32)
    lse = q.new_empty((batch, q_heads, n), dtype=torch.float32)
    part, part_lse = out, lse
    if not whole:
        part = q.new_empty((items, group * n, d), dtype=torch.float32)
        part_lse = q.new_empty((items, group * n), dtype=torch.float32)
    width = d * k_bits // 8
    width //= 2 if width % 64 == 0 else 1
    pieces = (q, k, k_rows, k_a, k_b, k_error, k_place, v, v_words, v_a, v_b, v_errors, v_place)
    decode_corrected[(rows if whole else items, -(-group * n // 8))](
        *pieces,
        part,
        part_lse,
        length,
        ends,
        range_ends,
        _count(q.device),
        scale * (1.0 if softcap else 1.4426950408889634),
        rows,
        n,
        most,
        *given,
        *(None if x is None else x.stride()[:3] for x in pieces),
        HEADS=heads,
        GROUP=group,
        D=d,
        R=rank,
        K_A_STEP=k_a.stride(2),
        V_A_STEP=v_a.stride(2),
        K_BITS=k_bits,
        V_BITS=v_bits,
        KEYS=keys,
        SPAN=span,
        PAGE=page or 1,
        K_ENTRIES=entries[0],
        V_ENTRIES=entries[1],
        GROUPS=groups,
        CHUNK=chunk,
        CAP=softcap,
        WHOLE=whole,
        BLOCK_M=8,
        WIDTH=width,
        BLOCK_K=max(16, power(width)),
        BLOCK_V=max(16, power(d * v_bits // 16 // max(1, groups * v_bits // 8))),
        BLOCK_N=tile,
        RANK=max(16, power(rank)),
        R_BLOCK=power(rows),
        S_BLOCK=128,
        num_warps=1,
        num_stages=3,
    )
    if not whole:
        merged(part, part_lse, out, lse, length, rows, most, chunk)
    return out, lse


def _segments(ends: Tensor, t: Tensor) -> Tensor:
    """Of tokens t [B, T] the segments, whose ends are [B, S]."""
    return torch.searchsorted(ends.to(t.dtype), t.contiguous(), right=True)


def _low_rank(a: Tensor, b: Tensor, segment: Tensor, dtype: torch.dtype) -> Tensor:
    """The term a b^T [B, H, T, d] of factors a [B, H, T, r] with those b [B, H, S, d, r] of each token's segment [B, T]."""
    total = torch.zeros((), dtype=dtype, device=a.device)
    for s in range(b.shape[2]):
        own = (segment == s)[:, None, :, None]
        total = torch.where(own, a.to(dtype) @ b[:, :, s].to(dtype).mT, total)
    return total


def restored_decode(
    q: Tensor,
    k: Tensor,
    k_range: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    v: Tensor,
    v_range: Tensor,
    v_a: Tensor,
    v_b: Tensor,
    scale: float,
    span: int = 0,
    page: int = 0,
    k_error: Tensor | None = None,
    k_place: Tensor | None = None,
    v_error: Tensor | None = None,
    v_place: Tensor | None = None,
    softcap: float = 0.0,
    most: int | None = None,
    length: Tensor | None = None,
    ends: Tensor | None = None,
    range_ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by restoring all tokens, in q's precision but at least fp32; arguments as of `decode_gear`."""
    batch, _, _, d = q.shape
    tokens, precision = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    t = torch.arange(tokens, device=q.device).expand(batch, -1)
    segment = torch.zeros_like(t) if ends is None else _segments(ends, t)
    if span == 0:
        own = segment if range_ends is None else _segments(range_ends, t)
        own = own.clamp(max=k_range.shape[2] - 1)  # past a sequence's end there may be none
        index = own.view(batch, 1, tokens, 1, 1).expand(-1, k.shape[1], -1, 2, d)
        k_range, span = k_range.gather(2, index), 1
    keys = levels(k, k_range, d, span, precision)
    values = levels(v, v_range, d, 1, precision)
    if k_error is not None and k_place is not None:
        paged = folded(keys, 2, page).transpose(3, 4)
        at = k_place.transpose(3, 4).long().clamp(max=page - 1)
        keys = paged.scatter_add(4, at, k_error.transpose(3, 4).to(precision)).transpose(3, 4).flatten(2, 3)
    if v_error is not None and v_place is not None:
        values = values.scatter_add(3, v_place.long().clamp(max=d - 1), v_error.to(precision))
    keys = keys + _low_rank(k_a, k_b, segment, precision)
    values = values + _low_rank(v_a, v_b, segment, precision)
    return attend_listed(q, keys, values, scale, softcap, most, length, None)


def _fake(q: Tensor, *arguments: object, **options: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)


decode_gear = register(
    "decode_gear(Tensor q, Tensor k, Tensor k_range, Tensor k_a, Tensor k_b, Tensor v, Tensor v_range, Tensor v_a, "
    "Tensor v_b, float scale, int span=0, int page=0, Tensor? k_error=None, Tensor? k_place=None, Tensor? v_error=None, "
    "Tensor? v_place=None, float softcap=0.0, SymInt? most=None, Tensor? length=None, Tensor? ends=None, "
    "Tensor? range_ends=None) -> (Tensor, Tensor)",
    cpu=restored_decode,
    cuda=split_decode_gear,
    fake=_fake,
)
"""Attention of q [B, Hq, n, d] over tokens as `kvlib.policies.codec.gear.Corrected` keeps them; returns out
[B, Hq, n, d] fp32 and the natural-log lse [B, Hq, n] fp32, (0, -inf) where a row sees nothing.

k, v, v_range, softcap, most, length: as of `kvlib.kernels.decode_q4.decode_q4`, without lists.
k_range: fp16, (scale, least) of channels [B, H, T / span, 2, d], or with a span of 0 of segments.
k_a, v_a: fp16 [B, H, T, r], factors of tokens.  k_b, v_b: fp16 [B, H, S, d, r], factors of segments.
k_error, k_place: fp16 and uint8 [B, H, T / page, entries, d]: what is to be added to tokens of a page of each channel.
v_error, v_place: fp16 and uint8 [B, H, T, entries]: what is to be added to channels of each token.
ends:    int32 [B, S or more], where segments end, the last at the number of tokens or beyond; multiples of the span and
         of the page.  None: S is 1.
range_ends: where the segments of k_range end, if those of factors are several of them.  None: where the others do.
"""


def _halves(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16)


def examples() -> Iterator[Example]:
    """Launches to compile: Llama-3-8B's heads, the paper's 4 bits of a range per channel and segment first."""
    for bits, span, groups, d, rank, entries in (
        (4, 0, 1, 128, 4, 2),
        (4, 0, 1, 128, 4, 0),
        (2, 64, 2, 128, 4, 2),
        (2, 64, 2, 128, 4, 0),
        (4, 64, 2, 128, 8, 2),
        (8, 0, 1, 128, 4, 2),
        (4, 0, 1, 64, 4, 2),
        (4, 0, 1, 128, 4, 6),
    ):
        tokens, segments, page = 16384, 8, 128
        q = torch.empty(1, 32, 1, d, dtype=torch.bfloat16)
        codes = torch.empty(1, 8, tokens, d * bits // 8, dtype=torch.uint8)
        k_range = _halves(1, 8, tokens // span if span else segments, 2, d)
        v_range = _halves(1, 8, tokens, 2, groups)
        a, b = _halves(1, 8, tokens, rank), _halves(1, 8, segments, d, rank)
        options: dict[str, Any] = {
            "q": q,
            "k": codes,
            "k_range": k_range,
            "k_a": a,
            "k_b": b,
            "v": codes,
            "v_range": v_range,
        }
        options |= {"v_a": a, "v_b": b, "length": torch.zeros(1, 8, dtype=torch.int32)}
        ends = torch.zeros(1, segments, dtype=torch.int32)
        options |= {"ends": ends} | ({} if span else {"range_ends": ends})
        if entries:
            options["k_error"] = _halves(1, 8, tokens // page, entries, d)
            options["v_error"] = _halves(1, 8, tokens, entries)
            options |= {f"{side}_place": options[f"{side}_error"].byte() for side in "kv"}

        def launch(options: dict[str, Any] = options, span: int = span, page: int = page) -> object:
            return split_decode_gear(**options, scale=0.1, span=span, page=page)

        per_token = 2 * codes.shape[-1] + 4 * groups + 4 * rank + 3 * entries * (1 + d / page)
        ranges = 4 * d / span if span else 0
        tile = {"decode_corrected": int(rows_of(bits, bits, d, entries) * (per_token + ranges))}
        keys = f"{span} tokens" if span else "segment"
        yield Example(f"{bits} bits, a range per {keys}, rank {rank}, {entries} entries, d {d}", launch, tile)
