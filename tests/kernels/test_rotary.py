import pytest
import torch

from kvlib.kernels.rotary import Rotary
from kvlib.kernels.rotary import frequencies as kept


def frequencies(pairs, theta=1e4):
    return tuple((theta ** -(torch.arange(pairs).float() / pairs)).tolist())


PLAIN = Rotary(frequencies(8))
LAYOUTS = [
    (PLAIN, 16),
    (Rotary(frequencies(8), interleaved=True), 16),
    (Rotary(frequencies(6), 1.3466), 20),
    (Rotary(frequencies(6), 0.75, interleaved=True), 20),
    (Rotary((1.0,)), 2),
]


def by_complex_numbers(rotary, x, positions):
    """The same in float64: each pair is one complex number, multiplied by scaling * exp(i angle) of the fp32 angle."""
    pairs = len(rotary.inv_freq)
    out = x.double().clone()
    for i, f in enumerate(rotary.inv_freq):
        one, other = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + pairs)
        angle = (positions.float() * torch.tensor(f, dtype=torch.float32)).double()
        z = torch.complex(x[..., one].double(), x[..., other].double()) * torch.polar(torch.ones_like(angle), angle)
        out[..., one], out[..., other] = z.real * rotary.scaling, z.imag * rotary.scaling
    return out


@pytest.mark.parametrize(("rotary", "d"), LAYOUTS)
def test_it_is_multiplication_by_a_complex_number(rotary, d):
    positions = torch.tensor([0, 1, 2, 77, 4095, 32768, 131071, 131072])
    x = torch.randn(2, 3, 8, d)
    expected = by_complex_numbers(rotary, x, positions)
    torch.testing.assert_close(rotary.turn(x, positions).double(), expected, atol=2e-6, rtol=1e-5)
    rest = 2 * len(rotary.inv_freq)
    assert torch.equal(rotary.turn(x, positions)[..., rest:], x[..., rest:])


@pytest.mark.parametrize(("rotary", "d"), LAYOUTS)
@pytest.mark.parametrize("first", [0, 4096, 131072])
def test_turn_back_is_its_inverse_both_ways(rotary, d, first):
    positions = torch.arange(first, first + 64)
    x = torch.randn(2, 64, d)
    close = {"atol": 1e-5 * x.abs().max().item(), "rtol": 0}
    torch.testing.assert_close(rotary.turn_back(rotary.turn(x, positions), positions), x, **close)
    torch.testing.assert_close(rotary.turn(rotary.turn_back(x, positions), positions), x, **close)


@pytest.mark.parametrize(("rotary", "d"), LAYOUTS)
def test_norms_change_by_the_scaling_only(rotary, d):
    x, rot = torch.randn(50, d), 2 * len(rotary.inv_freq)
    turned = rotary.turn(x, torch.arange(50) * 1000)
    torch.testing.assert_close(turned[..., :rot].norm(dim=-1), x[..., :rot].norm(dim=-1) * rotary.scaling)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_difference_of_positions_only(interleaved):
    rotary = Rotary(frequencies(16), interleaved=interleaved)
    q, k = torch.randn(2, 1, 32)

    def score(m, n):
        return (rotary.turn(q, torch.tensor([m])) * rotary.turn(k, torch.tensor([n]))).sum()

    for shift in (1, 50, 3000):
        torch.testing.assert_close(score(9 + shift, 2 + shift), score(9, 2), atol=2e-3, rtol=0)
    assert (score(10, 2) - score(9, 2)).abs() > 0.1


def test_fp32_angles_at_131072_are_within_4_milliradians_and_no_better():
    """What a model's own fp32 angles lose against exact ones; `turn` repeats it, and `turn_back` takes it back."""
    rotary, positions = Rotary(frequencies(64)), torch.arange(131072 - 500, 131072)
    x = torch.zeros(500, 128)
    x[:, :64] = 1
    turned = rotary.turn(x, positions).double()
    exact = positions[:, None].double() * torch.tensor(rotary.inv_freq, dtype=torch.float64)
    wrong = torch.complex(turned[:, :64], turned[:, 64:]) - torch.polar(torch.ones_like(exact), exact)
    assert 1e-3 < wrong.abs().max() <= 2**-8 + 1e-6


def test_positions_broadcast_over_heads_and_differ_by_row():
    x = torch.randn(2, 3, 5, 16)
    positions = torch.randint(0, 900, (2, 1, 5))
    turned = PLAIN.turn(x, positions)
    for b in range(2):
        for h in range(3):
            for m in range(5):
                alone = PLAIN.turn(x[b, h, m : m + 1], positions[b, 0, m : m + 1])
                torch.testing.assert_close(turned[b, h, m : m + 1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_arithmetic_is_fp32_whatever_comes_in(dtype):
    x, positions = torch.randn(3, 7, 16).to(dtype), torch.arange(7) + 500
    for turn in (PLAIN.turn, PLAIN.turn_back):
        assert turn(x, positions).dtype == torch.float32
        assert torch.equal(turn(x, positions), turn(x.float(), positions))


def test_vectors_smaller_than_the_rotation_are_refused():
    for turn in (PLAIN.turn, PLAIN.turn_back):
        with pytest.raises(ValueError, match=r"rotates 16 dimensions.*have 12"):
            turn(torch.randn(4, 12), torch.arange(4))


def test_frequencies_first_made_in_inference_mode_serve_autograd():
    rotary = Rotary((0.3125, 0.0078125))
    with torch.inference_mode():
        rotary.turn(torch.randn(3, 4), torch.arange(3))
    assert not kept(rotary.inv_freq, torch.device("cpu")).is_inference()
    x = torch.randn(3, 4, requires_grad=True)
    rotary.turn(x, torch.arange(3)).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
