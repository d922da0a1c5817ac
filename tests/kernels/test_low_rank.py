"""Factors as near as the best of their rank, for every matrix alone; rows that keep as much energy as any can."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.kernels.low_rank import low_rank, row_space


def matrix(spectrum, n, d, seed=0, lead=()):
    """Matrices [*lead, n, d] fp32 with singular values `spectrum`."""
    make = torch.Generator().manual_seed(seed)
    r = len(spectrum)
    left, right = (torch.linalg.qr(torch.randn(*lead, m, r, generator=make, dtype=torch.float64)).Q for m in (n, d))
    return ((left * torch.as_tensor(spectrum, dtype=torch.float64)) @ right.mT).float()


def best(x, rank):
    """What the singular values beyond `rank` amount to."""
    return torch.linalg.svdvals(x.double())[rank:].square().sum().sqrt().item()


DECAY = [0.6**i for i in range(32)]
SLOW = [1 / (1 + i) ** 0.2 for i in range(32)]


def errors(spectrum, rank, **more):
    """How much more than the best of 48 matrices' factors miss, [48]."""
    x = matrix(spectrum, 60, 32, lead=(48,))
    a, b = low_rank(x, rank, **more)
    return (x - a @ b.mT).double().norm(dim=(1, 2)) / best(x[0], rank)


@pytest.mark.parametrize("spectrum", [DECAY, SLOW])
def test_the_error_falls_with_the_rank_and_is_nearly_the_least_there_is(spectrum):
    """A start of `rank` columns is now and then nearly blind to a direction, so that a lone matrix can miss more."""
    last = float("inf")
    for rank in (1, 2, 3, 4, 8, 16):
        found = errors(spectrum, rank)
        assert (found >= 1 - 1e-5).all()
        assert found.mean() <= 1.06
        missed = found.mean().item() * best(matrix(spectrum, 60, 32), rank)
        assert missed < last
        last = missed


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_it_is_within_two_percent_where_a_gap_or_more_loops_help(rank):
    gap = [1.0] * rank + [0.15 * 0.8**i for i in range(32 - rank)]
    assert errors(gap, rank).max() <= 1.02
    assert errors(DECAY, rank, loops=8).max() <= 1.02


def test_every_loop_comes_nearer():
    found = [errors(SLOW, 4, loops=loops) for loops in (1, 2, 3, 10)]
    means = [each.mean().item() for each in found]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1.04
    assert means[2] < 1.03
    assert found[3].max() <= 1.02


@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 40), st.integers(1, 24), st.integers(0, 10**6))
def test_a_matrix_of_that_rank_comes_back(rank, spare, n, d, seed):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=make) @ torch.randn(rank, d, generator=make)
    a, b = low_rank(x, rank + spare)
    assert a.shape == (n, rank + spare)
    assert b.shape == (d, rank + spare)
    torch.testing.assert_close(a @ b.mT, x, atol=1e-5 * (1 + x.abs().max().item()), rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (3, 64), (64, 3), (64, 48)])
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_a_is_orthonormal_b_carries_the_values_and_columns_beyond_are_zero(shape, rank):
    x = torch.randn(2, *shape)
    a, b = low_rank(x, rank)
    r = min(rank, *shape)
    assert a.shape == (2, shape[0], rank)
    assert b.shape == (2, shape[1], rank)
    torch.testing.assert_close(a[..., :r].mT @ a[..., :r], torch.eye(r).expand(2, r, r), atol=1e-5, rtol=0)
    torch.testing.assert_close(b[..., :r], x.mT @ a[..., :r], atol=1e-5, rtol=1e-5)
    assert not a[..., r:].any()
    assert not b[..., r:].any()
    if rank >= min(shape):
        torch.testing.assert_close(a @ b.mT, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 16), (3, 64), (64, 3), (64, 64), (200, 128)])
@pytest.mark.parametrize("rank", [1, 4])
def test_no_matrix_depends_on_its_neighbours(shape, rank):
    """To the bit; the reference fits every batch element in the subspace of the first."""
    x = torch.randn(3, 2, *shape)
    a, b = low_rank(x, rank)
    for row in range(3):
        alone = low_rank(x[row : row + 1], rank)
        assert torch.equal(alone[0][0], a[row])
        assert torch.equal(alone[1][0], b[row])
        head = low_rank(x[row, 1], rank)  # a lone matrix is multiplied by another routine
        torch.testing.assert_close(head[0] @ head[1].mT, a[row, 1] @ b[row, 1].mT, atol=1e-4, rtol=1e-4)


def test_nothing_of_nothing():
    a, b = low_rank(torch.zeros(2, 5, 8), 3)
    assert a.isfinite().all()
    assert not (a @ b.mT).any()


def test_the_start_is_the_same_every_time_and_takes_nothing_from_the_global_generator():
    x = matrix(SLOW, 50, 32)
    state = torch.get_rng_state()
    first, second, other = low_rank(x, 4), low_rank(x, 4), low_rank(x, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert (first[0] @ first[1].mT - other[0] @ other[1].mT).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- row space
@pytest.mark.parametrize("shape", [(100, 32), (32, 40), (40, 96)])
@pytest.mark.parametrize("rank", [1, 5, 31])
def test_rows_are_orthonormal_and_keep_the_energy_of_the_largest_singular_values(shape, rank):
    x = matrix(SLOW, *shape, seed=4, lead=(3,))
    rows, share = row_space(x, rank)
    assert rows.shape == (3, rank, shape[1])
    assert share.shape == (3,)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(rank).expand(3, -1, -1), atol=1e-5, rtol=0)
    energies = torch.linalg.svdvals(x.double()).square()
    wanted = energies[:, :rank].sum(-1) / energies.sum(-1)
    torch.testing.assert_close(share.double(), wanted, atol=1e-5, rtol=1e-5)
    projected = (x @ rows.mT).square().sum((-2, -1)) / x.square().sum((-2, -1))
    torch.testing.assert_close(projected, share, atol=1e-5, rtol=1e-5)


def test_the_best_row_comes_first():
    x = matrix(DECAY, 100, 32)
    rows, _ = row_space(x, 5)
    kept = (x @ rows.mT).norm(dim=0)
    torch.testing.assert_close(kept, torch.tensor(DECAY[:5]), atol=1e-5, rtol=1e-4)


def test_all_rows_keep_everything_and_none_of_nothing():
    x = torch.randn(2, 10, 16)
    rows, share = row_space(x, 16)
    torch.testing.assert_close(x @ rows.mT @ rows, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(share, torch.ones(2))
    rows, share = row_space(torch.zeros(3, 4), 2)
    assert rows.isfinite().all()
    assert share == 0


def test_keys_on_few_directions_need_no_more_rows():
    x = torch.randn(60, 3) @ torch.randn(3, 24)
    rows, share = row_space(x, 3)
    assert share == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(x @ rows.mT @ rows, x, atol=1e-4, rtol=1e-4)
