"""Which tokens the best units stand for: one launch that writes them out, and one that cuts the unit that fits in part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels.launch import Example, cast, dot, jit, power, softcapped, tl
from kvlib.kernels.rank import packed, place_of, sortable

LONGEST = 512  # tokens of a unit that one program can cut


@jit(do_not_specialize=["room", "longest", "k", "width"])
def write_units(
    ORDER,
    START,
    SIZE,
    ROOM,
    IDS,
    BEFORE,
    LENGTH,
    room,
    longest,
    k,
    width,
    stride_ob,
    stride_oh,
    stride_sb,
    stride_sh,
    stride_zb,
    stride_zh,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """The tokens of one list: units until the room is full, each where those before it end, then zeros."""
    row = tl.program_id(0)
    b = (row // LISTS).to(tl.int64)
    h = (row % LISTS).to(tl.int64)
    if ROOM is not None:
        room = tl.load(ROOM + b).to(tl.int32)
    out = IDS + row.to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_J)
    begin = tl.zeros([], tl.int32)
    done = tl.zeros([], tl.int32)  # tokens of the units so far
    before = tl.zeros([], tl.int32)
    length = tl.zeros([], tl.int32)
    while (begin < k) & (done < room):
        live = begin + i < k
        unit = tl.load(ORDER + b * stride_ob + h * stride_oh + begin + i, mask=live, other=0)
        size = tl.load(SIZE + b * stride_zb + h * stride_zh + unit, mask=live, other=0).to(tl.int32)
        first = tl.load(START + b * stride_sb + h * stride_sh + unit, mask=live, other=0).to(tl.int64)
        ends = done + tl.cumsum(size, 0)
        begins = ends - size
        listed = live & (begins < room)
        for some in range(0, longest, BLOCK_J):
            place = some + j
            mask = listed[:, None] & (place[None, :] < size[:, None])
            tl.store(out + begins[:, None] + place[None, :], first[:, None] + place[None, :], mask=mask)
        before = tl.maximum(before, tl.max(tl.where(ends <= room, ends, 0), 0))
        length = tl.maximum(length, tl.max(tl.where(listed & (size > 0), ends, 0), 0))
        done += tl.sum(size, 0)
        begin += BLOCK
    for at in range(length, width, BLOCK):
        tl.store(out + at + i, tl.zeros([BLOCK], tl.int64), mask=at + i < width)
    tl.store(BEFORE + row, before.to(tl.int64))
    tl.store(LENGTH + row, length.to(tl.int64))


def written_units(
    order: Tensor, start: Tensor, size: Tensor, room: Tensor | None, space: int, most: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `write_units`; arguments as of `kvlib.kernels.selection.searched_units`."""
    batch, lists, k = order.shape
    width = most + longest - 1
    ids = order.new_empty((batch, lists, width))
    before, length = order.new_empty((2, batch, lists, 1))
    write_units[(batch * lists,)](
        order,
        start,
        size,
        room,
        ids,
        before,
        length,
        space,
        longest,
        k,
        width,
        *order.stride()[:2],
        *start.stride()[:2],
        *size.stride()[:2],
        LISTS=lists,
        BLOCK=128,
        BLOCK_J=16,
        num_warps=4,
    )
    return ids, before, length


