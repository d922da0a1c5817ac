"""ClusterKV: keys that point the same way are found by one centroid and recalled together, arXiv 2412.03213."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.policies.base import Budget, RecipeError, check_flag, check_whole, register
from kvlib.policies.select.kmeans import check_backend, spherical_kmeans
from kvlib.policies.selection import Block, Index, Selector, Units, products


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
        parts = {name: torch.stack([row[0].summary[name] for row in rows]) for name in rows[0][0].summary}
        return Units(parts, torch.stack([row[1] for row in rows]), torch.stack([row[2] for row in rows]))

    def _cluster_row(self, block: Block, row: int) -> tuple[Units, Tensor, Tensor]:
        """One row by itself, so that its clusters do not depend on the batch: summary, sizes [H, C], order [H, m]."""
        keys, values = block.keys[row], block.values[row]
        count = max(1, round(keys.shape[1] / self.cluster))
        first = int(block.positions[row, 0, 0])
        seeds = [hash((self.seed, int(head), first)) & 0x7FFFFFFF for head in block.heads]
        labels = spherical_kmeans(keys, count, self.iterations, seeds, self.backend, self.centre)
        order = labels.argsort(dim=-1, stable=True)
        size = torch.zeros(len(keys), count, dtype=torch.int32, device=keys.device)
        size.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.int32))
        summary = {"centroid": means(keys, order, size)}
        if self.estimate:
            summary["value"] = means(values, order, size)
        return Units(summary), size, order

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """Inner product with the mean of a cluster's keys."""
        return products(q, index.summary["centroid"])

    def estimation(self, index: Index) -> tuple[Tensor, Tensor] | None:
        """Centroids and mean values."""
        return (index.summary["centroid"], index.summary["value"]) if self.estimate else None


def means(x: Tensor, order: Tensor, size: Tensor) -> Tensor:
    """Mean [H, U, d] of the vectors x [H, m, d] of each unit, in the order [H, m] that puts its tokens side by side; zero
    for a unit without tokens.  Sums run over tokens in order, on any device."""
    first = size.cumsum(-1) - size
    found = [
        F.embedding_bag(o, v.float(), f.long(), mode="mean") for o, v, f in zip(order, x.contiguous(), first, strict=True)
    ]
    return torch.stack(found).to(x.dtype)
