import pytest
import torch

from kvlib.kernels.hadamard import _rotation, rotate, rotate_back

DIMS = [2, 64, 80, 96, 128, 256]
ORDER = {2: 2, 64: 64, 80: 16, 96: 32, 128: 128, 256: 256}


def matrix(d, seed):
    """R in float64 by the closed form of Sylvester's matrix: entry (i, j) is -1 to the number of bits i and j share."""
    eps = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    order = ORDER[d]
    r = torch.zeros(d, d, dtype=torch.float64)
    for i in range(d):
        for j in range(d):
            if i // order == j // order:
                r[i, j] = (-1) ** ((i % order) & (j % order)).bit_count() * eps[j] / order**0.5
    return r


@pytest.mark.parametrize("d", DIMS)
def test_it_is_the_signed_sylvester_matrix_in_blocks(d):
    x = torch.randn(3, 5, d)
    expected = x.double() @ matrix(d, 7).T
    torch.testing.assert_close(rotate(x, 7).double(), expected, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(rotate_back(rotate(x, 7), 7), x, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("d", DIMS)
def test_it_is_orthogonal_and_keeps_inner_products(d):
    r = rotate(torch.eye(d), 3).T.double()
    assert (r @ r.T - torch.eye(d)).abs().max() <= 1e-6
    assert (rotate_back(torch.eye(d), 3).double() - r).abs().max() <= 1e-6
    q, k = torch.randn(2, 4, 3, d)
    torch.testing.assert_close((rotate(q) * rotate(k)).sum(-1), (q * k).sum(-1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("d", DIMS)
def test_one_outlier_channel_is_spread_evenly_over_its_block(d):
    key = torch.zeros(d)
    key[d - 1] = 8.0
    spread = rotate(key).abs()
    torch.testing.assert_close(spread[-ORDER[d] :], torch.full((ORDER[d],), 8 / ORDER[d] ** 0.5))
    assert torch.equal(spread[: -ORDER[d]], torch.zeros(d - ORDER[d]))


def test_signs_come_first_so_a_constant_vector_does_not_collapse():
    assert rotate(torch.ones(128)).abs().max() < 5  # without signs its whole norm, 11.3, lands in one coordinate


def test_seeds_differ_and_repeat():
    x = torch.randn(4, 64)
    assert torch.equal(rotate(x, 1), rotate(x, 1))
    assert (rotate(x, 1) - rotate(x, 2)).abs().max() > 0.1
    state = torch.get_rng_state()
    rotate(x, 12345)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_arithmetic_is_fp32_whatever_comes_in(dtype):
    x = torch.randn(4, 128).to(dtype)
    for turn in (rotate, rotate_back):
        assert turn(x).dtype == torch.float32
        assert torch.equal(turn(x), turn(x.float()))


def test_a_weighted_sum_can_be_rotated_back_once():
    values, weights = torch.randn(20, 80), torch.rand(3, 20)
    torch.testing.assert_close(rotate_back(weights @ rotate(values)), weights @ values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d", [1, 81])
def test_odd_dimensions_are_refused(d):
    for turn in (rotate, rotate_back):
        with pytest.raises(ValueError, match=rf"{d} dimensions.*must be even"):
            turn(torch.ones(2, d))


def test_a_matrix_first_made_in_inference_mode_serves_autograd():
    with torch.inference_mode():
        rotate(torch.ones(1, 48), 991)
    assert not _rotation(48, 991, torch.device("cpu")).is_inference()
    x = torch.randn(2, 48, requires_grad=True)
    rotate(x, 991).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_the_default_dtype_of_the_moment_is_not_what_is_cached():
    x = torch.randn(4, 40)
    torch.set_default_dtype(torch.bfloat16)
    try:
        turned = rotate(x, 992)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(rotate_back(turned, 992), x, atol=5e-6, rtol=1e-5)
