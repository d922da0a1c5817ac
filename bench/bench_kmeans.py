"""What clustering one layer's keys costs, and how well it does: pytest bench/bench_kmeans.py --benchmark-enable -s

8 KV heads of 8192 keys of 128, 20 iterations.  A head has 64 directions, as much noise again, and its own mean key.
Printed beside the times: the mean cosine of a key with the mean direction of its cluster.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kvlib.policies.select.kmeans import spherical_kmeans

HEADS, TOKENS, WIDTH, DIRECTIONS = 8, 8192, 128, 64


def mixture():
    directions = WIDTH**0.5 * F.normalize(torch.randn(HEADS, DIRECTIONS, WIDTH), dim=-1)
    which = torch.randint(DIRECTIONS, (HEADS, TOKENS, 1)).expand(-1, -1, WIDTH)
    return directions.gather(1, which) + torch.randn(HEADS, TOKENS, WIDTH) + torch.randn(HEADS, 1, WIDTH)


def quality(keys, labels, clusters):
    unit = F.normalize(keys - keys.mean(1, keepdim=True), dim=-1)
    totals = torch.stack([torch.zeros(clusters, WIDTH).index_add_(0, own, u) for own, u in zip(labels, unit, strict=True)])
    return totals.norm(dim=-1).sum().item() / labels.numel()


@pytest.mark.parametrize("clusters", [102, 512])
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_cluster_a_layer(benchmark, backend, clusters):
    torch.manual_seed(0)
    keys = mixture()
    labels = benchmark.pedantic(
        spherical_kmeans, args=(keys, clusters, 20, range(HEADS), backend), rounds=5, warmup_rounds=1
    )
    benchmark.extra_info["mean cosine"] = quality(keys, labels, clusters)
    print(f"\n{backend}, {clusters} clusters: mean cosine {quality(keys, labels, clusters):.4f}")
