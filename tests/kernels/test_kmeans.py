"""The two steps of spherical k-means: nearest centroids, and directions of the sums of their members."""

import pytest
import torch
from torch.nn import functional as F

from kvlib.kernels.kmeans import assign, directions_by_head, nearest_by_head, segmented_update, tiled_assign, update
from kvlib.policies.select.kmeans import _together, spherical_kmeans
from tests.kernels.poison import DEVICE, ERROR, error, poisoned

ROUNDING = 1e-6  # of a sum; the inputs are rounded before


def directions(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype).to(DEVICE)


def run_assign(unit, centroids):
    with poisoned():
        label, cosine = tiled_assign(unit, centroids)
    assert label.dtype == torch.int64 and cosine.dtype == torch.float32
    return label, cosine


def run_update(x, labels, before):
    with poisoned():
        found = segmented_update(x, labels, before)
    assert torch.equal(found, segmented_update(x, labels, before))
    for reference in (directions_by_head, update):
        torch.testing.assert_close(reference(x, labels, before), found, atol=1e-5, rtol=1e-5)
    return found


# ------------------------------------------------------------------------------------------------------------- assign
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("m", "clusters", "d"), [(1, 1, 16), (31, 2, 20), (33, 33, 128), (129, 31, 8), (130, 65, 64)])
def test_the_nearest_centroid_is_found(m, clusters, d, dtype):
    unit, centroids = directions(3, m, d, dtype=dtype), directions(3, clusters, d, dtype=dtype)
    label, cosine = run_assign(unit, centroids)
    true = unit.double() @ centroids.double().mT
    best, lowest = true.max(-1)
    assert (cosine - best).abs().max() < ROUNDING
    assert (true.gather(-1, label.unsqueeze(-1))[..., 0] >= best - 2 * ROUNDING).all()
    assert (label == lowest).float().mean() > 0.99
    for reference in (nearest_by_head, assign):
        other, height = reference(unit, centroids)
        assert (other == label).float().mean() > 0.99
        assert (height - cosine).abs().max() < ROUNDING


@pytest.mark.parametrize("clusters", [3, 32, 70])
def test_equals_go_to_the_lowest_cluster(clusters):
    """Also where they stand in different tiles, and where all are equal."""
    unit = torch.eye(8, device=DEVICE)[None].repeat(2, 5, 1)
    centroids = torch.eye(8, device=DEVICE)[torch.arange(clusters) % 3][None].repeat(2, 1, 1)
    label, cosine = run_assign(unit, centroids)
    kind = torch.arange(40, device=DEVICE) % 8
    assert torch.equal(label, torch.where(kind < 3, kind, 0).expand(2, -1))
    assert torch.equal(cosine, (kind < 3).float().expand(2, -1))
    assert torch.equal(nearest_by_head(unit, centroids)[0], label)


def test_every_head_has_centroids_of_its_own_whatever_the_strides():
    unit, centroids = directions(3, 40, 16), directions(3, 40, 16)
    label, cosine = run_assign(unit, centroids)
    wide = torch.full((40, 3, 20), float("nan"), device=DEVICE)
    wide[..., :16] = unit.transpose(0, 1)
    again = run_assign(wide[..., :16].transpose(0, 1), centroids.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(again[0], label) and torch.equal(again[1], cosine)
    alone = run_assign(unit[1:2], centroids[1:2])
    assert torch.equal(alone[0], label[1:2]) and torch.equal(alone[1], cosine[1:2])


# ------------------------------------------------------------------------------------------------------------- update
@pytest.mark.parametrize(("m", "clusters", "d"), [(1, 1, 16), (15, 3, 20), (16, 3, 8), (17, 2, 128), (100, 7, 64)])
def test_directions_of_the_sums(m, clusters, d):
    x, before = torch.randn(2, m, d, device=DEVICE) * 10, directions(2, clusters, d)
    labels = torch.randint(clusters, (2, m), device=DEVICE)
    found = run_update(x, labels, before)
    for h in range(2):
        for c in range(clusters):
            members = x[h, labels[h] == c].double()
            wanted = F.normalize(members.sum(0), dim=0) if len(members) else before[h, c]
            assert error(found[h, c], wanted) < 1e-5


def test_empty_and_cancelling_clusters_keep_the_centroid_they_had():
    x = torch.zeros(1, 6, 4, device=DEVICE)
    x[0, 0, 0], x[0, 3, 0], x[0, 4] = 3.0, -3.0, torch.tensor([0.0, 2.0, 0.0, 0.0])
    labels = torch.tensor([[1, 2, 2, 1, 4, 4]], device=DEVICE)  # cancels out: 1, of zeros: 2, empty: 0, 3 and 5
    before = directions(1, 6, 4)
    found = run_update(x, labels, before)
    kept = [0, 1, 2, 3, 5]
    assert torch.equal(found[0, kept], before[0, kept])
    assert found[0, 4].tolist() == [0, 1, 0, 0]


def test_all_in_one_cluster_and_vectors_of_any_strides():
    x = torch.randn(50, 2, 24, device=DEVICE)[..., 3:19].transpose(0, 1)
    labels = torch.full((2, 50), 3, device=DEVICE)
    before = directions(2, 5, 16)
    found = run_update(x, labels, before)
    assert error(found[:, 3], F.normalize(x.double().sum(1), dim=-1)) < 1e-5
    assert torch.equal(found[:, [0, 1, 2, 4]], before[:, [0, 1, 2, 4]])


# ------------------------------------------------------------------------------------------------------------- rounds
def test_rounds_of_both_are_lloyds_algorithm():
    unit = directions(2, 90, 16)
    label, centroids = None, unit[:, :6].clone()
    true = centroids.double()
    for _ in range(4):
        label, _ = run_assign(unit, centroids)
        centroids = run_update(unit, label, centroids)
        wanted = (unit.double() @ true.mT).argmax(-1)
        assert torch.equal(label, wanted)
        true = torch.stack(
            [
                F.normalize(torch.eye(6, device=DEVICE)[w].double().T @ u, dim=-1)
                for w, u in zip(wanted, unit.double(), strict=True)
            ]
        )


def test_operators_say_what_they_give():
    unit, centroids = directions(2, 30, 16), directions(2, 4, 16)
    torch.library.opcheck(assign, (unit, centroids))
    torch.library.opcheck(update, (unit, assign(unit, centroids)[0], centroids))


@pytest.mark.parametrize("iterations", [0, 1, 20])
@pytest.mark.parametrize("centre", [True, False])
def test_all_heads_at_once_as_head_by_head(iterations, centre):
    keys = torch.randn(3, 400, 16, device=DEVICE)
    found = _together(keys, 9, iterations, [1, 2, 3], centre)
    wanted = spherical_kmeans(keys.cpu(), 9, iterations, [1, 2, 3], centre=centre).to(DEVICE)
    assert (found == wanted).float().mean() > (0.999 if DEVICE == "cpu" else 0.9)
