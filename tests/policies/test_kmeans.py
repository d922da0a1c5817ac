"""Keys that point the same way end in the same cluster, whatever stands beside them."""

import sys
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from kvlib.policies.select.kmeans import _lloyd, _start, spherical_kmeans

both = pytest.mark.parametrize("backend", ["torch", "faiss"])


def cloud(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(seed, d, noise=0.1):
    """Eight orthogonal directions, 64 keys each, interleaved [1, 512, d]."""
    directions = torch.linalg.qr(cloud(seed, d, d))[0][:8]
    return (directions.repeat(64, 1) + noise * cloud(seed + 1000, 512, d))[None]


def same_partition(one, other):
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


def centred(keys):
    x = keys.double() - keys.double().mean(0)
    return x, F.normalize(x, dim=-1)


def gain(keys, labels, of_units=True):
    """Mean cosine of a head's keys with the mean direction of their cluster; else with the mean key, longer keys more."""
    members = centred(keys)[of_units]
    means = torch.zeros(len(keys), keys.shape[1], dtype=members.dtype).index_add(0, labels, members)
    return (means.norm(dim=1).sum() / members.norm(dim=1).sum()).item()


def plain(keys, clusters, iterations, seed, of_units=False):
    """The algorithm written out in double precision, from the same starting points."""
    x, unit = centred(keys)
    centroids = _start(F.normalize(keys - keys.mean(0), dim=-1), clusters, seed).double()
    for _ in range(iterations):
        labels = (unit @ centroids.T).argmax(1)
        for c in range(clusters):
            if (labels == c).any():
                centroids[c] = F.normalize((unit if of_units else x)[labels == c].mean(0), dim=0)
    return (unit @ centroids.T).argmax(1)


@both
@pytest.mark.parametrize("d", [16, 128])
@pytest.mark.parametrize("seed", range(8))
def test_planted_directions_are_found(backend, d, seed):
    labels = spherical_kmeans(planted(seed, d), 8, 20, [seed], backend)[0]
    assert same_partition(labels, torch.arange(512) % 8)


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 20, 100])
@pytest.mark.parametrize(("m", "d", "clusters"), [(700, 16, 70), (3000, 8, 90), (700, 16, 5), (333, 7, 1), (64, 8, 63)])
def test_it_is_lloyds_algorithm(m, d, clusters, iterations):
    """Exactly, though late rounds look only at the centroids that moved."""
    keys = cloud(3, 1, m, d) * cloud(4, 1, m, 1).exp()
    labels = spherical_kmeans(keys, clusters, iterations, [7])[0]
    assert torch.equal(labels, plain(keys[0], clusters, iterations, 7))


@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_faiss_is_lloyds_algorithm_on_every_token(iterations):
    keys = cloud(3, 1, 1500, 16)  # more tokens per cluster than faiss would train on by itself
    labels = spherical_kmeans(keys, 4, iterations, [7], "faiss")[0]
    assert torch.equal(labels, plain(keys[0], 4, iterations, 7, of_units=True))


@both
def test_no_head_is_affected_by_those_beside_it(backend):
    keys, seeds = cloud(0, 5, 301, 19), [3, 1, 4, 1, 5]
    together = spherical_kmeans(keys, 11, 10, seeds, backend)
    assert together.dtype == torch.int64
    assert together.shape == (5, 301)
    assert torch.equal(together, spherical_kmeans(keys, 11, 10, seeds, backend))
    for h, seed in enumerate(seeds):
        assert torch.equal(together[h : h + 1], spherical_kmeans(keys[h : h + 1].clone(), 11, 10, [seed], backend))
    for i, j in [(0, 1), (1, 2), (0, 2)]:
        strided = keys.transpose(i, j).contiguous().transpose(i, j)
        assert torch.equal(together, spherical_kmeans(strided, 11, 10, seeds, backend))
    torch.manual_seed(99)
    assert torch.equal(together, spherical_kmeans(keys, 11, 10, seeds, backend))


@both
def test_a_heads_seed_is_all_that_is_random(backend):
    keys = cloud(0, 1, 400, 16).repeat(3, 1, 1)
    labels = spherical_kmeans(keys, 20, 3, [5, 6, 5], backend)
    assert torch.equal(labels[0], labels[2])
    assert not same_partition(labels[0], labels[1])


def test_starting_points_are_far_apart():
    """A hundred keys to each of 2 directions, one to each of 6 more: drawn uniformly, most of these would be missed."""
    unit = torch.eye(8)[[0] * 100 + [1] * 100 + list(range(2, 8))]
    for seed in range(20):
        assert torch.equal(_start(unit, 20, seed).unique(dim=0), torch.eye(8).unique(dim=0))


