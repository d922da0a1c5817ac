import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.attention import Visible, attention
from kvlib.kernels.column_mass import column_mass, launch_mass, walked_mass
from tests.kernels.poison import DEVICE, ERROR, error, poisoned
from tests.reference import causal, reference


@given(st.integers(1, 40), st.integers(0, 30), st.sampled_from([1, 2, 4]), st.booleans())
def test_two_passes_equal_the_columns_of_a_softmax(n, older, group, capped):
    torch.manual_seed(n)
    keys, softcap = n + older, 3.0 if capped else None
    q, k, v = torch.randn(2, 2 * group, n, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    visible = Visible(causal=True)
    lse = attention(q, k, v, 0.5, visible, softcap).lse
    mass = column_mass(q, k, lse, 0.5, visible, softcap)
    p = reference(q, k, v, 0.5, causal(n, keys), softcap)[2]
    torch.testing.assert_close(mass.double(), p.view(2, 2, -1, keys).sum(2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), float(group * n)), atol=1e-4, rtol=1e-4)


def test_queries_of_padding_do_not_vote():
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    visible = Visible(causal=True, start=torch.tensor([2]))
    lse = attention(q, k, v, 0.5, visible).lse
    assert (lse[:, :, :2] == float("-inf")).all()
    mass = column_mass(q, k, lse, 0.5, visible)
    assert torch.equal(mass[..., :2], torch.zeros(1, 1, 2))
    torch.testing.assert_close(mass.sum(), torch.tensor(2.0 * 4))


