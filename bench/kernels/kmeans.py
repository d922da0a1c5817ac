"""The nearest centroid of every key, as a prompt is clustered: segments of 8,192 tokens in clusters of 16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.case import PAGE, Case, Shape
from kvlib.kernels.kmeans import assign
from kvlib.policies.selection import SEGMENT


def cases(s: Shape) -> Iterator[Case]:
    """All segments of all heads at once."""
    m = min(s.context, SEGMENT)
    lists, clusters = s.batch * s.heads * (s.context // m), m // PAGE
    moved = lists * (2 * (m + clusters) * s.d + 12 * m)

    def directions(count: int) -> Tensor:
        return F.normalize(s.normal(lists, count, s.d, dtype=torch.float16), dim=-1)

    def make() -> list[tuple[Tensor, ...]]:
        return [(directions(m), directions(clusters)) for _ in range(s.copies(moved))]

    def off(given: tuple[Tensor, ...], found: tuple[Tensor, Tensor]) -> float:
        """By how much a cosine is off, or that of the centroid chosen is less than the best."""
        unit, centroids = (x[-1].float() for x in given)
        label, cosine = (x[-1] for x in found)
        every = unit @ centroids.T
        best, own = every.amax(1), every.gather(1, label[:, None])[:, 0]
        return float(torch.maximum((cosine - best).abs(), best - own).max())

    flops = 2 * lists * m * clusters * s.d
    yield Case("kmeans", f"assign, clusters of {PAGE}", make, assign, off, 2e-3, moved, flops=flops)
