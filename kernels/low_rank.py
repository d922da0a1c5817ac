"""Low-rank factors: of what a quantiser leaves over, by power iteration, and of keys of all heads together."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(x: Tensor, rank: int, loops: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors a [..., n, rank], orthonormal, and b [..., d, rank] with a b^T near x [..., n, d] fp32.

    Power iteration as in GEAR (arXiv 2403.05527) for all leading dimensions at once, from the same Gaussian start, so that
    no matrix depends on its neighbours.  The rank may exceed n or d: the columns beyond are zero.
    """
    n, d = x.shape[-2:]
    r = min(rank, n, d)
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(d, r, generator=generator).to(x.device).expand(*x.shape[:-2], d, r)
    a = x @ b
    for _ in range(loops - 1):
        b = torch.linalg.qr(x.mT @ a).Q
        a = x @ b
    a = torch.linalg.qr(a).Q
    b = x.mT @ a
    spare = (0, rank - r)
    return torch.nn.functional.pad(a, spare), torch.nn.functional.pad(b, spare)


def row_space(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The orthonormal rows [..., rank, d] that keep most of x [..., n, d] fp32, and the share [...] of its energy kept.

    By the eigenvectors of x^T x, so that n only enters one product.
    """
    values, vectors = torch.linalg.eigh(x.mT @ x)
    rows = vectors[..., -rank:].flip(-1).mT
    kept = values.clamp(min=0)
    return rows.contiguous(), kept[..., -rank:].sum(-1) / kept.sum(-1).clamp(min=1e-30)
