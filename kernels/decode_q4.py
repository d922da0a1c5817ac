"""Attention of few query rows over keys and values of 2, 4 or 8 bits, read where they lie and never written out.

A program is one warp with a chunk of one list: what it knows of its tokens no other warp has to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels.code_tiles import (
    add_values,
    channel_keys,
    find_chunk,
    group_weights,
    load,
    load_queries,
    of_head,
    products,
    query_sums,
    softmax_rows,
    store_rows,
    token_scores,
    zeros,
)
from kvlib.kernels.decode import chunk_of, gathered_decode, merge_splits
from kvlib.kernels.launch import Example, jit, power, softcapped, tl
from kvlib.kernels.ops import register
from kvlib.kernels.quantise import unpack
from kvlib.kernels.take import take

BITS = (2, 4, 8)
ALL = 1 << 30  # span of a row of ranges for all tokens; their address must not look constant, or it leaves the loop


@jit(do_not_specialize=["rows", "n", "most"])
def decode_codes(
    Q,
    K,
    K_RANGE,
    V,
    V_RANGE,
    OUT,
    LSE,
    LENGTH,
    IDS,
    factor,
    rows,
    n,
    most,
    q_steps,  # strides of sequences, heads and rows or tokens
    k_steps,
    k_range_steps,
    v_steps,
    v_range_steps,
    ids_steps,
    HEADS: tl.constexpr,  # lists per sequence
    SHARE: tl.constexpr,  # lists per KV head
    GROUP: tl.constexpr,  # query heads per list
    D: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,  # tokens of a row of K_RANGE
    GROUPS: tl.constexpr,  # of channels of a value
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R_BLOCK: tl.constexpr,
):
    """One chunk of one list: its softmax-normalised output and log-sum-exp."""
    WIDTH: tl.constexpr = D * K_BITS // 8
    w = tl.program_id(0)
    row, lo, hi = find_chunk(LENGTH, w, rows, most, CHUNK, WHOLE, R_BLOCK)
    if row >= rows:
        return
    b = (row // HEADS).to(tl.int64)
    h = (row % HEADS).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = m < GROUP * n
    j = tl.arange(0, BLOCK_N)
    ck = tl.arange(0, BLOCK_K)[None, :]
    q_at = of_head(Q, q_steps, b, h * GROUP)
    offsets = (m // n).to(tl.int64) * q_steps[1] + m % n * q_steps[2]
    step: tl.constexpr = K_BITS if KEYS == "token" else 0
    q = load_queries(q_at, offsets, mine, factor, WIDTH, BLOCK_K, step, 8 // K_BITS)
    q_sum = query_sums(q, step, 8 // K_BITS)
    k_at, k_range_at = of_head(K, k_steps, b, h // SHARE), of_head(K_RANGE, k_range_steps, b, h // SHARE)
    v_at, v_range_at = of_head(V, v_steps, b, h // SHARE), of_head(V_RANGE, v_range_steps, b, h // SHARE)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    lows = zeros(BLOCK_N, BLOCK_M, GROUPS)
    acc = zeros(BLOCK_V, BLOCK_M, max(16 // V_BITS, 2 * GROUPS))
    for begin in range(lo, hi, BLOCK_N):
        within = tl.minimum(j, hi - begin - 1)  # past the end the last token again, whose weight is then 0
        if IDS is None:
            first = tl.cast(begin, tl.int64)
            slot = within
        else:
            first = tl.cast(0, tl.int64)
            slot = tl.load(of_head(IDS, ids_steps, b, h) + begin + within).to(tl.int64)
        k = load(k_at + first * k_steps[2], (slot * k_steps[2])[:, None], ck, WIDTH, BLOCK_K)
        s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if KEYS == "token":
            s = token_scores(k, k_range_at + first * k_range_steps[2] + slot * k_range_steps[2], q, q_sum, s, K_BITS)
        else:
            if KEYS == "span":
                at = tl.full([1, 1], begin // SPAN, tl.int64)
            else:
                at = ((first + slot) // SPAN)[:, None]
            keys = channel_keys(k, k_range_at, at * k_range_steps[2], K_BITS, KEYS, D, BLOCK_N, BLOCK_K)
            s = products(keys, q, s, 8 // K_BITS)
        if CAP > 0:
            s = softcapped(s, CAP) * 1.4426950408889634
        s = tl.where((j < hi - begin)[:, None], s, float("-inf"))
        p, alpha, top, total = softmax_rows(s, top, total)
        weights, lows = group_weights(
            p, alpha, lows, v_range_at + first * v_range_steps[2], slot * v_range_steps[2], GROUPS
        )
        acc = add_values(acc, alpha, weights, v_at + first * v_steps[2], slot * v_steps[2], V_BITS, GROUPS, D, BLOCK_V)

    at_rows = (row if WHOLE else w).to(tl.int64) * GROUP * n
    store_rows(OUT, LSE, at_rows, m, mine, top, total, acc, lows, V_BITS, GROUPS, D, BLOCK_V, WHOLE)


def bits_of(codes: Tensor, d: int) -> int:
    """Bits of a code of d channels; raises ValueError unless they are 2, 4 or 8."""
    bits = codes.shape[-1] * 8 // d
    if bits not in BITS or codes.shape[-1] * 8 != d * bits or d % 16:
        raise ValueError(
            f"{codes.shape[-1]} bytes for {d} channels: give codes of 2, 4 or 8 bits, and a multiple of 16 channels"
        )
    return bits


def groups_of(v_range: Tensor, d: int) -> int:
    """Groups of channels of a value; raises ValueError where they are not blocks of whole words."""
    groups = v_range.shape[-1]
    if groups & (groups - 1) or d % (2 * groups):
        raise ValueError(f"{groups} groups of {d} channels: give a power of two, and an even number of channels in each")
    return groups


def tile_of(bits: int, d: int) -> int:
    """Tokens of a round: what registers hold of keys and values of up to `bits` bits."""
    return 32 if bits * d <= 512 else 16


def words(x: Tensor) -> Tensor:
    """Ranges [..., 2, groups] fp16 as int32 words [..., groups]."""
    return x.view(*x.shape[:-2], 2 * x.shape[-1]).view(torch.int32)


def sizes(lists: Tensor | None, length: Tensor | None, heads: int) -> int:
    """Lists per sequence: the KV heads', or the query heads' where `lists` or `length` has one for each."""
    return max(heads, *(x.shape[1] for x in (lists, length) if x is not None and x.dim() > 1), 1)


def flat(length: Tensor | None, batch: int, lists: int) -> Tensor | None:
    """Lengths [B], [B, 1] or [B, lists] with an entry for each list."""
    return None if length is None else length.view(batch, -1).expand(batch, lists).contiguous().view(-1)


def merged(
    part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, length: Tensor | None, rows: int, most: int, chunk: int
) -> None:
    """Join the chunks of `rows` lists: `merge_splits` with many of them at a time, since each is small."""
    _, m, d = part.shape
    merge_splits[(rows, m)](
        part,
        part_lse,
        out,
        lse,
        length,
        rows,
        most,
        m,
        DV=d,
        CHUNK=chunk,
        BLOCK_DV=power(d),
        BLOCK_C=64 if d <= 128 else 32,
        R_BLOCK=power(rows),
        num_warps=4,
    )


def split_decode_q4(
    q: Tensor,
    k: Tensor,
    k_range: Tensor,
    v: Tensor,
    v_range: Tensor,
    scale: float,
    span: int = 1,
    softcap: float = 0.0,
    most: int | None = None,
    length: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `decode_codes`, and `merge_splits` where a list has several chunks; arguments as of `decode_q4`."""
    batch, q_heads, n, d = q.shape
    heads, k_bits, v_bits, groups = k.shape[1], bits_of(k, d), bits_of(v, d), groups_of(v_range, d)
    lists = sizes(ids, length, heads)
    group, rows = q_heads // lists, batch * lists
    most = (k.shape[2] if ids is None else ids.shape[-1]) if most is None else most
    by_token = k_range.shape[-1] == 1
    span = ALL if k_range.shape[2] == 1 else span
    tile = tile_of(max(k_bits, v_bits), d)
    keys = "token" if by_token else "span" if ids is None and span % tile == 0 else "entry"
    k_words = words(k_range).squeeze(-1) if by_token else k_range.view(*k_range.shape[:3], 2 * d)
    v, v_words = v.view(torch.int16), words(v_range)
    ids = None if ids is None else ids.expand(batch, lists, -1)
    length = flat(length, batch, lists)
    chunk = chunk_of(most // 2)  # a program is one warp: more of them than of larger ones fill a GPU
    whole = most <= chunk
    items = rows * max(1, -(-most // chunk))
    out = q.new_empty((batch, q_heads, n, d), dtype=torch.float32)
    lse = q.new_empty((batch, q_heads, n), dtype=torch.float32)
    part, part_lse = out, lse
    if not whole:
        part = q.new_empty((items, group * n, d), dtype=torch.float32)
        part_lse = q.new_empty((items, group * n), dtype=torch.float32)
    block_m = 8 if group * n <= 8 or d > 128 else 16
    decode_codes[(rows if whole else items, -(-group * n // block_m))](
        q,
        k,
        k_words,
        v,
        v_words,
        part,
        part_lse,
        length,
        ids,
        scale * (1.0 if softcap else 1.4426950408889634),
        rows,
        n,
        most,
        q.stride()[:3],
        k.stride()[:3],
        k_words.stride()[:3],
        v.stride()[:3],
        v_words.stride()[:3],
        None if ids is None else ids.stride()[:2],
        HEADS=lists,
        SHARE=max(1, lists // heads),
        GROUP=group,
        D=d,
        K_BITS=k_bits,
        V_BITS=v_bits,
        KEYS=keys,
        SPAN=span,
        GROUPS=groups,
        CHUNK=chunk,
        CAP=softcap,
        WHOLE=whole,
        BLOCK_M=block_m,
        BLOCK_K=max(16, power(d * k_bits // 8)),
        BLOCK_V=max(16, power(d * v_bits // 16 // max(1, groups * v_bits // 8))),
        BLOCK_N=tile,
        R_BLOCK=power(rows),
        num_warps=1,
        num_stages=3,
    )
    if not whole:
        merged(part, part_lse, out, lse, length, rows, most, chunk)
    return out, lse


def levels(codes: Tensor, found: Tensor, d: int, span: int, dtype: torch.dtype) -> Tensor:
    """The values [B, H, T, d] of codes with ranges of tokens or of channels; arguments as of `decode_q4`."""
    scale, least = found.to(dtype).unbind(3)
    if found.shape[-1] < d:
        scale, least = (x.repeat_interleave(d // found.shape[-1], 3) for x in (scale, least))
    elif found.shape[2] > 1:
        row = torch.arange(codes.shape[2], device=codes.device) // span
        scale, least = (x.index_select(2, row) for x in (scale, least))
    return unpack(codes, bits_of(codes, d)).to(dtype) * scale + least


def unpacked_decode(
    q: Tensor,
    k: Tensor,
    k_range: Tensor,
    v: Tensor,
    v_range: Tensor,
    scale: float,
    span: int = 1,
    softcap: float = 0.0,
    most: int | None = None,
    length: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by unpacking all tokens, in q's precision but at least fp32; arguments as of `decode_q4`."""
    d = q.shape[3]
    precision = torch.promote_types(q.dtype, torch.float32)
    keys, values = levels(k, k_range, d, span, precision), levels(v, v_range, d, 1, precision)
    return attend_listed(q, keys, values, scale, softcap, most, length, ids)


def attend_listed(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    most: int | None,
    length: Tensor | None,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gathered_decode` over keys and values [B, H, T, d] that mean nothing, not even numbers, where no list says so."""
    batch, heads = keys.shape[:2]
    lists = sizes(ids, length, heads)
    most = (keys.shape[2] if ids is None else ids.shape[-1]) if most is None else most
    t = torch.arange(most, device=q.device)
    slot = (t if ids is None else ids[..., :most]).expand(batch, lists, -1)
    if length is not None:
        dead = t >= length.view(batch, -1, 1)
        slot = slot.masked_fill(dead, 0)
    keys, values = (take(x, slot, heads) for x in (keys, values))
    if length is not None:
        keys, values = (x.masked_fill(dead.unsqueeze(-1), 0.0) for x in (keys, values))
    return gathered_decode(q, keys, values, scale, softcap, length=length)


def _fake(q: Tensor, *arguments: object, **options: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)


decode_q4 = register(
    "decode_q4(Tensor q, Tensor k, Tensor k_range, Tensor v, Tensor v_range, float scale, int span=1, float softcap=0.0, "
    "SymInt? most=None, Tensor? length=None, Tensor? ids=None) -> (Tensor, Tensor)",
    cpu=unpacked_decode,
    cuda=split_decode_q4,
    fake=_fake,
)
"""Attention of q [B, Hq, n, d] over the listed tokens of codes k, v [B, H, T, d * bits / 8] uint8 as
`kvlib.kernels.quantise.pack` packs them, 2, 4 or 8 bits each; returns out [B, Hq, n, d] fp32 and the natural-log lse
[B, Hq, n] fp32, (0, -inf) where a row sees nothing.  A value is code * scale + least.

k_range: fp16, (scale, least) of tokens [B, H, T, 2, 1] or of channels [B, H, T / span, 2, d].
v_range: fp16 [B, H, T, 2, groups], of `groups` blocks of neighbouring channels, a power of two.
span:    neighbouring tokens that share a range of channels; of no meaning where k_range has one row for all.
softcap: logits are softcap * tanh(scale * q.k / softcap); 0: plain.
most:    the most tokens of any list, on the host; None: what k or ids have room for.
length:  int32 [B], [B, 1] or [B, L] tokens of each list; None: `most`.
ids:     int [B, L, m] or [B, 1, m], the tokens of each list; None: the first ones.  L: KV heads or query heads.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: Llama-3-8B's heads, 4 bits, channels' ranges over 128 tokens first."""
    for bits, span, groups, d, n, *kind in (
        (4, 128, 1, 128, 1),
        (4, 64, 2, 128, 1),
        (4, 32, 4, 128, 1),
        (4, 0, 1, 128, 1),
        (4, 1, 1, 128, 1),
        (8, 128, 1, 128, 1),
        (8, 1, 1, 128, 1),
        (2, 128, 1, 128, 1),
        (2, 32, 4, 128, 1),
        (2, 1, 1, 128, 1),
        (4, 128, 1, 64, 1),
        (4, 128, 1, 256, 1),
        (4, 128, 1, 128, 4),
        (4, 128, 1, 128, 1, "listed"),
        (2, 32, 4, 128, 1, "listed"),
        (4, 1, 1, 128, 1, "whole"),
        (4, 1, 1, 128, 1, "listed", "in rows of bytes"),
        (8, 1, 1, 128, 1, "listed", "in rows of bytes"),
    ):
        tokens = 64 if "whole" in kind else 16384
        q = torch.empty(1, 32, n, d, dtype=torch.bfloat16)
        codes = torch.empty(1, 8, tokens, d * bits // 8, dtype=torch.uint8)
        k_range = torch.empty(1, 8, tokens // (span or tokens), 2, 1 if span == 1 else d, dtype=torch.float16)
        v_range = torch.empty(1, 8, tokens, 2, groups, dtype=torch.float16)
        length = torch.zeros(1, 8, dtype=torch.int32)
        ids = torch.zeros(1, 8, 2048, dtype=torch.int64) if "listed" in kind else None
        if "in rows of bytes" in kind:  # as tiles hold them: a token's parts side by side, all heads in one pool
            width = codes.shape[3]
            rows = torch.empty(1, 1, tokens, width + 4 * groups, dtype=torch.uint8)
            codes, v_range = rows[..., :width], rows[..., width:].view(torch.float16).view(1, 1, tokens, 2, groups)
            k_range = v_range

        def launch(
            q: Tensor = q,
            x: Tensor = codes,
            k: Tensor = k_range,
            v: Tensor = v_range,
            length: Tensor = length,
            ids: Tensor | None = ids,
            span: int = span,
        ) -> object:
            return split_decode_q4(q, x, k, x, v, q.shape[-1] ** -0.5, span=span, length=length, ids=ids)

        keys = "token" if span == 1 else f"{span or 'all'} tokens of a channel"
        ranges = 4 * groups + 4 * (1 if span == 1 else d / span if span else 0)
        tile = {"decode_codes": int(tile_of(bits, d) * (2 * codes.shape[-1] + ranges))}
        name = f"{bits} bits, a range per {keys}, {groups} of a value, d {d}, n {n}"
        yield Example(", ".join([name, *kind]), launch, tile)
