"""Pruned vectors with their zeros again: a bitmap says which entries were kept, and their values follow one another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels import host_unpack
from kvlib.kernels.launch import Example, jit, power, tl
from kvlib.kernels.ops import register
from kvlib.kernels.quantise import unpack
from kvlib.kernels.ran import note

_TILE = 2048  # elements of a program


@jit(do_not_specialize=["heads", "tokens", "k"])
def expand_rows(
    BITMAP,
    KEPT,
    OUT,
    heads,
    tokens,
    k,
    bit_steps,  # strides of sequences, heads, tokens
    kept_steps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some tokens of one (sequence, head)."""
    BYTES: tl.constexpr = D // 8
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    t = ((tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < tokens) & (c < D)
    place = t.to(tl.int64)
    at = BITMAP + b * bit_steps[0] + h * bit_steps[1] + place * bit_steps[2]
    bit = (tl.load(at + c % BYTES, mask=inside, other=0).to(tl.int32) >> (c // BYTES)) & 1
    before = tl.cumsum(bit, axis=1) - bit
    at = KEPT + b * kept_steps[0] + h * kept_steps[1] + place * kept_steps[2]
    x = tl.load(at + before, mask=inside & (bit > 0) & (before < k), other=0.0)
    tl.store(OUT + (row.to(tl.int64) * tokens + place) * D + c, x, mask=inside)


def launched(bitmap: Tensor, kept: Tensor) -> Tensor:
    """Launch `expand_rows`; arguments as of `expand`."""
    note("codes", "Triton")
    out = _empty(bitmap, kept)
    batch, heads, m, d = out.shape
    if out.numel() == 0:
        return out
    block_d = power(d)
    block_m = max(1, _TILE // block_d)
    expand_rows[(batch * heads * -(-m // block_m),)](
        bitmap,
        kept,
        out,
        heads,
        m,
        kept.shape[3],
        bitmap.stride()[:3],
        kept.stride()[:3],
        D=d,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def expanded(bitmap: Tensor, kept: Tensor) -> Tensor:
    """The same in torch; arguments as of `expand`."""
    note("codes", "torch")
    mask, k = unpack(bitmap, 1), kept.shape[-1]
    place = mask.int().cumsum(-1, dtype=torch.int32)
    vectors = torch.arange(mask[..., 0].numel(), dtype=torch.int32, device=mask.device)
    place += vectors.view(*mask.shape[:-1], 1) * k
    values = torch.cat([kept.new_zeros(1), kept.flatten()])  # what was dropped reads the first
    return values.index_select(0, place.mul_(mask).flatten()).view(mask.shape)


def _on_cpu(bitmap: Tensor, kept: Tensor) -> Tensor:
    if kept.element_size() not in (2, 4) or not host_unpack.serves(bitmap.shape[3] * 8, bitmap, kept):
        return expanded(bitmap, kept)
    return host_unpack.expand(bitmap, kept, _empty(bitmap, kept))


def _empty(bitmap: Tensor, kept: Tensor) -> Tensor:
    return kept.new_empty((*bitmap.shape[:3], bitmap.shape[3] * 8))


expand = register(
    "expand(Tensor bitmap, Tensor kept) -> Tensor",
    cpu=_on_cpu,
    cuda=launched,
    fake=_empty,
)
"""The vectors [B, H, m, d], in the type of `kept` [B, H, m, k], of which the bitmap [B, H, m, d / 8] uint8, bits as
`kvlib.kernels.quantise.pack` packs them, marks the k entries that are kept, in order of their channels; the others are 0.
Any strides but of the last axis."""


def examples() -> Iterator[Example]:
    """Launches to compile: Llama-3-8B's heads at a sparsity of 0.7, then others."""
    for dtype, d, k in ((torch.bfloat16, 128, 39), (torch.float16, 96, 48), (torch.float32, 256, 77)):
        bitmap = torch.empty(1, 8, 4096, d // 8, dtype=torch.uint8)
        kept = torch.empty(1, 8, 4096, k, dtype=dtype)

        def launch(bitmap: Tensor = bitmap, kept: Tensor = kept) -> object:
            return launched(bitmap, kept)

        yield Example(f"{k} of {d}, {str(dtype)[6:]}", launch)
