"""Spherical k-means of one row's keys, head by head: which tokens point the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlib.kernels.kmeans import assign, directions, nearest, update
from kvlib.kernels.ran import note

_TAKEN = 12  # starting points taken from one draw, at most


@torch.no_grad()
def spherical_kmeans(
    keys: Tensor, clusters: int, iterations: int, seeds: Sequence[int], backend: str = "torch", centre: bool = True
) -> Tensor:
    """Cluster of every token, int64 [H, m] in 0..clusters-1, from keys [H, m, d] of one row, by cosine.

    iterations: updates of the centroids, at most.  seeds: one per head; all that is random in a head comes from it.
    backend: "torch", or "faiss" (an optional package).  centre: take the head's mean key away first.

    Both backends start from the same points, found by k-means++; no head is affected by the heads beside it.  With as many
    clusters as tokens, each token is its own cluster.
    """
    refine = _backend(backend)
    heads, m, d = keys.shape
    labels = torch.arange(m, device=keys.device).repeat(heads, 1)
    if clusters >= m:
        return labels
    with torch.autocast(keys.device.type, enabled=False):
        if keys.is_cuda and refine is _lloyd:
            note("k-means", "Triton")
            return _together(keys, clusters, iterations, seeds, centre)
        note("k-means", "torch" if refine is _lloyd else f"faiss on {'a GPU' if _gpus(keys) else 'the CPU'}")
        for label, head, seed in zip(labels, keys, seeds, strict=True):
            # A copy of its own: the same memory layout, so the same rounding, whatever the head was a slice of.
            x = torch.empty(m, d, dtype=torch.float32, device=keys.device).copy_(head)
            if centre:
                x -= x.mean(0)
            unit = F.normalize(x, dim=-1)
            label.copy_(refine(x, unit, _start(unit, clusters, seed), iterations))
    return labels


def check_backend(name: str) -> None:
    """Raise ValueError for a backend nobody knows, ImportError where its package is missing."""
    _backend(name)


def _backend(name: str) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    if name == "torch":
        return _lloyd
    if name != "faiss":
        raise ValueError(f"unknown k-means backend {name!r}: give 'torch' or 'faiss'")
    try:
        import faiss
    except ImportError as error:
        raise ImportError("the k-means backend 'faiss' needs faiss: pip install kvlib[faiss]") from error
    return partial(_faiss, faiss)


def _start(unit: Tensor, clusters: int, seed: int) -> Tensor:
    """Starting centroids [C, d]: directions drawn far from those taken before, the most useful of each draw first.

    Greedy k-means++ in draws: the candidates of a draw cost one product, and each is judged by what it would add to the
    cosines of a sample after those taken before it, so one of a direction already covered adds little and is left.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(16 * clusters, max(8 * clusters, 1024))
    sample = unit[torch.randperm(len(unit), generator=generator)[:size].to(unit.device)]
    draw = min(128, max(32, (1 << 17) // len(sample)))  # many candidates where they are cheap
    cosine = sample.new_zeros(len(sample))  # with the nearest starting point; none yet: as if one orthogonal to all
    taken: list[Tensor] = []
    while len(taken) < clusters:
        # Drawn on the CPU in double precision: a running sum on a GPU may differ from one call to the next.
        edges = (1 - cosine).clamp_min(0).square().cpu().double().cumsum(0)
        spots = torch.rand(draw, generator=generator, dtype=torch.float64) * edges[-1]
        places = torch.searchsorted(edges, spots, right=True).clamp_max(len(sample) - 1)
        candidates = sample[places.to(unit.device)]
        reach = candidates @ sample.T
        for _ in range(min(_TAKEN, clusters - len(taken))):
            torch.maximum(reach, cosine, out=reach)
            # Rounded: two tokens that are all the other has are equally good, and rounding errors must not choose.
            best = (reach.mean(1) * 8192).round().argmax(0, keepdim=True)
            cosine = reach.index_select(0, best)[0]
            taken.append(candidates.index_select(0, best))
    return torch.cat(taken)


def _lloyd(x: Tensor, unit: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    labels, cosine = nearest(unit, centroids)
    for _ in range(iterations):
        before, known = centroids, labels
        centroids = directions(x, labels, before)
        # Late rounds move few centroids.  Those that stayed cannot beat what a token had before, so a token looks at the
        # moved ones only, unless its own moved away and left it with less.
        moved = (centroids != before).any(1)
        which = moved.nonzero()[:, 0]
        if 2 * len(which) > len(centroids):
            labels, cosine = nearest(unit, centroids)
        elif len(which):
            place, score = nearest(unit, centroids[which])
            place, own = which[place], moved[known]
            keep = (cosine > score) | ((cosine == score) & (known < place))
            worse = (own & (score <= cosine)).nonzero()[:, 0]
            labels, cosine = torch.where(keep, known, place), torch.where(keep, cosine, score)
            labels[worse], cosine[worse] = nearest(unit[worse], centroids)
        if torch.equal(labels, known):
            break
    return labels


def _together(keys: Tensor, clusters: int, iterations: int, seeds: Sequence[int], centre: bool) -> Tensor:
    """All heads at once, in as many rounds as allowed: what has settled stays, and nobody waits for the device to know."""
    x = torch.empty(keys.shape, dtype=torch.float32, device=keys.device).copy_(keys)
    if centre:
        x -= x.mean(1, keepdim=True)
    unit = F.normalize(x, dim=-1)
    centroids = torch.stack([_start(head, clusters, seed) for head, seed in zip(unit, seeds, strict=True)])
    exact = torch.float16 if keys.is_cuda else torch.float32  # of directions fp16 keeps more than bf16 or tf32 would
    unit = unit.to(exact)
    labels, _ = assign(unit, centroids.to(exact))
    for _ in range(iterations):
        centroids = update(x, labels, centroids)
        labels, _ = assign(unit, centroids.to(exact))
    return labels


def _gpus(x: Tensor) -> int:
    """How many GPUs faiss takes for x: one, if x is on a GPU and this faiss knows any."""
    import faiss

    return min(1, int(faiss.get_num_gpus())) if x.is_cuda else 0


def _faiss(faiss: Any, x: Tensor, unit: Tensor, start: Tensor, iterations: int) -> Tensor:
    data = unit.cpu().numpy()
    kmeans = faiss.Kmeans(
        data.shape[1],
        len(start),
        niter=iterations,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(data),  # its default leaves tokens out
        gpu=_gpus(unit),
    )
    kmeans.train(data, init_centroids=start.cpu().numpy())
    return torch.from_numpy(kmeans.index.search(data, 1)[1][:, 0])
