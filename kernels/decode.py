"""Attention of few query rows over tokens that each (sequence, KV head) lists, split among programs and merged.

One kernel serves contiguous ranges, pages, clusters, tokens and heads of different lengths: `decode_split` attends a chunk
of one head's tokens with all query heads that share it, `merge_splits` joins the chunks.  A chunk's size depends on the
capacity alone, so a row's result does not depend on the batch, nor on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvlib.kernels import host
from kvlib.kernels.launch import Example, cast, dot, find_row, first_item, jit, power, softcapped, softmax_step, tl
from kvlib.kernels.ops import register
from kvlib.kernels.ran import note
from kvlib.kernels.take import take

ROWS = 64  # query rows (group x n) that one program attends; with more, products of blocks are as fast


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `decode_split` takes these: one floating type of at most 32 bits, heads of at most 256, contiguous last."""
    alike = q.dtype == k.dtype == v.dtype and k.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return alike and max(k.shape[3], v.shape[3]) <= 256 and q.stride(3) == k.stride(3) == v.stride(3) == 1


@jit(do_not_specialize=["rows", "n", "most"])
def decode_split(
    Q,
    K,
    V,
    OUT,
    LSE,
    LENGTH,
    START,
    IDS,
    INDPTR,
    WEIGHT,
    BIAS,
    scale,
    rows,
    n,
    most,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ib,
    stride_ih,
    stride_wb,
    stride_wh,
    HEADS: tl.constexpr,  # lists per sequence
    SHARE: tl.constexpr,  # lists per KV head
    GROUP: tl.constexpr,  # query heads per list
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    LISTED: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one chunk: the result is final
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R_BLOCK: tl.constexpr,
):
    """One chunk of one list: its softmax-normalised output and log-sum-exp, in base 2 unless the row is whole."""
    w = tl.program_id(0)
    if LENGTH is None:
        per_row = tl.cdiv(most, CHUNK)
        row = w // per_row
        chunk = w % per_row
        tokens = most
    else:
        if WHOLE:
            row = w
            chunk = 0
        else:
            row, chunk = find_row(LENGTH, w, rows, CHUNK, R_BLOCK)
            if row >= rows:
                return
        tokens = tl.load(LENGTH + row)
    b = (row // HEADS).to(tl.int64)
    h = row % HEADS
    lo = chunk * CHUNK
    hi = tl.minimum(lo + CHUNK, tokens)

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    j = tl.arange(0, BLOCK_N)
    mine = m < GROUP * n
    heads = h * GROUP + m // n
    q_at = Q + b * stride_qb + heads[:, None].to(tl.int64) * stride_qh + (m % n)[:, None] * stride_qn + d[None, :]
    q = tl.load(q_at, mask=mine[:, None] & (d < D)[None, :], other=0.0)
    first = tl.zeros([], tl.int64)
    if START is not None:
        first = tl.load(START + row).to(tl.int64)
    k_at = K + b * stride_kb + (h // SHARE).to(tl.int64) * stride_kh
    v_at = V + b * stride_vb + (h // SHARE).to(tl.int64) * stride_vh
    if LISTED:
        if INDPTR is None:
            entry = b * stride_ib + h.to(tl.int64) * stride_ih
            weight = b * stride_wb + h.to(tl.int64) * stride_wh
        else:
            entry = tl.load(INDPTR + row).to(tl.int64)
            weight = entry

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for begin in range(lo, hi, BLOCK_N):
        t = begin + j
        live = t < hi
        if LISTED:
            slot = tl.load(IDS + entry + t // PAGE, mask=live, other=0).to(tl.int64) * PAGE + t % PAGE
        else:
            slot = first + t
        k = tl.load(k_at + slot[None, :] * stride_kt + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
        s = softcapped(dot(q, k, None) * scale, CAP) * 1.4426950408889634
        if WEIGHT is not None:
            s += tl.load(WEIGHT + weight + t // PAGE, mask=live, other=0.0)[None, :] * 1.4426950408889634
        seen = live[None, :]
        if CAUSAL:
            seen = seen & (t[None, :] < tokens - (n - 1 - m % n)[:, None])
        s = tl.where(seen, s, float("-inf"))
        p, alpha, top, total = softmax_step(s, top, total)
        v = tl.load(v_at + slot[:, None] * stride_vt + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0)
        acc = dot(cast(p, v.dtype), v, acc * alpha[:, None])

    dead = total == 0.0
    safe = tl.where(dead, 1.0, total)
    lse = tl.where(dead, float("-inf"), top + tl.log2(safe))
    if BIAS is not None:
        lse += tl.load(BIAS + row) * 1.4426950408889634
    if WHOLE:
        lse = lse * 0.6931471805599453
        at = row.to(tl.int64) * GROUP * n + m
    else:
        at = w.to(tl.int64) * GROUP * n + m
    tl.store(OUT + at[:, None] * DV + dv[None, :], acc / safe[:, None], mask=mine[:, None] & (dv < DV)[None, :])
    tl.store(LSE + at, lse, mask=mine)


@jit(do_not_specialize=["rows", "most"])
def merge_splits(
    PART,
    PART_LSE,
    OUT,
    LSE,
    LENGTH,
    rows,
    most,
    M,  # query rows of each list
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R_BLOCK: tl.constexpr,
):
    """Join the chunks of one query row; a row without any gives (0, -inf)."""
    row = tl.program_id(0)
    i = tl.program_id(1)
    if LENGTH is None:
        count = tl.cdiv(most, CHUNK)
        first = row * count
    else:
        count = tl.cdiv(tl.load(LENGTH + row), CHUNK)
        first = first_item(LENGTH, row, CHUNK, R_BLOCK)
    dv = tl.arange(0, BLOCK_DV)
    c = tl.arange(0, BLOCK_C)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(0, count, BLOCK_C):
        live = begin + c < count
        at = (first + begin + c).to(tl.int64) * M + i
        x = tl.load(PART_LSE + at, mask=live, other=float("-inf"))
        new = tl.maximum(top, tl.max(x, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        alpha = tl.exp2(top - safe)
        weight = tl.exp2(x - safe)
        some = weight > 0.0  # the output of a chunk that saw nothing is never multiplied in
        o = tl.load(PART + at[:, None] * DV + dv[None, :], mask=some[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * alpha + tl.sum(o * weight[:, None], axis=0)
        total = total * alpha + tl.sum(weight, axis=0)
        top = new
    dead = total == 0.0
    safe_total = tl.where(dead, 1.0, total)
    lse = tl.where(dead, float("-inf"), (top + tl.log2(safe_total)) * 0.6931471805599453)
    place = row.to(tl.int64) * M + i
    tl.store(OUT + place * DV + dv, acc / safe_total, mask=dv < DV)
    tl.store(LSE + place + tl.arange(0, 1), lse)


def chunk_of(tokens: int) -> int:
    """Tokens that one program attends of a list that may have as many as `tokens`."""
    return min(1024, max(64, power(tokens // 32)))


def tile_of(dtype: torch.dtype, d: int) -> int:
    """Tokens of a tile; fp32 products keep their operands in registers, and few fit."""
    if dtype == torch.float32:
        return 16
    return 64 if d <= 128 else 32


def rows_of(dtype: torch.dtype, d: int) -> int:
    """Query rows of a program, at most: their results are in registers, and the operands of fp32 products too."""
    if dtype == torch.float32:
        return 16
    return ROWS if d <= 64 else ROWS // 2


def _lists(q: Tensor, k: Tensor, ids: Tensor | None, indptr: Tensor | None, length: Tensor | None) -> int:
    """Lists per sequence: the KV heads', or the query heads' where one of them says so."""
    if indptr is not None:
        return (indptr.numel() - 1) // len(q)
    wide = [x.shape[1] for x in (ids, length) if x is not None and x.dim() > 1]
    return max(k.shape[1], *wide, 0)


def _most(k: Tensor, ids: Tensor | None, indptr: Tensor | None, page: int) -> int:
    """Tokens that a list may have."""
    return k.shape[2] if ids is None or indptr is not None else ids.shape[-1] * page


def _flat(x: Tensor | None, batch: int, lists: int) -> Tensor | None:
    """x [B], [B, 1] or [B, lists] with an entry for each list."""
    if x is None or x.numel() == batch * lists:
        return x
    return x.view(batch, -1).expand(batch, lists).contiguous()


def _steps(x: Tensor | None, indptr: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None or indptr is not None else x.stride()[:2]


def split_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    most: int | None = None,
    page: int = 1,
    length: Tensor | None = None,
    start: Tensor | None = None,
    ids: Tensor | None = None,
    indptr: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `decode_split`, and `merge_splits` where a list has several chunks; arguments as of `decode`."""
    batch, q_heads, n, d = q.shape
    heads, dv = k.shape[1], v.shape[3]
    lists = _lists(q, k, ids, indptr, length)
    group, rows = q_heads // lists, batch * lists
    most = _most(k, ids, indptr, page) if most is None else most
    note("decode", "Triton")
    if ids is not None and indptr is None:
        ids, weight = (None if x is None else x.expand(batch, lists, -1) for x in (ids, weight))
    chunk = chunk_of(most)
    whole = most <= chunk
    if indptr is not None and ids is not None:
        items = ids.shape[0] * page // chunk + rows
    else:
        items = rows * max(1, -(-most // chunk))
    out = q.new_empty((batch, q_heads, n, dv), dtype=torch.float32)
    lse = q.new_empty((batch, q_heads, n), dtype=torch.float32)
    if not most or not rows:
        return out.zero_(), lse.fill_(float("-inf"))
    part, part_lse = out, lse
    if not whole:
        part = q.new_empty((items, group * n, dv), dtype=torch.float32)
        part_lse = q.new_empty((items, group * n), dtype=torch.float32)
    block_m = min(rows_of(q.dtype, max(d, dv)), max(16, power(group * n)))
    r_block = power(rows)
    decode_split[(rows if whole else items, -(-group * n // block_m))](
        q,
        k,
        v,
        part,
        part_lse,
        _flat(length, batch, lists),
        _flat(start, batch, lists),
        ids,
        indptr,
        weight,
        _flat(bias, batch, lists),
        scale,
        rows,
        n,
        most,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *_steps(ids, indptr),
        *_steps(weight, indptr),
        HEADS=lists,
        SHARE=max(1, lists // heads),
        GROUP=group,
        D=d,
        DV=dv,
        PAGE=page,
        CHUNK=chunk,
        CAP=softcap,
        CAUSAL=causal and n > 1,
        LISTED=ids is not None,
        WHOLE=whole,
        BLOCK_M=block_m,
        BLOCK_D=max(16, power(d)),
        BLOCK_DV=max(16, power(dv)),
        BLOCK_N=tile_of(k.dtype, max(d, dv)),
        R_BLOCK=r_block,
        num_warps=8 if k.dtype == torch.float32 and d > 64 else 4,  # else operands do not fit in registers
        num_stages=3,
    )
    if not whole:
        merge_splits[(rows, group * n)](
            part,
            part_lse,
            out,
            lse,
            _flat(length, batch, lists),
            rows,
            most,
            group * n,
            DV=dv,
            CHUNK=chunk,
            BLOCK_DV=power(dv),
            BLOCK_C=64,
            R_BLOCK=r_block,
            num_warps=4,
        )
    return out, lse


def gathered_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    most: int | None = None,
    page: int = 1,
    length: Tensor | None = None,
    start: Tensor | None = None,
    ids: Tensor | None = None,
    indptr: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by gathering the tokens and one softmax, in q's precision but at least fp32; arguments as of `decode`."""
    batch, _, n, d = q.shape
    lists = _lists(q, k, ids, indptr, length)
    most = _most(k, ids, indptr, page) if most is None else most
    t = torch.arange(most, device=q.device)
    if ids is None:
        slot = t.expand(batch, lists, -1)
        if start is not None:
            slot = slot + start.view(batch, -1, 1)
    else:
        entry = (t // page).expand(batch, lists, -1)
        if indptr is None:
            ids, weight = (None if x is None else x.expand(batch, lists, -1) for x in (ids, weight))
        else:
            entry = (entry + indptr[:-1].view(batch, lists, 1)).clamp(max=max(0, ids.numel() - 1)).view(1, 1, -1)
            ids, weight = (None if x is None else x.view(1, 1, -1) for x in (ids, weight))
        assert ids is not None
        slot = ids.gather(-1, entry).view(batch, lists, most) * page + t % page
        weight = None if weight is None else weight.gather(-1, entry).view(batch, lists, most)
    held = torch.full((batch, lists), most, device=q.device) if length is None else length.view(batch, -1)
    seen = t < held.expand(batch, lists).view(batch, lists, 1, 1, 1)
    if causal:
        seen = seen & (t < (held.view(batch, -1, 1, 1, 1) - (n - 1 - torch.arange(n, device=q.device)).view(-1, 1)))
    slot = slot.masked_fill(t >= held.view(batch, -1, 1), 0).long()
    precision = torch.promote_types(q.dtype, torch.float32)
    keys, values = (take(x, slot, k.shape[1]).unsqueeze(2).to(precision) for x in (k, v))
    s = q.reshape(batch, lists, -1, n, d).to(precision) @ keys.mT * scale
    s = s.div_(softcap).tanh_().mul_(softcap) if softcap else s
    s = s if weight is None else s + weight.view(batch, lists, 1, 1, most)
    s = s.masked_fill_(~seen, float("-inf"))
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp_()
    out = p @ values
    lse = lse if bias is None else lse + bias.view(batch, -1, 1, 1)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    most: int | None = None,
    page: int = 1,
    length: Tensor | None = None,
    start: Tensor | None = None,
    ids: Tensor | None = None,
    indptr: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By the compiled loop where it takes such lists, else by gathering."""
    plain = ids is not None and indptr is None and page == 1 and bias is None and not (causal and q.shape[2] > 1)
    if plain and host.serves(q, k, v):
        held = None if length is None else length.long()
        return host.decode(q, k, v, scale, ids=ids, length=held, softcap=softcap or None, bias=weight)[:2]
    note("decode", "torch")
    return gathered_decode(q, k, v, scale, softcap, causal, most, page, length, start, ids, indptr, weight, bias)


def _fake(q: Tensor, k: Tensor, v: Tensor, *arguments: object, **options: object) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3]
    return q.new_empty((*shape, v.shape[3]), dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


decode = register(
    "decode(Tensor q, Tensor k, Tensor v, float scale, float softcap=0.0, bool causal=False, SymInt? most=None, "
    "int page=1, Tensor? length=None, Tensor? start=None, Tensor? ids=None, Tensor? indptr=None, Tensor? weight=None, "
    "Tensor? bias=None) -> (Tensor, Tensor)",
    cpu=_on_cpu,
    cuda=split_decode,
    fake=_fake,
)
"""Attention of q [B, Hq, n, d] over listed tokens of k [B, H, T, d], v [B, H, T, dv]; returns out [B, Hq, n, dv] fp32 and
the natural-log lse [B, Hq, n] fp32, (0, -inf) where a row sees nothing.

There is a list per KV head, or per query head where ids [B, Hq, .] say so; L stands for either, and 1 serves all.
softcap: logits are softcap * tanh(scale * q.k / softcap); 0: plain.
causal:  query row i of n sees the first length - n + 1 + i tokens of its list.
most:    the most tokens of any list, on the host; None: what k or ids have room for.
length:  int32 [B], [B, 1] or [B, L] tokens of each list; None: `most`.
start:   int [B] or [B, L], first token in k where the list is a range.
ids:     int [B, L, m] or [B, 1, m], or [m] with `indptr` int [B * L + 1]: entries of `page` neighbouring tokens each.
weight:  fp32, like ids: added to an entry's logits, such as the log of a count.
bias:    fp32 [B, L], added to the lse: a list that counts for more.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: Llama-3-8B's heads first; last a small tail, a padded row, tokens that a mask hides."""
    for dtype, d, page, n, more in (
        (torch.bfloat16, 128, 0, 1, ""),
        (torch.bfloat16, 128, 1, 1, ""),
        (torch.bfloat16, 128, 16, 1, ""),
        (torch.bfloat16, 128, 0, 8, ""),
        (torch.bfloat16, 64, 0, 1, ""),
        (torch.bfloat16, 256, 0, 1, ""),
        (torch.float16, 80, 16, 1, ""),
        (torch.float32, 128, 0, 1, ""),
        (torch.float32, 64, 1, 1, ""),
        (torch.float32, 256, 0, 1, ""),
        (torch.float32, 128, 0, 16, ""),
        (torch.float32, 256, 0, 16, ""),
        (torch.bfloat16, 128, 1, 16, ""),
        (torch.bfloat16, 256, 0, 16, ""),
        (torch.bfloat16, 128, 0, 1, "whole"),
        (torch.bfloat16, 128, 0, 1, "start"),
        (torch.bfloat16, 128, 1, 1, "weight"),
    ):
        q = torch.empty(1, 32, n, d, dtype=dtype)
        k = torch.empty(1, 8, 64 if more == "whole" else 16384, d, dtype=dtype)
        ids = torch.zeros(1, 8, 16384 // page, dtype=torch.int64) if page else None
        options: dict[str, Any] = {"length": torch.zeros(1, 8, dtype=torch.int32), "ids": ids, "page": max(page, 1)}
        options["start"] = torch.zeros(1, 8, dtype=torch.int64) if more == "start" else None
        options["weight"] = torch.zeros(1, 8, 16384) if more == "weight" else None

        def launch(q: Tensor = q, k: Tensor = k, options: dict[str, Any] = options) -> object:
            return split_decode(q, k, k, q.shape[-1] ** -0.5, causal=True, **options)

        kind = f"pages of {page}" if page > 1 else "tokens" if page else "range"
        tile = tile_of(dtype, d) * 2 * d * k.element_size()
        name = f"{kind}, {str(dtype)[6:]}, d {d}, n {n}" + (f", {more}" if more else "")
        yield Example(name, launch, {"decode_split": tile})
