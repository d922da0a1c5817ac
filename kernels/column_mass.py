"""Attention probability that each key collects, by the two-pass form: no rows x keys matrix is ever held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels.attention import EVERYTHING, Visible, blocked_scores
from kvlib.kernels.launch import Example, dot, jit, power, softcapped, tl
from kvlib.kernels.ops import register
from kvlib.kernels.ran import note


@jit(do_not_specialize=["n", "keys", "window", "sink"])
def column_mass_kernel(
    Q,
    K,
    LSE,
    MASS,
    START,
    LENGTH,
    SINK,
    scale,
    n,
    keys,
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
    stride_lb,
    stride_lh,
    stride_ln,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    CAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    BAND: tl.constexpr,  # whether a window hides older keys
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of one KV head's keys against the query rows that may see it, keys by rows, a row's heads side by side."""
    blocks = tl.cdiv(keys, BLOCK_T)
    row = tl.program_id(0) // blocks
    b = (row // HEADS).to(tl.int64)
    h = (row % HEADS).to(tl.int64)
    lo = tl.program_id(0) % blocks * BLOCK_T
    first = 0
    if START is not None:
        first = tl.load(START + b).to(tl.int32)
    held = keys
    if LENGTH is not None:
        held = tl.minimum(keys, tl.load(LENGTH + b).to(tl.int32))
    kept = first + sink
    if SINK is not None:
        kept = first + tl.load(SINK + b).to(tl.int32)
    t = lo + tl.arange(0, BLOCK_T)
    live = (t >= first) & (t < held)

    # Query row i stands at key index keys - n + i: rows before `begin` stand before the block, those from `end` on past it.
    begin = 0
    end = n
    if CAUSAL:
        begin = tl.maximum(0, lo - (keys - n))
    if BAND:
        end = tl.where(lo >= kept, tl.minimum(n, lo + BLOCK_T - 1 + window - (keys - n)), n)
    if (lo >= held) | (lo + BLOCK_T <= first):
        end = 0

    d = tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    k_at = K + b * stride_kb + h * stride_kh + t[:, None].to(tl.int64) * stride_kt
    k = tl.load(k_at + d[None, :] * stride_kd, mask=live[:, None] & (d < D)[None, :], other=0.0)
    mass = tl.zeros([BLOCK_T], tl.float32)
    for at in range(begin * GROUP, end * GROUP, BLOCK_M):
        i = (at + m) // GROUP
        head = h * GROUP + (at + m) % GROUP
        real = i < end
        q_at = Q + b * stride_qb + head * stride_qh + i.to(tl.int64) * stride_qn
        q = tl.load(q_at[None, :] + d[:, None] * stride_qd, mask=real[None, :] & (d < D)[:, None], other=0.0)
        lse_at = LSE + b * stride_lb + head * stride_lh + i.to(tl.int64) * stride_ln
        lse = tl.load(lse_at, mask=real, other=float("inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a row that saw no key gives no key any mass
        s = softcapped(dot(k, q, None) * scale, CAP) * 1.4426950408889634
        seen = live[:, None]
        place = (keys - n + i)[None, :]
        if CAUSAL:
            seen = seen & (t[:, None] <= place)
        if BAND:
            seen = seen & ((t[:, None] > place - window) | (t < kept)[:, None])
        mass += tl.sum(tl.where(seen, tl.exp2(s - lse[None, :]), 0.0), axis=1)
    tl.store(MASS + row.to(tl.int64) * keys + t, mass, mask=t < keys)


def launch_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    start: Tensor | None = None,
    length: Tensor | None = None,
    window: int | None = None,
    sink: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Launch `column_mass_kernel`; arguments as of `column_mass` and `Visible`, `sinks` [B] in place of one `sink`."""
    batch, q_heads, n, d = q.shape
    heads, keys = k.shape[1:3]
    group = q_heads // heads
    note("votes", "Triton")
    block_t, block_m = tile_of(q.dtype, d, keys, group * n)
    mass = q.new_empty((batch, heads, keys), dtype=torch.float32)
    column_mass_kernel[(-(-keys // block_t) * batch * heads,)](
        q,
        k,
        lse,
        mass,
        start,
        length,
        sinks,
        scale,
        n,
        keys,
        0 if window is None else window,
        sink,
        *q.stride(),
        *k.stride(),
        *lse.stride(),
        HEADS=heads,
        GROUP=group,
        D=d,
        CAP=softcap,
        CAUSAL=causal and n > 1,
        BAND=window is not None,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        BLOCK_D=max(16, power(d)),
        num_warps=4,
        num_stages=3,
    )
    return mass


def tile_of(dtype: torch.dtype, d: int, keys: int, rows: int) -> tuple[int, int]:
    """Keys and query rows of a tile where a KV head has `rows` of them; fp32 products keep their operands in registers."""
    if dtype == torch.float32:
        return 16, 16
    return min(128 if d <= 128 else 64, max(16, power(keys))), min(64, max(16, power(rows)))


def walked_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    start: Tensor | None = None,
    length: Tensor | None = None,
    window: int | None = None,
    sink: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same in torch, a block of query rows at a time; arguments as of `launch_mass`."""
    visible = Visible(causal, start, length, window, sink if sinks is None else sinks)
    return _walked(q, k, lse, scale, visible, softcap or None)


def _walked(q: Tensor, k: Tensor, lse: Tensor, scale: float, visible: Visible, softcap: float | None) -> Tensor:
    note("votes", "torch")
    batch, heads, keys = k.shape[:3]
    lse = lse.reshape(batch * heads, -1, q.shape[2], 1)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # a row that saw no key gives no key any mass
    mass = torch.zeros(batch * heads, keys, device=q.device)
    for i, j, lo, hi, s in blocked_scores(q, k, scale, visible, softcap):
        mass[:, lo:hi] += s.sub_(lse[:, :, i:j]).exp_().sum((1, 2))
    return mass.view(batch, heads, keys)


def _fake(q: Tensor, k: Tensor, *rest: object, **named: object) -> Tensor:
    return q.new_empty(k.shape[:3], dtype=torch.float32)


_mass = register(
    "column_mass(Tensor q, Tensor k, Tensor lse, float scale, float softcap=0.0, bool causal=False, Tensor? start=None, "
    "Tensor? length=None, SymInt? window=None, SymInt sink=0, Tensor? sinks=None) -> Tensor",
    cpu=walked_mass,
    cuda=launch_mass,
    fake=_fake,
)


def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, visible: Visible = EVERYTHING, softcap: float | None = None
) -> Tensor:
    """Sum over the query rows, and over the query heads of each KV head, of exp(logit - lse).

    q [B, Hq, n, d], k [B, H, T, d]; lse [B, Hq, n] over *all* keys the rows attended, of which k may be a part, and +inf
    for rows that do not count (padding).  Returns [B, H, T] fp32.
    """
    if visible.mask is not None:
        return _walked(q, k, lse, scale, visible, softcap)
    one, each = (visible.sink, None) if isinstance(visible.sink, int) else (0, visible.sink)
    start, length = visible.start, visible.length
    mass: Tensor = _mass(q, k, lse, scale, softcap or 0.0, visible.causal, start, length, visible.window, one, each)
    return mass


def examples() -> Iterator[Example]:
    """Launches to compile: H2O's decoding step and chunk of a prompt on Llama-3-8B's heads first."""
    for dtype, d, n, softcap, window in (
        (torch.bfloat16, 128, 1, 0.0, None),
        (torch.bfloat16, 128, 1024, 0.0, None),
        (torch.bfloat16, 128, 1024, 50.0, 4096),
        (torch.float16, 64, 32, 0.0, None),
        (torch.float16, 80, 1, 0.0, None),
        (torch.bfloat16, 256, 1024, 0.0, None),
        (torch.float32, 128, 1024, 0.0, None),
        (torch.float32, 64, 1, 0.0, None),
    ):
        q, k = torch.empty(1, 32, n, d, dtype=dtype), torch.empty(1, 8, 16384, d, dtype=dtype)
        lse, start = torch.empty(1, 32, n), torch.zeros(1, dtype=torch.int64)

        def launch(
            q: Tensor = q,
            k: Tensor = k,
            lse: Tensor = lse,
            start: Tensor = start,
            softcap: float = softcap,
            window: int | None = window,
        ) -> object:
            return launch_mass(q, k, lse, 0.1, softcap, True, start, window=window, sink=4)

        yield Example(f"{str(dtype)[6:]}, d {d}, n {n}" + (", band, cap" if window else ""), launch)