@jit(do_not_specialize=["before", "length", "width", "most", "longest"])
def cut_unit(
    Q,
    K,
    IDS,
    BEFORE,
    LENGTH,
    OUT,
    scale,
    before,
    length,
    width,
    most,
    longest,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_ib,
    stride_ih,
    stride_bb,
    stride_bh,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that read the same keys for a list
    CAP: tl.constexpr,
    VOTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The tokens of one list that fit, then those of the next unit by the votes of their true scores."""
    row = tl.program_id(0)
    b = (row // LISTS).to(tl.int64)
    h = row % LISTS
    if BEFORE is not None:
        before = tl.load(BEFORE + b * stride_bb + h * stride_bh).to(tl.int32)
        length = tl.load(LENGTH + b * stride_bb + h * stride_bh).to(tl.int32)
    ids = IDS + b * stride_ib + h.to(tl.int64) * stride_ih
    out = OUT + row.to(tl.int64) * most
    j = tl.arange(0, BLOCK_L)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = (j < longest) & (before + j < length)
    slot = tl.load(ids + tl.minimum(before + j, width - 1)).to(tl.int64)
    score = tl.zeros([BLOCK_L], tl.float32)
    for i in range(HEADS // LISTS if HEADS > LISTS else 1):
        kv = h * (HEADS // LISTS) + i if HEADS > LISTS else h // (LISTS // HEADS)
        heads = (h * (HEADS // LISTS) + i if HEADS > LISTS else h) * GROUP + m
        q_at = Q + b * stride_qb + heads[:, None].to(tl.int64) * stride_qh + d[None, :]
        k_at = K + b * stride_kb + kv.to(tl.int64) * stride_kh + slot[None, :] * stride_kt + d[:, None]
        s = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
        for c in range(0, D, BLOCK_D):
            q = tl.load(q_at + c, mask=(m < GROUP)[:, None] & (c + d < D)[None, :], other=0.0)
            k = tl.load(k_at + c, mask=inside[None, :] & (c + d < D)[:, None], other=0.0)
            s = dot(cast(q.to(tl.float32), k.dtype), k, s)
        s = tl.where(inside[None, :], softcapped(s * scale, CAP), float("-inf"))
        if VOTE:
            s *= 1.4426950408889634
            top = tl.max(s, 1)
            p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
            total = tl.sum(p, 1)
            p = p / tl.where(total == 0.0, 1.0, total)[:, None]
        else:
            p = s
        score += tl.sum(tl.where((m < GROUP)[:, None], p, 0.0), 0)
    key = tl.where(j < longest, sortable(tl.where(inside, score, float("-inf"))), -0x80000000)
    chosen = place_of(tl.sort(packed(key, j), descending=True)).to(tl.int32)
    best = tl.load(ids + tl.minimum(before + chosen, width - 1), mask=j < longest, other=0)
    last = tl.sum(tl.where(j == longest - 1, best, 0), 0)
    tl.store(out + before + j, best, mask=(j < longest) & (before + j < most))
    for at in range(0, most, BLOCK_L):
        place = at + j
        whole = place < before
        same = tl.load(ids + place, mask=whole & (place < most), other=0)
        outside = whole | (place >= before + longest)
        tl.store(out + place, tl.where(whole, same, last), mask=outside & (place < most))


def cut_lists(
    q: Tensor,
    k: Tensor,
    ids: Tensor,
    before: Tensor | None,
    length: Tensor | None,
    fits: int,
    listed: int,
    scale: float,
    softcap: float,
    most: int,
    longest: int,
) -> Tensor:
    """Launch `cut_unit`; arguments as of `kvlib.kernels.selection.gathered_cut`."""
    batch, q_heads, d = q.shape
    heads, (lists, width) = k.shape[1], ids.shape[1:]
    group = q_heads // max(lists, heads)
    block = max(16, power(longest))
    if before is not None and length is not None:
        before, length = (x.expand(batch, lists, 1).contiguous() for x in (before, length))
    out = ids.new_empty((batch, lists, most))
    cut_unit[(batch * lists,)](
        q,
        k,
        ids,
        before,
        length,
        out,
        scale,
        fits,
        listed,
        width,
        most,
        longest,
        *q.stride()[:2],
        *k.stride()[:3],
        *ids.stride()[:2],
        lists,
        1,
        LISTS=lists,
        HEADS=heads,
        GROUP=group,
        CAP=softcap,
        VOTE=lists != q_heads,
        D=d,
        BLOCK_M=max(16, power(group)),
        BLOCK_D=32,
        BLOCK_L=block,
        num_warps=max(4, block // 64),
        num_stages=2,
    )
    return out


def examples() -> Iterator[Example]:
    """Launches to compile: clusters of 64 tokens at most first."""
    order = torch.zeros(1, 8, 2048, dtype=torch.int64)
    start = torch.zeros(1, 8, 8192, dtype=torch.int32)
    room = torch.zeros(1, 1, 1, dtype=torch.int64)
    yield Example("2048 units of 64", lambda: written_units(order, start, start, room, 0, 2048, 64))
    yield Example("2048 units of 4", lambda: written_units(order, start, start, None, 2000, 2048, 4))
    for dtype, lists, longest in (
        (torch.bfloat16, 8, 64),
        (torch.bfloat16, 8, 512),
        (torch.bfloat16, 1, 64),
        (torch.float32, 32, 64),
        (torch.float32, 8, 512),
    ):
        q, k = torch.empty(1, 32, 128, dtype=dtype), torch.empty(1, 8, 65536, 128, dtype=dtype)
        ids = torch.zeros(1, lists, 2048 + longest, dtype=torch.int64)
        before = torch.zeros(1, lists, 1, dtype=torch.int64)

        def launch(
            q: Tensor = q, k: Tensor = k, ids: Tensor = ids, before: Tensor = before, longest: int = longest
        ) -> object:
            return cut_lists(q, k, ids, before, before, 0, 0, 0.1, 0.0, 2048, longest)

        yield Example(f"cut of {longest} for {lists} lists, {str(dtype)[6:]}", launch)
