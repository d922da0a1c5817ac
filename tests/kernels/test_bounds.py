"""What a unit promises: plain products, a centre and a spread, and the box that no key of a page leaves."""

import pytest
import torch

from kvlib.kernels.bounds import bounded, bounds, products, score
from tests.kernels.poison import DEVICE, ERROR, error, poisoned

KINDS = ("product", "spread", "box")


def tensors(batch, heads, group, units, d, dtype, strided=False):
    """Queries [B, Hq, d] and two summaries [B, H, U, d]; strided: as parts of one pool, units first, from an offset."""
    q = torch.randn(batch, heads * group, d)
    first, second = torch.randn(2, batch, heads, units, d).to(dtype)
    if strided:
        pool = torch.full((batch, units + 3, heads, 2, d + 8), float("nan"), dtype=dtype)
        pool[:, 3:, :, 0, :d], pool[:, 3:, :, 1, :d] = first.transpose(1, 2), second.transpose(1, 2)
        first, second = (pool[:, 3:, :, i, :d].transpose(1, 2) for i in (0, 1))
        q = torch.empty(heads * group, batch, d).copy_(q.transpose(0, 1)).transpose(0, 1)
    return q.to(dtype).to(DEVICE), first.to(DEVICE), second.to(DEVICE)


def plain(q, first, second, kind):
    """Float64, channel by channel; of a box the best of its corners."""
    group = q.shape[1] // first.shape[1]
    q, first, second = q.double().unsqueeze(2), *(x.double().repeat_interleave(group, 1) for x in (first, second))
    if kind == "product":
        return (q * first).sum(-1)
    if kind == "spread":
        return (q * first + q.abs() * second).sum(-1)
    return torch.where(q > 0, q * first, q * second).sum(-1)


def run(q, first, second, kind, scale=1.0):
    arguments = (q, first, None if kind == "product" else second, kind == "box", scale)
    with poisoned():
        found = score(*arguments)
    assert found.dtype == torch.float32
    for reference in (bounded, bounds):
        assert error(reference(*arguments), found) <= ERROR[first.dtype]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [1, 15, 16, 17, 63, 64, 65, 300])
def test_units_of_every_count_around_a_tile(units, kind):
    q, first, second = tensors(1, 2, 4, units, 64, torch.bfloat16)
    assert error(run(q, first, second, kind), plain(q, first, second, kind)) < 1e-6  # nothing is rounded but the inputs


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("kind", KINDS)
def test_any_precision_and_any_strides(kind, dtype, strided):
    q, first, second = tensors(2, 2, 3, 65, 32, dtype, strided)
    assert error(run(q, first, second, kind, 0.3), 0.3 * plain(q, first, second, kind)) < 1e-6


@pytest.mark.parametrize("d", [1, 8, 20, 80, 128])
def test_any_number_of_channels(d):
    q, first, second = tensors(1, 2, 2, 70, d, torch.float16)
    for kind in KINDS:
        assert error(run(q, first, second, kind), plain(q, first, second, kind)) < 1e-6


@pytest.mark.parametrize("group", [1, 5, 16, 17, 70])
def test_any_number_of_query_heads_to_a_kv_head(group):
    q, first, second = tensors(1, 2, group, 17, 16, torch.float16)
    assert error(run(q, first, second, "box"), plain(q, first, second, "box")) < 1e-6


def test_a_query_of_another_type_is_rounded_to_the_units():
    q, first, second = tensors(1, 2, 2, 33, 16, torch.bfloat16)
    q = torch.randn(1, 4, 16, device=DEVICE)
    rounded = plain(q.bfloat16(), first, second, "spread")
    assert error(run(q, first, second, "spread"), rounded) < 1e-6
    assert error(rounded, plain(q, first, second, "spread")) > 1e-4


def test_no_key_of_a_page_scores_more_than_its_box():
    keys, q = torch.randn(1, 2, 20, 16, 32, device=DEVICE), torch.randn(1, 6, 32, device=DEVICE)
    bound = run(q, keys.amax(3), keys.amin(3), "box")
    true = products(q, keys.flatten(2, 3)).view(1, 6, 20, 16).amax(-1)
    assert (bound >= true - 1e-4).all()
    point = keys[:, :, :, :1].expand(-1, -1, -1, 2, -1)  # a page of one key twice: the bound is its score
    assert error(run(q, point.amax(3), point.amin(3), "box"), products(q, point[:, :, :, 0])) < 1e-5


def test_the_operator_says_what_it_gives_and_on_a_cpu_is_batched_products():
    q, first, second = tensors(1, 2, 2, 33, 16, torch.float32)
    torch.library.opcheck(bounds, (q, first))
    torch.library.opcheck(bounds, (q, first, second, True, 0.5))
    q, first, second = q.cpu(), first.cpu(), second.cpu()
    assert torch.equal(bounds(q, first, scale=0.3), products(q, first) * 0.3)
    assert torch.equal(bounds(q, first, second), products(q, first).add_(products(q.abs(), second)))
    corners = products(q.relu(), first).add_(products(-((-q).relu()), second))
    assert torch.equal(bounds(q, first, second, True), corners)
