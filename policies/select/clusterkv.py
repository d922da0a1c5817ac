"""ClusterKV: keys that point the same way are found by one centroid and recalled together, arXiv 2412.03213."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.kernels.bounds import bounds
from kvlib.policies.base import Budget, RecipeError, check_flag, check_whole, register
from kvlib.policies.select.kmeans import check_backend, spherical_kmeans
from kvlib.policies.selection import Block, Index, Selector, Units

LARGEST = 4  # times the average: a cluster of more tokens is read, moved and cut in parts


@register
@dataclass(frozen=True)
class ClusterKV(Selector):
    """Read the clusters of keys whose centroids score highest.

    budget: tokens a decode query reads per KV head (int), sinks and newest tokens included, or fraction of the prompt
        (float).
    scope:  "kv_head" (the query heads of a KV head choose together) or, as in the paper, "query_head".
    dense_layers: first layers that read everything (2 in the paper); never more than a quarter of the model's.
    cluster: tokens per cluster, on average.  The paper has 80 for 32k tokens; with 16 (as in RetroInfer) prompts of a few
        thousand are found in as well.
    iterations: of k-means, at most (20).
    centre: whether the head's mean key is taken away before directions are compared.
    estimate: whether clusters nobody reads are represented by their centroid and mean value (RetroInfer, arXiv 2505.02922).
    backend: "torch" or "faiss".  seed: of the starting centroids.

    What is generated is clustered by itself, a block at a time; clusters once made stay.
    """

    name: ClassVar[str] = "clusterkv"
    paper: ClassVar[str] = "2412.03213"
    fitted: ClassVar[bool] = True

    budget: Budget = 1024
    dense_layers: int = 2
    cluster: int = 16
    iterations: int = 20
    centre: bool = True
    estimate: bool = False
    backend: str = "torch"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "cluster", self.cluster, 1)
        check_whole(self.name, "iterations", self.iterations, 1)
        check_whole(self.name, "seed", self.seed)
        check_flag(self.name, "centre", self.centre)
        check_flag(self.name, "estimate", self.estimate)
        try:
            check_backend(self.backend)
        except (ValueError, ImportError) as error:
            raise RecipeError(self.name, "backend", self.backend, str(error)) from error
        if self.scope == "layer":
            raise RecipeError(self.name, "scope", self.scope, "every KV head has clusters of its own: give kv_head")
        if self.estimate and self.scope != "kv_head":
            raise RecipeError(
                self.name, "scope", self.scope, "estimate=True stands for what no query head reads: give kv_head"
            )

    @property
    def portions(self) -> tuple[int, int, int]:
        """Sinks are outliers among keys and stay out; the open block is clustered when it is full."""
        return 16, 32, 320

    def build(self, block: Block) -> Units:
        """Clusters of every row and head."""
        rows = [self._cluster_row(block, row) for row in range(len(block.keys))]
        units = max(size.shape[1] for _, size, _ in rows)

        def joined(xs: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(x, (*[0, 0] * (x.dim() - 2), 0, units - x.shape[1])) for x in xs])

        parts = {name: joined([summary[name] for summary, _, _ in rows]) for name in rows[0][0]}
        return Units(parts, joined([size for _, size, _ in rows]), torch.stack([order for _, _, order in rows]))

    def _cluster_row(self, block: Block, row: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One row by itself, so that its clusters do not depend on the batch: summary, sizes [H, C], order [H, m]."""
        keys, values = block.keys[row], block.values[row]
        count = max(1, round(keys.shape[1] / self.cluster))
        seeds = [hash((self.seed, int(head), int(block.first[row]))) & 0x7FFFFFFF for head in block.heads]
        labels = spherical_kmeans(keys, count, self.iterations, seeds, self.backend, self.centre)
        members, order = labels.sort(dim=-1, stable=True)
        size = sizes(members, LARGEST * self.cluster)
        summary = {"centroid": means(keys, order, size)}
        if self.estimate:
            summary["value"] = means(values, order, size)
        return summary, size, order

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """Inner product with the mean of a cluster's keys."""
        return bounds(q, index.summary["centroid"])

    def estimation(self, index: Index) -> tuple[Tensor, Tensor] | None:
        """Centroids and mean values."""
        return (index.summary["centroid"], index.summary["value"]) if self.estimate else None


def sizes(members: Tensor, most: int) -> Tensor:
    """Sizes [H, C] int32 of clusters from the sorted labels [H, m] of their members; what exceeds `most` tokens is a
    cluster of its own, by position.  Heads with fewer clusters than others have empty ones at the end."""
    place = torch.arange(members.shape[1], device=members.device).expand_as(members)
    begins = torch.ones_like(members, dtype=torch.bool)
    begins[:, 1:] = members[:, 1:] != members[:, :-1]
    start = torch.where(begins, place, 0).cummax(-1).values
    unit = (begins | ((place - start) % most == 0)).cumsum(-1) - 1
    size = members.new_zeros(len(members), int(unit.max()) + 1, dtype=torch.int32)
    return size.scatter_add_(1, unit, torch.ones_like(unit, dtype=torch.int32))


def means(x: Tensor, order: Tensor, size: Tensor) -> Tensor:
    """Mean [H, U, d] of the vectors x [H, m, d] of each unit, in the order [H, m] that puts its tokens side by side; zero
    for a unit without tokens.  Sums run over tokens in order, on any device."""
    first = size.cumsum(-1) - size
    found = [
        F.embedding_bag(o, v.float(), f.long(), mode="mean") for o, v, f in zip(order, x.contiguous(), first, strict=True)
    ]
    return torch.stack(found).to(x.dtype)
