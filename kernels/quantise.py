"""Uniform asymmetric codes of a few bits, packed into bytes.

A byte holds 8 / bits planes: with d codes in a vector, byte j holds codes j, j + d * bits / 8, ..., the first in the lowest
bits.  A kernel that reads the bytes as wider words meets planes of neighbouring channels whose order is one fixed
permutation, which it applies to the query once; a lone vector is readable at any bit width.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 8)
_HALF = 65504.0  # largest fp16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., d] uint8 of `bits` bits each as bytes [..., d * bits / 8]; 3 bits are two and then one."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1)
    planes = folded(codes, codes.dim() - 1, codes.shape[-1] * bits // 8)
    packed: Tensor = (planes << _shifts(bits, codes.device)).sum(-2, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes [..., d] uint8 of bytes [..., d * bits / 8]."""
    if bits == 8:
        return packed
    if bits == 3:
        low = packed.shape[-1] // 3 * 2
        return unpack(packed[..., :low], 2) | (unpack(packed[..., low:], 1) << 2)
    planes: Tensor = (packed.unsqueeze(-2) >> _shifts(bits, packed.device)) & (2**bits - 1)
    return planes.flatten(-2)


def folded(x: Tensor, dim: int, size: int) -> Tensor:
    """x with axis `dim` as pieces of `size`: [..., n, ...] to [..., n / size, size, ...]."""
    return x.reshape(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).unsqueeze(-1)


def ranges(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Scale and least value of each group of x along `dim`, kept as one element, in fp16: what the codes are made with is
    what they are read with."""
    least, most = x.aminmax(dim=dim, keepdim=True)
    scale = (most - least) / (2**bits - 1)
    return scale.clamp(max=_HALF).half(), least.clamp(-_HALF, _HALF).half()


def encode(x: Tensor, bits: int, scale: Tensor, least: Tensor) -> Tensor:
    """Codes uint8 of x: round-half-even((x - least) / scale), within 0 .. 2^bits - 1; 0 where the scale is 0."""
    scale = scale.float()
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    return ((x - least.float()) * inverse).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    """The values codes * scale + least, fp32."""
    return torch.addcmul(least.float(), codes.float(), scale.float())
