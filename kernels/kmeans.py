"""The two steps of a round of spherical k-means, for all heads at once: the nearest centroid of every vector, and the new
centroids.

Both are the same from one run to the next: a vector's centroids are compared in order, and a cluster's sum runs over its
members in order of position, which a stable sort puts side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.kernels.launch import Example, dot, jit, power, tl
from kvlib.kernels.ops import register


@jit(do_not_specialize=["m", "clusters"])
def nearest_centroid(
    UNIT,
    CENTROIDS,
    LABEL,
    COSINE,
    m,
    clusters,
    stride_uh,
    stride_um,
    stride_ch,
    stride_cc,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of one head's vectors against all of its centroids."""
    h = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    inside = (d < D)[:, None]
    unit_at = UNIT + h * stride_uh + i[:, None].to(tl.int64) * stride_um + d[None, :]
    unit = tl.load(unit_at, mask=(i < m)[:, None] & (d < D)[None, :], other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_M], tl.int32)
    for begin in range(0, clusters, BLOCK_C):
        live = begin + c < clusters
        at = CENTROIDS + h * stride_ch + (begin + c)[None, :] * stride_cc + d[:, None]
        s = dot(unit, tl.load(at, mask=live[None, :] & inside, other=0.0), None)
        s = tl.where(live[None, :], s, float("-inf"))
        top, place = tl.max(s, 1, return_indices=True)
        label = tl.where(top > best, begin + place, label)
        best = tl.maximum(best, top)
    tl.store(LABEL + h * m + i, label.to(tl.int64), mask=i < m)
    tl.store(COSINE + h * m + i, best, mask=i < m)


