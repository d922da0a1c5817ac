"""Attention of a chunk of a prompt over the blocks, columns and spans of keys that each head reads.

Every block of query rows walks a list of its own, tile by tile, with an online softmax: FlashAttention-2 (arXiv 2307.08691)
whose inner loop goes where a list says, as in MInference (arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766).  Heads that
only read the first and newest keys (DuoAttention, arXiv 2410.10819) need no list.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels.launch import Example, cast, dot, jit, power, softcapped, softmax_step, tl
from kvlib.kernels.ops import register
from kvlib.kernels.ran import note


@jit
def attend_tile(
    q,
    k_at,
    v_at,
    t,
    live,
    place,
    window,
    top,
    total,
    acc,
    scale,
    stride_kt,
    stride_kd,
    stride_vt,
    stride_vd,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAP: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One tile of keys t [tokens], of which those `live` are real, for the query rows that stand at `place`."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    slot = t.to(tl.int64)
    k_at += slot[None, :] * stride_kt + d[:, None] * stride_kd
    k = tl.load(k_at, mask=live[None, :] & (d < D)[:, None], other=0.0)
    if CAP > 0:
        s = softcapped(dot(q, k, None) * scale, CAP) * 1.4426950408889634
    else:
        s = dot(q, k, None) * (scale * 1.4426950408889634)
    seen = tl.where(live, t, 2147483647)[None, :] <= place[:, None]
    if BAND:
        seen = seen & (t[None, :] > (place - window)[:, None])
    p, alpha, top, total = softmax_step(tl.where(seen, s, float("-inf")), top, total)
    v_at += slot[:, None] * stride_vt + dv[None, :] * stride_vd
    v = tl.load(v_at, mask=live[:, None] & (dv < DV)[None, :], other=0.0)
    acc = dot(cast(p, v.dtype), v, acc * alpha[:, None])
    return top, total, acc


@jit(do_not_specialize=["n", "keys", "columns", "window", "sink"])
def prefill_sparse_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    BLOCKS,
    COUNT,
    COLUMNS,
    START,
    scale,
    n,
    keys,
    columns,
    window,
    sink,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_bb,
    stride_bh,
    stride_bn,
    stride_bm,
    stride_nb,
    stride_nh,
    stride_nn,
    stride_cb,
    stride_ch,
    stride_cm,
    GROUP: tl.constexpr,  # query heads per KV head
    SHARE: tl.constexpr,  # query heads per list
    D: tl.constexpr,
    DV: tl.constexpr,
    CAP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A block of query rows of one head, or part of it."""
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # the newest rows, which may read most, first
    block = (part * BLOCK_M // BLOCK).to(tl.int64)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = part * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    place = tl.where(i < n, keys - n + i, -1)
    low = keys - n + part * BLOCK_M  # where the first row stands
    end = tl.minimum(low + BLOCK_M, keys)  # the first key that no row sees
    first = 0
    if START is not None:
        first = tl.load(START + b).to(tl.int32)
    kept = tl.minimum(first + sink, end)

    row = i.to(tl.int64)
    q_at = Q + b * stride_qb + h.to(tl.int64) * stride_qh + row[:, None] * stride_qn + d[None, :] * stride_qd
    q = tl.load(q_at, mask=(i < n)[:, None] & (d < D)[None, :], other=0.0)
    k_at = K + b * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v_at = V + b * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    own = (h // SHARE).to(tl.int64)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if BLOCKS is not None:
        TILES: tl.constexpr = BLOCK // BLOCK_N
        count = tl.load(COUNT + b * stride_nb + own * stride_nh + block * stride_nn)
        list_at = BLOCKS + b * stride_bb + own * stride_bh + block * stride_bn
        for e in range(count * TILES):
            t = tl.load(list_at + e // TILES * stride_bm) * BLOCK + e % TILES * BLOCK_N + j
            live = (t >= first) & (t < keys)
            top, total, acc = attend_tile(
                q, k_at, v_at, t, live, place, 0, top, total, acc, scale,
                stride_kt, stride_kd, stride_vt, stride_vd, D, DV, CAP, False, BLOCK_D, BLOCK_DV
            )  # fmt: skip
    if COLUMNS is not None:
        columns_at = COLUMNS + b * stride_cb + own * stride_ch
        for begin in range(0, columns, BLOCK_N):
            t = tl.load(columns_at + (begin + j) * stride_cm, mask=begin + j < columns, other=-1).to(tl.int32)
            live = (t >= first) & (t < keys)
            top, total, acc = attend_tile(
                q, k_at, v_at, t, live, place, 0, top, total, acc, scale,
                stride_kt, stride_kd, stride_vt, stride_vd, D, DV, CAP, False, BLOCK_D, BLOCK_DV
            )  # fmt: skip
    if SPAN:
        for begin in range(first, kept, BLOCK_N):
            t = begin + j
            top, total, acc = attend_tile(
                q, k_at, v_at, t, t < kept, place, 0, top, total, acc, scale,
                stride_kt, stride_kd, stride_vt, stride_vd, D, DV, CAP, False, BLOCK_D, BLOCK_DV
            )  # fmt: skip
        for begin in range(tl.maximum(kept, low - window + 1), end, BLOCK_N):
            t = begin + j
            top, total, acc = attend_tile(
                q, k_at, v_at, t, t < end, place, window, top, total, acc, scale,
                stride_kt, stride_kd, stride_vt, stride_vd, D, DV, CAP, True, BLOCK_D, BLOCK_DV
            )  # fmt: skip

    dead = total == 0.0
    safe = tl.where(dead, 1.0, total)
    lse = tl.where(dead, float("-inf"), (top + tl.log2(safe)) * 0.6931471805599453)
    at = (b * tl.num_programs(1) + h) * n + row
    tl.store(OUT + at[:, None] * DV + dv[None, :], acc / safe[:, None], mask=(i < n)[:, None] & (dv < DV)[None, :])
    tl.store(LSE + at, lse, mask=i < n)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel does: fp32 products, which are not rounded to tf32, have no room for tiles of a prompt."""
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    return half and max(q.shape[3], v.shape[3]) <= 256


def tile_of(block: int, d: int) -> tuple[int, int, int]:
    """Query rows, keys and warps of a tile; an accumulator of large heads has room for few rows."""
    return (block, 64, block // 16) if d <= 128 else (64, 32, 8)


def walk_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    block: int = 64,
    softcap: float = 0.0,
    blocks: Tensor | None = None,
    count: Tensor | None = None,
    columns: Tensor | None = None,
    window: int | None = None,
    sink: int = 0,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `prefill_sparse_kernel`, or gather where it does not serve; arguments as of `prefill_sparse`."""
    note("prompts", "Triton" if serves(q, k, v) else "torch")
    if not serves(q, k, v):
        out, lse = gathered_prefill(q, k, v, scale, block, softcap, blocks, count, columns, window, sink, start)
        return out.float(), lse.float()
    batch, q_heads, n, d = q.shape
    keys, dv, lists = k.shape[2], v.shape[3], _lists(k, blocks, columns)
    blocks, count = (None if x is None else x.expand(batch, lists, *x.shape[2:]) for x in (blocks, count))
    columns = None if columns is None else columns.expand(batch, lists, -1)
    out = q.new_empty((batch, q_heads, n, dv), dtype=torch.float32)
    lse = q.new_empty((batch, q_heads, n), dtype=torch.float32)
    rows, tokens, warps = tile_of(block, d)
    prefill_sparse_kernel[(-(-n // rows), q_heads, batch)](
        q,
        k,
        v,
        out,
        lse,
        blocks,
        count,
        columns,
        start,
        scale,
        n,
        keys,
        0 if columns is None else columns.shape[2],
        0 if window is None else window,
        sink,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *((0, 0, 0, 0) if blocks is None else blocks.stride()),
        *((0, 0, 0) if count is None else count.stride()),
        *((0, 0, 0) if columns is None else columns.stride()),
        GROUP=q_heads // k.shape[1],
        SHARE=q_heads // lists,
        D=d,
        DV=dv,
        CAP=softcap,
        SPAN=window is not None,
        BLOCK=block,
        BLOCK_M=rows,
        BLOCK_N=tokens,
        BLOCK_D=max(16, power(d)),
        BLOCK_DV=max(16, power(dv)),
        num_warps=warps,
        num_stages=3,
    )
    return out, lse


def _lists(k: Tensor, blocks: Tensor | None, columns: Tensor | None) -> int:
    """Lists per sequence: the KV heads', or the query heads' where a list says so."""
    return max(k.shape[1], *(x.shape[1] for x in (blocks, columns) if x is not None), 0)


def gathered_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    block: int = 64,
    softcap: float = 0.0,
    blocks: Tensor | None = None,
    count: Tensor | None = None,
    columns: Tensor | None = None,
    window: int | None = None,
    sink: int = 0,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by gathering what each block of query rows reads and one softmax, in q's precision but at least fp32;
    arguments as of `prefill_sparse`."""
    batch, q_heads, n, d = q.shape
    keys, lists = k.shape[2], _lists(k, blocks, columns)
    precision = torch.promote_types(q.dtype, torch.float32)
    first = torch.zeros(1, 1, 1, dtype=torch.long, device=q.device) if start is None else start.view(-1, 1, 1)
    outs, lses = [], []
    for i in range(0, n, block):
        j = min(n, i + block)
        place = torch.arange(keys - n + i, keys - n + j, device=q.device).view(-1, 1)
        listed: list[tuple[Tensor, int | None]] = [] if columns is None else [(columns.long(), None)]
        if blocks is not None and count is not None:
            listed.append((_keys(blocks[:, :, i // block], count[:, :, i // block], block), None))
        if window is not None:
            listed += _span(first, first + sink, keys - n + i, keys - n + j, sink, window)
        slots, masks = [], []
        for t, band in listed:
            t = t.expand(batch, lists, -1)
            seen = ((t >= first) & (t < keys)).unsqueeze(2) & (t.unsqueeze(2) <= place)
            slots.append(t)
            masks.append(seen if band is None else seen & (t.unsqueeze(2) > place - band))
        slot, seen = torch.cat(slots, -1).clamp(0, keys - 1), torch.cat(masks, -1).unsqueeze(2)
        kept, values = (_gathered(x, slot).to(precision) for x in (k, v))
        s = q[:, :, i:j].reshape(batch, lists, -1, j - i, d).to(precision) @ kept.mT * scale
        s = s.div_(softcap).tanh_().mul_(softcap) if softcap else s
        s = s.masked_fill_(~seen, float("-inf"))
        lse = s.logsumexp(-1)
        p = (s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp_()
        outs.append((p @ values).view(batch, q_heads, j - i, -1))
        lses.append(lse.view(batch, q_heads, j - i))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _keys(blocks: Tensor, count: Tensor, block: int) -> Tensor:
    """The keys [B, L, S] of the first `count` [B, L] blocks [B, L, m], -1 past them."""
    most = int(count.max())
    within = torch.arange(block, device=blocks.device)
    t = blocks[..., :most, None].long() * block + within
    return t.masked_fill((torch.arange(most, device=blocks.device) >= count.unsqueeze(-1)).unsqueeze(-1), -1).flatten(2)


def _span(first: Tensor, kept: Tensor, low: int, end: int, sink: int, window: int) -> list[tuple[Tensor, int | None]]:
    """The first keys, and the newest of rows that stand at low..end - 1 with the window that hides the others."""
    newest = torch.arange(max(0, low - window + 1), end, device=first.device).expand(len(first), 1, -1)
    return [
        (first + torch.arange(sink, device=first.device), None),
        (newest.masked_fill(newest < kept, -1), window),
    ]


def _gathered(x: Tensor, slot: Tensor) -> Tensor:
    """Vectors [B, L, 1, S, d] of x [B, H, T, d], L a multiple of H or 1, at slot [B, L, S]."""
    wide = slot.shape[1] // x.shape[1]
    x = x.repeat_interleave(wide, 1) if wide > 1 else x
    return x.gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, x.shape[3])).unsqueeze(2)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object, **named: object) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3]
    return q.new_empty((*shape, v.shape[3]), dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


prefill_sparse = register(
    "prefill_sparse(Tensor q, Tensor k, Tensor v, float scale, int block=64, float softcap=0.0, Tensor? blocks=None, "
    "Tensor? count=None, Tensor? columns=None, SymInt? window=None, SymInt sink=0, Tensor? start=None) "
    "-> (Tensor, Tensor)",
    cpu=gathered_prefill,
    cuda=walk_lists,
    fake=_fake,
)
"""Causal attention of q [B, Hq, n, d], queries of the newest n of the tokens k [B, H, T, d], v [B, H, T, dv], over what is
listed for each block of `block` (64 or 128) query rows, counted from the first; returns out [B, Hq, n, dv] fp32 and the
natural-log lse [B, Hq, n] fp32, (0, -inf) where a row sees nothing.

What a row reads is the union of three, which must not overlap; there is a list per KV head, or per query head, L of them:
blocks, count: int32 [B, L, Q, m] blocks of `block` keys counted from the first, and [B, L, Q] how many of them count.
columns:       int32 [B, L, c] keys that every row reads, -1 for none.
window, sink:  without a list, the newest `window` keys, the row's own included, and the first `sink` from `start`.
start:         int [B] first real key of each row; earlier slots are padding.
softcap:       logits are softcap * tanh(scale * q.k / softcap); 0: plain.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: a chunk of Llama-3-8B's prompt by blocks first."""
    for dtype, d, block, what, softcap in (
        (torch.bfloat16, 128, 128, "blocks", 0.0),
        (torch.bfloat16, 128, 64, "blocks", 0.0),
        (torch.bfloat16, 128, 128, "blocks, columns", 0.0),
        (torch.bfloat16, 128, 64, "blocks, columns", 50.0),
        (torch.bfloat16, 128, 128, "span", 0.0),
        (torch.float16, 64, 128, "blocks, columns", 0.0),
        (torch.float16, 64, 64, "span", 0.0),
        (torch.float16, 80, 64, "blocks", 0.0),
        (torch.bfloat16, 256, 64, "blocks", 50.0),
        (torch.bfloat16, 256, 128, "span", 50.0),
    ):
        q, k = torch.empty(1, 32, 2048, d, dtype=dtype), torch.empty(1, 8, 16384, d, dtype=dtype)
        blocks = torch.zeros(1, 32, 2048 // block, 64, dtype=torch.int32) if "blocks" in what else None
        count = torch.zeros(1, 32, 2048 // block, dtype=torch.int32) if "blocks" in what else None
        columns = torch.zeros(1, 32, 1024, dtype=torch.int32) if "columns" in what else None
        start = torch.zeros(1, dtype=torch.int64)

        def launch(
            q: Tensor = q,
            k: Tensor = k,
            block: int = block,
            softcap: float = softcap,
            blocks: Tensor | None = blocks,
            count: Tensor | None = count,
            columns: Tensor | None = columns,
            window: int | None = 1024 if what == "span" else None,
            start: Tensor = start,
        ) -> object:
            return walk_lists(q, k, k, 0.1, block, softcap, blocks, count, columns, window, 64, start)

        yield Example(f"{what}, {str(dtype)[6:]}, d {d}, block {block}" + (", cap" if softcap else ""), launch)
