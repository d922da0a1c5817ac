"""What a unit promises a query: the product with one vector that stands for it, or a bound by two, for all heads at once.

A unit is summed up by a mean, a centroid, a few channels of its key, or by the box of channel ranges around its keys
(Quest, arXiv 2406.10774).  No point of a box scores more than sum_c max(q_c low_c, q_c high_c), which is the product of the
positive part of q with the upper corner and of its negative part with the lower one: two products for a matrix unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvlib.kernels.launch import Example, cast, dot, jit, power, tl
from kvlib.kernels.ops import register

_LONG = 512  # units from which a CPU multiplies them from the left
_ROWS = 64  # query heads that one program scores


@jit(do_not_specialize=["units"])
def score_units(
    Q,
    FIRST,
    SECOND,
    OUT,
    scale,
    units,
    stride_qb,
    stride_qh,
    stride_fb,
    stride_fh,
    stride_fu,
    stride_sb,
    stride_sh,
    stride_su,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BOX: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """The scores of one chunk of a KV head's units with the query heads that share it."""
    lo = tl.program_id(0) * CHUNK
    hi = tl.minimum(lo + CHUNK, units)
    row = tl.program_id(1)
    b = (row // HEADS).to(tl.int64)
    h = row % HEADS
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_U)
    heads = (h * GROUP + m).to(tl.int64)
    q_at = Q + b * stride_qb + heads[:, None] * stride_qh + d[None, :]
    q = tl.load(q_at, mask=(m < GROUP)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    first_at = FIRST + b * stride_fb + h.to(tl.int64) * stride_fh
    one = cast(tl.maximum(q, 0.0) if BOX else q, FIRST.dtype.element_ty)
    if SECOND is not None:
        second_at = SECOND + b * stride_sb + h.to(tl.int64) * stride_sh
        other = cast(tl.minimum(q, 0.0) if BOX else tl.abs(q), SECOND.dtype.element_ty)
    for begin in range(lo, hi, BLOCK_U):
        u = (begin + j).to(tl.int64)
        some = (u < hi)[None, :] & (d < D)[:, None]
        s = dot(one, tl.load(first_at + u[None, :] * stride_fu + d[:, None], mask=some, other=0.0), None)
        if SECOND is not None:
            s = dot(other, tl.load(second_at + u[None, :] * stride_su + d[:, None], mask=some, other=0.0), s)
        out_at = OUT + (b * HEADS * GROUP + heads[:, None]) * units + u[None, :]
        tl.store(out_at, s * scale, mask=(m < GROUP)[:, None] & (u < hi)[None, :])


def tile_of(dtype: torch.dtype, d: int) -> int:
    """Units of a tile; fp32 products keep their operands in registers, and few fit."""
    if dtype == torch.float32:
        return 16
    return min(256, max(32, 8192 // max(16, power(d))))


def score(q: Tensor, first: Tensor, second: Tensor | None = None, box: bool = False, scale: float = 1.0) -> Tensor:
    """Launch `score_units`; arguments as of `bounds`."""
    batch, heads, units, d = first.shape
    q_heads = q.shape[1]
    group, tile = q_heads // heads, tile_of(first.dtype, d)
    chunk = max(tile, min(512, power(units) // 32))
    block_m = min(_ROWS, max(16, power(group)))
    out = q.new_empty((batch, q_heads, units), dtype=torch.float32)
    score_units[(-(-units // chunk), batch * heads, -(-group // block_m))](
        q,
        first,
        second,
        out,
        scale,
        units,
        *q.stride()[:2],
        *first.stride()[:3],
        *((0, 0, 0) if second is None else second.stride()[:3]),
        HEADS=heads,
        GROUP=group,
        D=d,
        BOX=box,
        CHUNK=chunk,
        BLOCK_M=block_m,
        BLOCK_D=max(16, power(d)),
        BLOCK_U=tile,
        num_warps=4,
        num_stages=3,
    )
    return out


def products(q: Tensor, x: Tensor) -> Tensor:
    """q [B, Hq, d] times x [B, H, U, d] of each query head's KV head, rounded to x's type and summed: [B, Hq, U] fp32."""
    batch, q_heads, d = q.shape
    heads, units = x.shape[1:3]
    q = q.reshape(batch * heads, q_heads // heads, d).to(x.dtype)
    x = x.flatten(0, 1)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        s = torch.bmm(q, x.transpose(1, 2), out_dtype=torch.float32)
    elif units >= _LONG and q.dtype == torch.float32 and not q.is_cuda:
        s = (
            torch.bmm(x, q.transpose(1, 2)).transpose(1, 2).contiguous()
        )  # half the time where the units are not in the cache
    else:
        s = torch.bmm(q, x.transpose(1, 2)).float()
    return s.view(batch, q_heads, units)


def bounded(q: Tensor, first: Tensor, second: Tensor | None = None, box: bool = False, scale: float = 1.0) -> Tensor:
    """The same by batched products; arguments as of `bounds`."""
    if second is None:
        s = products(q, first)
    else:
        one, other = (q.relu(), -((-q).relu())) if box else (q, q.abs())
        s = products(one, first).add_(products(other, second))
    return s if scale == 1.0 else s * scale


def _fake(q: Tensor, first: Tensor, *arguments: object, **options: object) -> Tensor:
    return q.new_empty((*q.shape[:2], first.shape[2]), dtype=torch.float32)


bounds: Callable[..., Tensor] = register(
    "bounds(Tensor q, Tensor first, Tensor? second=None, bool box=False, float scale=1.0) -> Tensor",
    cpu=bounded,
    cuda=score,
    fake=_fake,
)
"""Scores [B, Hq, U] fp32 of units for query heads q [B, Hq, d], from summaries first, second [B, H, U, d] of each KV head,
of any strides but the last, which is 1 as q's; q is rounded to their type.

Without `second` the score is q.first; with it q.first + |q|.second, a centre and a spread; or, where they are the upper and
the lower corner of a `box`, max(q, 0).first + min(q, 0).second.  All times `scale`.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: pages of Llama-3-8B's heads first, then centroids and labels of few channels."""
    for kind, dtype, d, two, group in (
        ("box", torch.bfloat16, 128, True, 4),
        ("spread", torch.bfloat16, 128, True, 4),
        ("product", torch.bfloat16, 128, False, 4),
        ("product", torch.bfloat16, 32, False, 4),
        ("product", torch.bfloat16, 8, False, 4),
        ("box", torch.float16, 80, True, 8),
        ("box", torch.bfloat16, 256, True, 1),
        ("box", torch.float32, 128, True, 4),
        ("product", torch.float32, 64, False, 32),
    ):
        q = torch.empty(1, 8 * group, d, dtype=dtype)
        first = torch.empty(1, 8, 8192, d, dtype=dtype)

        def launch(q: Tensor = q, first: Tensor = first, two: bool = two, kind: str = kind) -> object:
            return score(q, first, first if two else None, kind == "box")

        tile = tile_of(dtype, d) * d * first.element_size() * (1 + two)
        yield Example(f"{kind}, {str(dtype)[6:]}, d {d}, group {group}", launch, {"score_units": tile})