@jit(do_not_specialize=["m", "clusters"])
def sum_members(
    X,
    ORDER,
    FIRST,
    BEFORE,
    OUT,
    m,
    clusters,
    stride_xh,
    stride_xm,
    stride_bh,
    stride_bc,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The direction of the sum of one cluster's members, ORDER [H, m] from FIRST [H, C + 1] on; the one before where it has
    none."""
    cluster = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    at = FIRST + h * (clusters + 1) + cluster
    first, stop = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for begin in range(first, stop, BLOCK_T):
        live = begin + t < stop
        member = tl.load(ORDER + h * m + begin + t, mask=live, other=0)
        x_at = X + h * stride_xh + member[:, None] * stride_xm + d[None, :]
        total += tl.load(x_at, mask=live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, 0)
    length = tl.sqrt(tl.sum(mean * mean, 0))
    before = tl.load(BEFORE + h * stride_bh + cluster.to(tl.int64) * stride_bc + d, mask=d < D, other=0.0).to(tl.float32)
    found = tl.where(length > 0, mean / tl.where(length > 0, length, 1.0), before)
    tl.store(OUT + (h * clusters + cluster) * D + d, found, mask=d < D)


def tiled_assign(unit: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `nearest_centroid`; arguments as of `assign`."""
    (heads, m, d), clusters = unit.shape, centroids.shape[1]
    label, cosine = unit.new_empty((heads, m), dtype=torch.int64), unit.new_empty((heads, m), dtype=torch.float32)
    small = unit.dtype == torch.float32  # such products keep their operands in registers, and few fit
    block_m, block_c = (32, 32) if small else (128, 64)
    nearest_centroid[(-(-m // block_m), heads)](
        unit,
        centroids,
        label,
        cosine,
        m,
        clusters,
        *unit.stride()[:2],
        *centroids.stride()[:2],
        D=d,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        BLOCK_D=max(16, power(d)),
        num_warps=4,
        num_stages=3,
    )
    return label, cosine


def segmented_update(x: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """Sort the members and launch `sum_members`; arguments as of `update`."""
    (heads, m, d), clusters = x.shape, before.shape[1]
    members, order = labels.sort(dim=-1, stable=True)
    edges = torch.arange(clusters + 1, device=x.device).repeat(heads, 1)
    first = torch.searchsorted(members, edges)
    out = x.new_empty((heads, clusters, d), dtype=torch.float32)
    sum_members[(clusters, heads)](
        x,
        order,
        first,
        before,
        out,
        m,
        clusters,
        *x.stride()[:2],
        *before.stride()[:2],
        D=d,
        BLOCK_T=16,
        BLOCK_D=max(16, power(d)),
        num_warps=4,
    )
    return out


def nearest(unit: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Of one head, unit [m, d] and centroids [C, d]: the centroid of largest cosine, the lowest among equals, and that
    cosine; in blocks, on a CPU such as its cache holds."""
    on_cpu = unit.device.type == "cpu"
    labels, cosines = [], []
    for rows in torch.split(unit, max(1, (1 << 17 if on_cpu else 1 << 26) // len(centroids))):
        scores = rows @ centroids.T
        # On a CPU numpy's argmax is three times as fast as torch's; both give the first of equals.
        label = torch.from_numpy(scores.numpy().argmax(1)) if on_cpu else scores.argmax(1)
        labels.append(label)
        cosines.append(scores.gather(1, label[:, None])[:, 0])
    return torch.cat(labels), torch.cat(cosines)


def directions(x: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """Of one head, x [m, d] and labels [m]: directions [C, d] of the clusters' mean keys; a cluster that is empty, or whose
    keys cancel out, keeps the one it had."""
    members, order = labels.sort(stable=True)
    first = torch.searchsorted(members, torch.arange(len(before), device=x.device))
    # A bag adds its keys in order of position on any device; index_add would race on a GPU.
    total = F.embedding_bag(order, x, first, mode="sum")
    length = total.norm(dim=1, keepdim=True)
    return torch.where(length > 0, total / length, before)


def nearest_by_head(unit: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest`, head by head."""
    found = [nearest(*head) for head in zip(unit.float(), centroids.float(), strict=True)]
    return torch.stack([label for label, _ in found]), torch.stack([cosine for _, cosine in found])


def directions_by_head(x: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """`directions`, head by head."""
    return torch.stack([directions(*head) for head in zip(x.float(), labels, before.float(), strict=True)])


def _fake_assign(unit: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    shape = unit.shape[:2]
    return unit.new_empty(shape, dtype=torch.int64), unit.new_empty(shape, dtype=torch.float32)


def _fake_update(x: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    return before.new_empty(before.shape, dtype=torch.float32)


assign: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = register(
    "kmeans_assign(Tensor unit, Tensor centroids) -> (Tensor, Tensor)",
    cpu=nearest_by_head,
    cuda=tiled_assign,
    fake=_fake_assign,
)
"""The centroid of largest cosine of every vector, the lowest among equals, int64 [H, m], and that cosine, fp32 [H, m]: of
unit [H, m, d] and centroids [H, C, d], which have length 1 and one type; every head has its own."""

update: Callable[[Tensor, Tensor, Tensor], Tensor] = register(
    "kmeans_update(Tensor x, Tensor labels, Tensor before) -> Tensor",
    cpu=directions_by_head,
    cuda=segmented_update,
    fake=_fake_update,
)
"""The directions [H, C, d] fp32 of the sums of x [H, m, d] over each cluster, by labels int64 [H, m]; a cluster that is
empty or cancels out keeps its centroid of `before` [H, C, d]."""


def examples() -> Iterator[Example]:
    """Launches to compile: a prompt's segment in clusters of 16 first."""
    for dtype, d in ((torch.float16, 128), (torch.bfloat16, 64), (torch.float16, 256), (torch.float32, 128)):
        x, centroids = torch.empty(8, 8192, d), torch.empty(8, 512, d)
        labels = torch.zeros(8, 8192, dtype=torch.int64)

        def round_of(
            x: Tensor = x, centroids: Tensor = centroids, labels: Tensor = labels, dtype: torch.dtype = dtype
        ) -> object:
            return tiled_assign(x.to(dtype), centroids.to(dtype)), segmented_update(x, labels, centroids)

        yield Example(f"{str(dtype)[6:]}, d {d}", round_of)