@both
def test_more_iterations_do_not_lose(backend):
    keys = cloud(1, 1, 1000, 24) * cloud(2, 1, 1000, 1).exp()
    found = [spherical_kmeans(keys, 30, n, [0], backend)[0] for n in range(12)]
    # faiss takes the mean of directions, the torch backend that of keys: each climbs by its own measure.
    own = [gain(keys[0], labels, of_units=backend == "faiss") for labels in found]
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(own))
    gains = [gain(keys[0], labels) for labels in found]
    assert all(later >= earlier - 3e-3 for earlier, later in pairwise(gains))
    assert gains[-1] > gains[0] + 0.01
    by_chance = torch.randint(30, (1000,), generator=torch.Generator().manual_seed(0))
    assert gains[-1] > gain(keys[0], by_chance) + 0.2


@both
def test_directions_are_seen_from_the_mean_key_unless_told_otherwise(backend):
    keys = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [1.0, 1.0], [5.0, 5.0]]])
    for seed in range(4):
        centred = spherical_kmeans(keys, 2, 20, [seed], backend)[0]
        assert same_partition(centred, torch.tensor([0, 1, 0, 1]))
        raw = spherical_kmeans(keys, 2, 20, [seed], backend, centre=False)[0]
        assert same_partition(raw, torch.tensor([0, 0, 1, 1]))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_computed_in_single_precision(backend, dtype):
    keys = cloud(0, 2, 300, 16).to(torch.bfloat16)
    wanted = spherical_kmeans(keys.float(), 9, 20, [0, 1], backend)
    assert torch.equal(spherical_kmeans(keys.to(dtype), 9, 20, [0, 1], backend), wanted)


def test_the_surroundings_of_a_model_change_nothing():
    keys = cloud(0, 2, 300, 16)
    wanted = spherical_kmeans(keys, 9, 20, [0, 1])
    assert torch.equal(spherical_kmeans(keys.clone().requires_grad_(), 9, 20, [0, 1]), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spherical_kmeans(keys, 9, 20, [0, 1]), wanted)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(spherical_kmeans(keys, 9, 20, [0, 1]), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@both
@pytest.mark.parametrize("centre", [True, False])
def test_repeated_and_zero_keys(backend, centre):
    axes = torch.eye(4)
    keys = torch.stack([axes[torch.arange(40) % 3], torch.zeros(40, 4), torch.ones(40, 4)])
    keys[0, 30:] = 0
    labels = spherical_kmeans(keys, 6, 5, [0, 1, 2], backend, centre)
    assert labels.min() >= 0 and labels.max() < 6
    for direction in range(3):
        assert len(labels[0, direction:30:3].unique()) == 1
    assert len(labels[0, :30].unique()) == 3
    assert len(labels[0, 30:].unique()) == 1


def test_equals_go_to_the_lowest_cluster():
    labels = spherical_kmeans(torch.stack([torch.zeros(20, 4), torch.ones(20, 4)]), 3, 5, [0, 1], centre=False)
    assert (labels == 0).all()


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 0, 2, 3], [2, 3, 1, 0]])
def test_equals_go_to_the_lowest_cluster_when_one_of_them_moved(order):
    """The third key's centroid comes as near to the first key as the first key's own, which stays."""
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1]])
    centroids = F.normalize(torch.tensor([[0.0, 0, 1], [1, 1, 0], [-1, 0, 0], [0, -1, 0]]), dim=1)
    moving, staying = order.index(0), order.index(1)
    assert _lloyd(x, x, centroids[order], 0).tolist() == [staying, staying, moving]
    assert _lloyd(x, x, centroids[order], 1).tolist() == [min(moving, staying), staying, moving]


def test_an_empty_cluster_keeps_its_centroid_and_harms_none():
    keys = torch.eye(16)[:8].repeat(64, 1)[None]
    labels = spherical_kmeans(keys, 12, 20, [0], centre=False)[0]  # four clusters too many
    assert same_partition(labels, torch.arange(512) % 8)


@both
def test_few_tokens_and_few_clusters(backend):
    keys = cloud(0, 2, 7, 5)
    for clusters in (7, 8, 100):
        assert spherical_kmeans(keys, clusters, 20, [0, 1], backend).tolist() == [list(range(7))] * 2
    assert spherical_kmeans(keys[:, :1], 1, 20, [0, 1], backend).tolist() == [[0]] * 2
    assert spherical_kmeans(keys, 1, 20, [0, 1], backend).tolist() == [[0] * 7] * 2
    assert spherical_kmeans(keys[:, :0], 3, 20, [0, 1], backend).shape == (2, 0)
    six = spherical_kmeans(keys, 6, 20, [0, 1], backend)
    assert six.min() >= 0 and six.max() < 6 and all(len(row.unique()) >= 4 for row in six)


def test_errors_name_the_value_and_the_remedy(monkeypatch):
    keys = cloud(0, 2, 7, 5)
    with pytest.raises(ValueError, match=r"'sklearn'.*'torch' or 'faiss'"):
        spherical_kmeans(keys, 3, 20, [0, 1], "sklearn")
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        spherical_kmeans(keys, 3, 20, [0])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install kvlib\[faiss\]"):
        spherical_kmeans(keys, 3, 20, [0, 1], "faiss")
    spherical_kmeans(keys, 3, 20, [0, 1])
