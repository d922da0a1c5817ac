import pytest
import torch

from kvlib.kernels import attention as module
from kvlib.kernels.attention import Visible, attention
from tests.reference import causal, reference


def make(batch=2, q_heads=6, heads=2, n=5, keys=37, d=16, dv=24, dtype=torch.float32):
    shapes = (batch, q_heads, n, d), (batch, heads, keys, d), (batch, heads, keys, dv)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def check(q, k, v, visible, mask=None, softcap=None, tolerance=2e-6):
    part = attention(q, k, v, 0.3, visible, softcap)
    out, lse, _ = reference(q, k, v, 0.3, mask, softcap)
    torch.testing.assert_close(part.out.double(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(part.lse.double(), lse, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("n", [1, 5, 37])
def test_causal_grouped_heads(group, n):
    q, k, v = make(q_heads=2 * group, n=n)
    check(q, k, v, Visible(causal=True), causal(n, 37))


@pytest.mark.parametrize("step", [16, 32])
def test_blocks_of_rows_do_not_show(monkeypatch, step):
    monkeypatch.setattr(module, "_BLOCK_ROWS", step)
    q, k, v = make(n=61, keys=90)
    check(q, k, v, Visible(causal=True), causal(61, 90))
    for window in (1, 7, 33):
        row, key = torch.arange(29, 90)[:, None], torch.arange(90)
        check(q, k, v, Visible(causal=True, window=window), causal(61, 90) & (key > row - window))


def test_softcap_and_everything_visible():
    q, k, v = make()
    check(3 * q, k, v, Visible(), softcap=5.0)


def test_padding_ragged_lengths_and_rows_that_see_nothing():
    q, k, v = make(batch=3, n=4)
    key = torch.arange(37)
    start = torch.tensor([0, 11, 36])
    mask = causal(4, 37) & (key >= start[:, None, None, None])
    check(q, k, v, Visible(causal=True, start=start), mask)
    length = torch.tensor([37, 1, 0])
    check(q, k, v, Visible(length=length), (key < length[:, None, None, None]).expand(3, 6, 4, 37))
    empty = attention(q, k, v, 0.3, Visible(length=length))
    assert torch.equal(empty.out[2], torch.zeros(6, 4, 24))
    assert torch.equal(empty.lse[2], torch.full((6, 4), float("-inf")))


def test_window_with_sinks_counts_both_from_each_row():
    q, k, v = make(batch=2, n=6)
    key, row = torch.arange(37), torch.arange(31, 37)[:, None]
    start, sink = torch.tensor([0, 9]), torch.tensor([4, 0])
    near = key > row - 8
    first = key < (start + sink)[:, None, None, None]
    mask = causal(6, 37) & (near | first) & (key >= start[:, None, None, None])
    check(q, k, v, Visible(causal=True, start=start, window=8, sink=sink), mask)


@pytest.mark.parametrize("heads", [1, 6])
def test_stock_masks_boolean_and_additive(heads):
    q, k, v = make()
    mask = torch.rand(2, heads, 5, 37) > 0.4
    check(q, k, v, Visible(mask=mask), mask)
    check(q, k, v, Visible(mask=torch.zeros(mask.shape).masked_fill_(~mask, -1e30)), mask)


def test_strided_keys_and_poisoned_slack():
    q, k, v = make()
    room_k, room_v = torch.full((2, 2, 80, 16), float("nan")), torch.full((2, 2, 80, 24), float("nan"))
    room_k[:, :, 9:46], room_v[:, :, 9:46] = k, v
    ours = attention(q, room_k[:, :, 9:46], room_v[:, :, 9:46], 0.3)
    plain = attention(q, k, v, 0.3)
    torch.testing.assert_close(ours.out, plain.out)
    torch.testing.assert_close(ours.lse, plain.lse)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    q, k, v = make(dtype=dtype)
    check(q, k, v, Visible(causal=True), causal(5, 37), tolerance=tolerance)


def test_lse_is_optional_and_does_not_change_the_output():
    q, k, v = make(n=1)
    bare, full = attention(q, k, v, 0.3, lse=False), attention(q, k, v, 0.3, probabilities=True)
    assert bare.lse is None or torch.equal(bare.lse, full.lse)  # some kernels have it anyway
    assert torch.equal(bare.out, full.out)
    torch.testing.assert_close(full.p.double(), reference(q, k, v, 0.3)[2][:, :, 0], atol=1e-6, rtol=1e-6)
