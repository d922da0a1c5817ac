"""Random orthogonal rotations that spread outlier channels over all coordinates and leave every inner product as it is."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotate(x: Tensor, seed: int = 0) -> Tensor:
    """Spread each vector evenly: R x over the last dimension, R = H diag(eps) / sqrt(order), so that R q . R k = q . k.

    x [..., d] of any dtype; returns [..., d] in fp32.  H is Sylvester's Hadamard matrix and eps are d random signs drawn
    from `seed`.  Where d is not a power of two, H is block-diagonal and its order is the largest power of two that divides
    d: the fewer times 2 divides d, the less is spread.  Raises ValueError for an odd d.  Source: arXiv 2404.00456 (QuaRot).
    """
    return x.float() @ _rotation(x.shape[-1], seed, x.device).T


def rotate_back(x: Tensor, seed: int = 0) -> Tensor:
    """Undo `rotate`: the transpose of R over the last dimension.

    x [..., d] of any dtype; returns [..., d] in fp32.  By linearity it also turns a weighted sum of rotated values into the
    sum of the values.  Raises ValueError for an odd d.  Source: arXiv 2404.00456 (QuaRot).
    """
    return x.float() @ _rotation(x.shape[-1], seed, x.device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the tensor outlives the call, and an inference tensor could not be used under autograd
def _rotation(d: int, seed: int, device: torch.device) -> Tensor:
    """R itself [d, d] in fp32: for heads of at most 256 dimensions one product beats log2(d) passes over the memory."""
    order = d & -d
    if order < 2:
        raise ValueError(
            f"vectors of {d} dimensions have no Hadamard rotation: the dimension must be even; pad it with a zero, or do "
            "without the rotation"
        )
    h = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    eps = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(seed), device="cpu") * 2 - 1
    r: Tensor = torch.kron(h.new_ones(d // order).diag(), h) * eps / order**0.5
    return r.to(device)