def plain(q, k, scale, softcap=0.0, causal=False, start=None, length=None, window=None, sink=0, sinks=None):
    """Float64, one query row and key at a time: mass [B, H, T] and lse [B, Hq, n]."""
    batch, q_heads, n, _ = q.shape
    heads, keys = k.shape[1:3]
    logits = q.double().cpu() @ k.double().cpu().repeat_interleave(q_heads // heads, 1).mT * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    for b in range(batch):
        first = 0 if start is None else int(start[b])
        kept = first + (sink if sinks is None else int(sinks[b]))
        for i in range(n):
            at = keys - n + i
            for t in range(keys):
                hidden = t < first or (length is not None and t >= int(length[b])) or (causal and t > at)
                if hidden or (window is not None and t <= at - window and t >= kept):
                    logits[b, :, i, t] = -math.inf
    lse = logits.logsumexp(-1)
    p = (logits - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    return p.view(batch, heads, -1, n, keys).sum((2, 3)), lse


def check(q, k, scale, *rest, **options):
    """The kernel and the walk against float64; poison says that every key was written."""
    mass, lse = plain(q, k, scale, *rest, **options)
    lse = torch.stack([lse.float(), torch.full(lse.shape, math.nan)], -1).to(DEVICE)[..., 0]
    with poisoned():
        found = launch_mass(q, k, lse, scale, *rest, **options)
    assert found.isfinite().all()
    assert (found.cpu()[mass == 0] == 0).all()
    assert error(found, mass) <= ERROR[q.dtype]
    assert error(walked_mass(q, k, lse, scale, *rest, **options), mass) <= ERROR[q.dtype]
    return found


def tensors(batch, heads, group, n, keys, d, dtype):
    q, k = torch.randn(batch, heads * group, n, d), torch.randn(batch, heads, keys, d)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("keys", [1, 127, 128, 129])
def test_one_query_row_and_every_number_of_keys_around_a_block(keys, dtype):
    q, k = tensors(2, 2, 4, 1, keys, 32, dtype)
    found = check(q, k, 0.2, causal=True)
    torch.testing.assert_close(found.sum(-1), torch.full((2, 2), 4.0, device=DEVICE), atol=2e-2, rtol=0)


@pytest.mark.parametrize(("group", "n"), [(1, 64), (4, 16), (5, 33), (1, 1), (4, 65)])
@pytest.mark.parametrize("d", [64, 128])
def test_groups_and_chunks_that_fill_a_tile_of_rows_and_do_not(group, n, d):
    q, k = tensors(1, 2, group, n, n + 70, d, torch.float16)
    check(q, k, d**-0.5, causal=True)
    check(q, k, d**-0.5, 2.0)


def test_head_sizes_that_are_no_power_of_two_and_strides_of_any_kind():
    q, k = tensors(2, 2, 2, 9, 40, 80, torch.bfloat16)
    around = torch.full((80, 2, 44, 4), math.nan, dtype=torch.bfloat16, device=DEVICE)
    view = around.permute(1, 3, 2, 0)[:, ::2, 3:43]
    check(q.mT.contiguous().mT, view.copy_(k), 0.1, causal=True)


@settings(max_examples=25)
@given(st.data())
def test_rows_that_start_end_and_forget_anywhere(data):
    torch.manual_seed(0)
    n, older = data.draw(st.sampled_from([1, 5, 40])), data.draw(st.sampled_from([0, 7, 150]))
    q, k = tensors(2, 1, 2, n, n + older, 16, torch.float32)
    pair = st.lists(st.integers(0, n + older), min_size=2, max_size=2).map(lambda x: torch.tensor(x, device=DEVICE))
    maybe = st.one_of(st.none(), pair)
    check(
        q,
        k,
        0.5,
        data.draw(st.sampled_from([0.0, 3.0])),
        data.draw(st.booleans()),
        data.draw(maybe),
        data.draw(maybe),
        data.draw(st.one_of(st.none(), st.integers(1, 60))),
        data.draw(st.integers(0, 20)),
        data.draw(maybe),
    )


def test_a_window_over_many_blocks_of_keys_and_rows():
    q, k = tensors(1, 1, 2, 300, 400, 16, torch.float16)
    check(q, k, 0.3, causal=True, start=torch.tensor([5], device=DEVICE), window=40, sink=3)


def test_rows_that_do_not_count_and_keys_of_which_others_have_the_rest():
    q, k = tensors(1, 1, 2, 6, 20, 16, torch.float32)
    lse = plain(q, k, 0.5)[1].float().to(DEVICE)
    lse[:, :, :2], lse[:, :, 2] = math.inf, -math.inf
    p = (q.double() @ k.double().mT * 0.5 - lse.double().unsqueeze(-1)).exp()[:, :, 3:].sum((1, 2))
    half = launch_mass(q, k[:, :, :11], lse, 0.5)
    torch.testing.assert_close(half[:, 0].double(), p[:, :11], atol=1e-5, rtol=1e-4)


def test_garbage_that_nobody_sees_never_shows_and_runs_repeat():
    q, k = tensors(1, 2, 2, 40, 140, 16, torch.float16)
    start, length = torch.tensor([9], device=DEVICE), torch.tensor([131], device=DEVICE)
    lse = plain(q, k, 0.5, 0.0, True, start, length)[1].float().to(DEVICE)
    before = launch_mass(q, k, lse, 0.5, 0.0, True, start, length)
    k[:, :, :9], k[:, :, 131:] = math.nan, math.inf
    assert torch.equal(launch_mass(q, k, lse, 0.5, 0.0, True, start, length), before)


def test_a_mask_is_left_to_torch_and_all_else_goes_to_the_operator():
    q, k = tensors(2, 1, 2, 3, 10, 16, torch.float32)
    mask = torch.rand(2, 1, 3, 10, device=DEVICE) < 0.7
    mask[..., 0] = True
    logits = (q @ k.mT * 0.5).masked_fill(~mask, -math.inf)
    lse, wanted = logits.logsumexp(-1), torch.softmax(logits, -1).sum((1, 2))
    torch.testing.assert_close(column_mass(q, k, lse, 0.5, Visible(mask=mask))[:, 0], wanted, atol=1e-5, rtol=1e-4)
    sinks, start = torch.tensor([1, 3], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    for sink, options in ((2, {"sink": 2}), (sinks, {"sinks": sinks})):
        mass, lse = plain(q, k, 0.5, 2.0, True, start, window=4, **options)
        visible = Visible(True, start, window=4, sink=sink)
        found = column_mass(q, k, lse.float().to(DEVICE), 0.5, visible, 2.0)
        torch.testing.assert_close(found.cpu().double(), mass, atol=1e-5, rtol=1e-4)
