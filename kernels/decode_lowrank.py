"""Attention over keys kept as coefficients of few vectors: a tile of keys is rebuilt, turned and used in registers.

ShadowKV, arXiv 2410.21465, whose reference writes rebuilt keys to memory and attends them from there.  A token's key before
its rotary embedding is u basis, with coefficients u that all KV heads share; here a tile of keys is rebuilt by products,
turned to its positions and multiplied with the queries without leaving the multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels.decode import chunk_of, merge_splits
from kvlib.kernels.launch import INTERPRET, Example, cast, dot, find_row, jit, power, softcapped, tl
from kvlib.kernels.ops import register
from kvlib.kernels.ran import note

_ROWS = 16  # query rows (group x n) that one program attends
_TOKENS = 64  # of a tile: wgmma takes no fewer rows
_PAIRS = 32  # pairs of dimensions rebuilt and turned at a time, to stay in registers


@jit
def turn(angle):
    """cos and sin of fp32 angles of up to 2^21.

    The compiler's own cos carries the reduction of any fp32 number along, a branch and stack memory for each element; the
    hardware's holds near 0 only.  Here whole turns are taken off in three steps, the first two of them exact with or
    without fused products: 6.25 and 17/512 have five bits, the number of turns at most 19.
    """
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    near = angle - turns * 6.25 - turns * 0.033203125 + turns * 1.7817820413606e-05
    if INTERPRET:
        cos = tl.cos(near)
        sin = tl.sin(near)
    else:
        cos, sin = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $2; sin.approx.f32 $1, $2;",
            "=f,=f,f",
            [near],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return cos, sin


@jit(do_not_specialize=["rows", "n", "most"])
def decode_lowrank_split(
    Q,
    U,
    BASIS,
    V,
    OUT,
    LSE,
    FREQ,
    LENGTH,
    POSITIONS,
    BASE,
    IDS,
    WHERE,
    EXACT,
    AT,
    scale,
    rows,
    n,
    most,
    rank,  # no constant: unrolled, the loop over it takes more registers than there are
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_ub,
    stride_uh,
    stride_ut,
    stride_ur,
    stride_bb,
    stride_bh,
    stride_br,
    stride_bd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_pb,
    stride_ph,
    stride_pt,
    stride_ib,
    stride_ih,
    stride_im,
    stride_wb,
    stride_wh,
    stride_wm,
    stride_eb,
    stride_eh,
    stride_et,
    stride_ed,
    stride_ab,
    stride_ah,
    stride_am,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    PIECE: tl.constexpr,
    DV: tl.constexpr,
    SCALING: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one chunk: the result is final
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCK: tl.constexpr,
):
    """One chunk of one list, tokens by query rows: its normalised output and log-sum-exp, in base 2 unless it is whole."""
    w = tl.program_id(0)
    if LENGTH is None:
        per_row = tl.maximum(tl.cdiv(most, CHUNK), 1)  # an empty list has a program too
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
    h = (row % HEADS).to(tl.int64)
    lo = chunk * CHUNK
    hi = tl.minimum(lo + CHUNK, tokens)

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = m < GROUP * n
    i = tl.arange(0, PIECE)
    j = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_R)
    dv = tl.arange(0, BLOCK_DV)
    heads = h * GROUP + m // n
    q_at = Q + b * stride_qb + heads * stride_qh + (m % n) * stride_qn
    base = 0
    if BASE is not None:
        base = tl.load(BASE + b)
    u_at = U + b * stride_ub + h * stride_uh
    basis_at = BASIS + b * stride_bb + h * stride_bh
    v_at = V + b * stride_vb + h * stride_vh

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_DV, BLOCK_M], tl.float32)
    for begin in range(lo, hi, BLOCK_N):
        t = begin + j
        live = t < hi
        if IDS is None:
            slot = t.to(tl.int64)
        else:
            slot = tl.load(IDS + b * stride_ib + h * stride_ih + t * stride_im, mask=live, other=0).to(tl.int64)
        if POSITIONS is None:
            position = slot + base
        else:
            position = tl.load(POSITIONS + b * stride_pb + h * stride_ph + slot * stride_pt, mask=live, other=0)
        if AT is not None:
            e = tl.load(AT + b * stride_ab + h * stride_ah + t * stride_am, mask=live, other=-1).to(tl.int64)
            hit = (e >= 0)[:, None]
        s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for piece in tl.static_range(HALF // PIECE):
            pair = piece * PIECE + i
            low = tl.zeros([BLOCK_N, PIECE], tl.float32)
            high = tl.zeros([BLOCK_N, PIECE], tl.float32)
            for first in range(0, rank, BLOCK_R):
                r = first + c
                real = r < rank
                u = tl.load(
                    u_at + slot[:, None] * stride_ut + r[None, :] * stride_ur, mask=live[:, None] & real[None, :], other=0.0
                )
                part = basis_at + r[:, None] * stride_br + pair[None, :] * stride_bd
                low = dot(u, tl.load(part, mask=real[:, None], other=0.0), low)
                high = dot(u, tl.load(part + HALF * stride_bd, mask=real[:, None], other=0.0), high)
            cos, sin = turn(position.to(tl.float32)[:, None] * tl.load(FREQ + pair)[None, :])
            if SCALING != 1.0:
                cos *= SCALING
                sin *= SCALING
            q_low = tl.load(q_at[None, :] + pair[:, None] * stride_qd, mask=mine[None, :], other=0.0)
            q_high = tl.load(q_at[None, :] + (pair[:, None] + HALF) * stride_qd, mask=mine[None, :], other=0.0)
            k_low = cast(low * cos - high * sin, q_low.dtype)
            k_high = cast(high * cos + low * sin, q_low.dtype)
            if AT is not None:
                exact_at = EXACT + b * stride_eb + h * stride_eh + e[:, None] * stride_et + pair[None, :] * stride_ed
                k_low = tl.where(hit, tl.load(exact_at, mask=hit, other=0.0), k_low)
                k_high = tl.where(hit, tl.load(exact_at + HALF * stride_ed, mask=hit, other=0.0), k_high)
            s = dot(k_low, q_low, s)
            s = dot(k_high, q_high, s)
        s = softcapped(s * scale, CAP) * 1.4426950408889634
        s = tl.where(live[:, None], s, float("-inf"))

        new = tl.maximum(top, tl.max(s, axis=0))  # finite: a tile has a token
        p = tl.exp2(s - new[None, :])
        alpha = tl.exp2(top - new)
        top = new
        total = total * alpha + tl.sum(p, axis=0)
        if WHERE is None:
            place = slot
        else:
            place = tl.load(WHERE + b * stride_wb + h * stride_wh + t * stride_wm, mask=live, other=0).to(tl.int64)
        v = tl.load(
            v_at + place[None, :] * stride_vt + dv[:, None] * stride_vd,
            mask=live[None, :] & (dv < DV)[:, None],
            other=0.0,
        )
        acc = dot(v, cast(p, v.dtype), acc * alpha[None, :])

    dead = total == 0.0
    safe = tl.where(dead, 1.0, total)
    lse = tl.where(dead, float("-inf"), top + tl.log2(safe))
    if WHOLE:
        lse = lse * 0.6931471805599453
        at = row.to(tl.int64) * GROUP * n + m
    else:
        at = w.to(tl.int64) * GROUP * n + m
    tl.store(OUT + at[None, :] * DV + dv[:, None], acc / safe[None, :], mask=mine[None, :] & (dv < DV)[:, None])
    tl.store(LSE + at, lse, mask=mine)


def serves(q: Tensor, rot: int, interleaved: bool) -> bool:
    """Whether the kernel does: half precision, d a power of two that the embedding turns whole, by halves as in Llama."""
    d = q.shape[3]
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and not interleaved and rot == d and d == power(d) and 32 <= d <= 256


def split_lowrank(
    q: Tensor,
    u: Tensor,
    basis: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    scale: float,
    scaling: float = 1.0,
    softcap: float = 0.0,
    interleaved: bool = False,
    most: int | None = None,
    length: Tensor | None = None,
    positions: Tensor | None = None,
    base: Tensor | None = None,
    ids: Tensor | None = None,
    where: Tensor | None = None,
    exact: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `decode_lowrank_split`, and `merge_splits` where a list has several chunks; where the kernel does not serve,
    gather instead.  Arguments as of `decode_lowrank`."""
    served = serves(q, 2 * len(inv_freq), interleaved)
    note("codes", "Triton" if served else "torch")
    if not served:
        out, lse = gathered_lowrank(
            q,
            u,
            basis,
            v,
            inv_freq,
            scale,
            scaling,
            softcap,
            interleaved,
            most,
            length,
            positions,
            base,
            ids,
            where,
            exact,
            at,
        )
        return out.float(), lse.float()
    batch, q_heads, n, d = q.shape
    heads, rank, dv = basis.shape[1], basis.shape[2], v.shape[3]
    group, rows = q_heads // heads, batch * heads
    most = _most(u, ids) if most is None else most
    chunk = chunk_of(most)
    whole = most <= chunk
    items = rows * max(1, -(-most // chunk))
    out = q.new_empty((batch, q_heads, n, dv), dtype=torch.float32)
    lse = q.new_empty((batch, q_heads, n), dtype=torch.float32)
    part, part_lse = out, lse
    if not whole:
        part = q.new_empty((items, group * n, dv), dtype=torch.float32)
        part_lse = q.new_empty((items, group * n), dtype=torch.float32)
    if length is not None:
        length = length.view(batch, -1).expand(batch, heads).contiguous()
    block_m = min(_ROWS, max(8, power(group * n)))
    per_head = [None if x is None else x.expand(batch, heads, -1) for x in (positions, ids, where, at)]
    strides = [(0, 0, 0) if x is None else x.stride() for x in per_head]
    decode_lowrank_split[(items, -(-group * n // block_m))](
        q,
        u,
        basis,
        v,
        part,
        part_lse,
        inv_freq,
        length,
        per_head[0],
        base,
        per_head[1],
        per_head[2],
        exact,
        per_head[3],
        scale,
        rows,
        n,
        most,
        rank,
        *q.stride(),
        *u.expand(batch, heads, -1, -1).stride(),
        *basis.stride(),
        *v.stride(),
        *strides[0],
        *strides[1],
        *strides[2],
        *((0, 0, 0, 0) if exact is None else exact.stride()),
        *strides[3],
        HEADS=heads,
        GROUP=group,
        HALF=d // 2,
        PIECE=min(d // 2, _PAIRS),
        DV=dv,
        SCALING=scaling,
        CHUNK=chunk,
        CAP=softcap,
        WHOLE=whole,
        BLOCK_M=block_m,
        BLOCK_DV=max(16, power(dv)),
        BLOCK_N=_TOKENS,
        BLOCK_R=32 if rank > 16 else 16,
        R_BLOCK=power(rows),
        num_warps=4,
        num_stages=3,
    )
    if not whole:
        merge_splits[(rows, group * n)](
            part,
            part_lse,
            out,
            lse,
            length,
            rows,
            most,
            group * n,
            DV=dv,
            CHUNK=chunk,
            BLOCK_DV=power(dv),
            BLOCK_C=16,
            R_BLOCK=power(rows),
            num_warps=4,
        )
    return out, lse


def gathered_lowrank(
    q: Tensor,
    u: Tensor,
    basis: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    scale: float,
    scaling: float = 1.0,
    softcap: float = 0.0,
    interleaved: bool = False,
    most: int | None = None,
    length: Tensor | None = None,
    positions: Tensor | None = None,
    base: Tensor | None = None,
    ids: Tensor | None = None,
    where: Tensor | None = None,
    exact: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by rebuilding the keys and one softmax, in q's precision but at least fp32; arguments as of
    `decode_lowrank`."""
    batch, d = len(q), q.shape[3]
    heads = basis.shape[1]
    most = _most(u, ids) if most is None else most
    precision = torch.promote_types(q.dtype, torch.float32)
    t = torch.arange(most, device=q.device)
    held = torch.full((batch, 1, 1), most, device=q.device) if length is None else length.view(batch, -1, 1)
    seen = (t < held).expand(batch, heads, -1)

    def listed(x: Tensor) -> Tensor:
        return x[..., :most].expand(batch, heads, -1).long().where(seen, 0)

    def rows(x: Tensor, slot: Tensor) -> Tensor:
        x = x.expand(batch, heads, -1, -1)
        slot = slot.to(x.device).unsqueeze(-1).expand(-1, -1, -1, x.shape[3])
        return x.gather(2, slot).to(q.device, precision)

    slot = listed(t if ids is None else ids)
    if positions is None:
        position = slot if base is None else slot + base.view(-1, 1, 1)
    else:
        position = positions.expand(batch, heads, -1).gather(2, slot)
    k = _turned(rows(u, slot) @ basis.to(precision), position, inv_freq, scaling, interleaved)
    if exact is not None and at is not None and exact.shape[2]:
        row = at[..., :most].long().where(seen, -1)
        k = torch.where((row >= 0).unsqueeze(-1), rows(exact, row.clamp(min=0)), k)
    s = q.reshape(batch, heads, -1, d).to(precision) @ k.mT * scale
    s = s.div_(softcap).tanh_().mul_(softcap) if softcap else s
    s = s.masked_fill_(~seen.unsqueeze(2), float("-inf"))
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp_()
    out = p @ rows(v, slot if where is None else listed(where))
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


def _turned(x: Tensor, position: Tensor, inv_freq: Tensor, scaling: float, interleaved: bool) -> Tensor:
    """x [..., d] turned to its positions, in its own precision but by the angles of `Rotary`, which are fp32."""
    angle = (position.unsqueeze(-1).float() * inv_freq).to(x.dtype)
    cos, sin = angle.cos() * scaling, angle.sin() * scaling
    rot = 2 * len(inv_freq)
    turning = x[..., :rot]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    parts = (torch.stack(pair, -1).flatten(-2),) if interleaved else pair
    return torch.cat([*parts, x[..., rot:]], -1)


def _most(u: Tensor, ids: Tensor | None) -> int:
    """Tokens that a list may have."""
    return u.shape[2] if ids is None else ids.shape[2]


def _fake(q: Tensor, u: Tensor, basis: Tensor, v: Tensor, *rest: object, **named: object) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3]
    return q.new_empty((*shape, v.shape[3]), dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


decode_lowrank = register(
    "decode_lowrank(Tensor q, Tensor u, Tensor basis, Tensor v, Tensor inv_freq, float scale, float scaling=1.0, "
    "float softcap=0.0, bool interleaved=False, SymInt? most=None, Tensor? length=None, Tensor? positions=None, "
    "Tensor? base=None, Tensor? ids=None, Tensor? where=None, Tensor? exact=None, Tensor? at=None) -> (Tensor, Tensor)",
    cpu=gathered_lowrank,
    cuda=split_lowrank,
    fake=_fake,
)
"""Attention of q [B, Hq, n, d] over listed tokens, whose keys are u [B, 1 or H, T, r] basis [B, H, r, d] turned to their
positions, with values v [B, H, T, dv]; returns out [B, Hq, n, dv] fp32 and the natural-log lse [B, Hq, n] fp32, (0, -inf)
where a list is empty.  Every query row sees the whole list.  v may lie in pinned host memory.

inv_freq, scaling, interleaved: the rotary embedding, as in `Rotary`; inv_freq [rot / 2] fp32 on the device.
softcap:   logits are softcap * tanh(scale * q.k / softcap); 0: plain.
most:      the most tokens of any list, on the host; None: what u or ids have room for.
length:    int32 [B], [B, 1] or [B, H] tokens of each list; None: `most`.
positions: int [B, 1 or H, T] of each slot; None: the slot's number, plus `base` int [B] where given.
ids:       int [B, 1 or H, m] slots of u; None: the first ones.
where:     int [B, 1 or H, m] slots of v in the list's order; None: those of u.
exact, at: keys [B, H, E, d] after their embedding that replace rebuilt ones: `at` int [B, H, m], in the list's order, is
           the row of `exact` or -1.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: ShadowKV's rank and budget on Llama-3-8B's heads first."""
    for dtype, d, r, n, listed, softcap in (
        (torch.bfloat16, 128, 160, 1, True, 0.0),
        (torch.bfloat16, 128, 160, 1, False, 0.0),
        (torch.bfloat16, 128, 160, 8, True, 0.0),
        (torch.float16, 64, 160, 1, True, 0.0),
        (torch.float16, 128, 16, 1, True, 0.0),
        (torch.bfloat16, 256, 160, 1, True, 50.0),
    ):
        q = torch.empty(1, 32, n, d, dtype=dtype)
        u, basis = torch.empty(1, 1, 16384, r, dtype=dtype), torch.empty(1, 8, r, d, dtype=dtype)
        v, exact = torch.empty(1, 8, 16384, d, dtype=dtype), torch.empty(1, 8, 384, d, dtype=dtype)
        length, positions = torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, 1, 16384, dtype=torch.int32)
        ids, at = torch.zeros(1, 8, 2048, dtype=torch.int64), torch.zeros(1, 8, 2048, dtype=torch.int32)
        lists = {"ids": ids, "where": ids, "exact": exact, "at": at, "positions": positions} if listed else {}

        def launch(
            q: Tensor = q,
            u: Tensor = u,
            basis: Tensor = basis,
            v: Tensor = v,
            length: Tensor = length,
            softcap: float = softcap,
            lists: dict[str, Tensor] = lists,
        ) -> object:
            freq = torch.empty(q.shape[3] // 2)
            return split_lowrank(q, u, basis, v, freq, 1.0, softcap=softcap, length=length, **lists)  # type: ignore[arg-type]

        kind = "tokens" if listed else "range"
        yield Example(f"{kind}, {str(dtype)[6:]}, d {d}, r {r}, n {n}", launch)
