import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.attention import Partial, attention
from kvlib.kernels.merge import launched, merge, merge_parts, merge_segments, weighted
from tests.kernels.poison import DEVICE, close, poisoned
from tests.reference import reference


def part(q, k, v, index):
    return attention(q, k[:, :, index], v[:, :, index], 0.4)


def empty(q, dv):
    return Partial(torch.zeros(*q.shape[:3], dv), torch.full(q.shape[:3], float("-inf")))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.randoms())
def test_any_partition_in_any_order_is_the_whole(owners, random):
    torch.manual_seed(len(owners))
    keys = len(owners)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)
    parts = [part(q, k, v, [i for i, o in enumerate(owners) if o == p]) for p in range(4) if p in owners]
    parts.append(empty(q, 8))
    random.shuffle(parts)
    merged = merge(parts)
    out, lse, _ = reference(q, k, v, 0.4)
    torch.testing.assert_close(merged.out.double(), out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(merged.lse.double(), lse, atol=1e-5, rtol=1e-6)


def test_a_part_with_itself_keeps_its_output_and_gains_ln_2():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    one = attention(q, k, v, 0.4)
    twice = merge([one, one])
    torch.testing.assert_close(twice.out, one.out)
    torch.testing.assert_close(twice.lse, one.lse + math.log(2))


def test_huge_gaps_and_nothing_at_all():
    q = torch.zeros(1, 1, 1, 2)
    low = Partial(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), -100.0))
    high = Partial(torch.full((1, 1, 1, 2), 7.0), torch.full((1, 1, 1), 100.0))
    merged = merge([low, high])
    assert torch.equal(merged.out, high.out)
    assert merged.lse.item() == 100.0
    nothing = merge([empty(q, 2), empty(q, 2)])
    assert torch.equal(nothing.out, torch.zeros(1, 1, 1, 2))
    assert nothing.lse.item() == float("-inf")


def test_model_sinks_take_mass_and_carry_no_value():
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    sinks = torch.randn(4)
    merged = merge([part(q, k, v, [0, 1]), part(q, k, v, [2, 3, 4])], sinks)
    s = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.4
    p = torch.cat([s, sinks.double().view(1, 4, 1, 1).expand(2, 4, 3, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(merged.out.double(), p @ v.double().repeat_interleave(2, 1), atol=1e-6, rtol=1e-5)


def test_parts_without_lse_are_refused():
    q, k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    bare = attention(q, k, v, 0.4, lse=False)
    assert merge([bare]) is bare
    with pytest.raises(ValueError, match="log-sum-exp"):
        merge([bare, bare])


def test_segments_with_many_one_and_no_pieces():
    out, lse = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3)
    lse[3] = float("-inf")
    merged = merge_segments(out, lse, torch.tensor([0, 0, 2, 2]), 4)
    pair = merge([Partial(out[0][None], lse[0][None]), Partial(out[1][None], lse[1][None])])
    torch.testing.assert_close(merged.out[0], pair.out[0])
    torch.testing.assert_close(merged.lse[0], pair.lse[0])
    torch.testing.assert_close(merged.out[2], out[2])
    for nothing in (1, 3):
        assert torch.equal(merged.out[nothing], torch.zeros(2, 3, 5))
        assert (merged.lse[nothing] == float("-inf")).all()


# -------------------------------------------------------------------------------------------------------------- kernel
def plain(outs, lses, sinks=None):
    """Float64; an output whose lse is -inf is left out."""
    lse = torch.stack([x.double().cpu() for x in lses])
    out = torch.stack([x.double().cpu() for x in outs])
    out[lse == -math.inf] = 0
    every = lse if sinks is None else torch.cat([lse, sinks.double().cpu().view(1, 1, -1, 1).expand_as(lse[:1])])
    total = every.logsumexp(0)
    share = (lse - total.masked_fill(total == -math.inf, 0)).exp()
    return (out * share.unsqueeze(-1)).sum(0), total


def parts(count, *shape, dead=0.0):
    """Outputs and lses of `shape` [B, Hq, n, dv], of which a share is `dead`, its outputs NaN."""
    outs = [torch.randn(shape, device=DEVICE) for _ in range(count)]
    lses = [3 * torch.randn(shape[:3], device=DEVICE) for _ in range(count)]
    for out, lse in zip(outs, lses, strict=True):
        gone = torch.rand(shape[:3], device=DEVICE) < dead
        lse[gone] = -math.inf
        out[gone] = math.nan
    return outs, lses


def run(outs, lses, sinks=None):
    """The kernel's result, after comparing it and torch's with float64."""
    with poisoned():
        found = launched(outs, lses, sinks)
    for result in (found, weighted(outs, lses, sinks)):
        close(result, *plain(outs, lses, sinks), torch.float32)
        assert [x.dtype for x in result] == [torch.float32] * 2
    return found


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 17])
def test_any_number_of_parts_with_nothing_in_some(count, sunk):
    run(*parts(count, 2, 3, 2, 24, dead=0.4), torch.randn(3, device=DEVICE) if sunk else None)


@pytest.mark.parametrize(
    ("batch", "heads", "n", "dv"), [(1, 1, 1, 1), (1, 3, 1, 80), (2, 5, 3, 128), (1, 2, 33, 256), (0, 2, 1, 8)]
)
def test_rows_and_heads_of_any_size(batch, heads, n, dv):
    run(*parts(2, batch, heads, n, dv, dead=0.2))


def test_strided_parts_alike_and_not():
    outs, lses = parts(3, 2, 4, 5, 32)
    whole = run(outs, lses)
    for i in range(5):  # a query row of each
        one = run([x[:, :, i : i + 1] for x in outs], [x[:, :, i : i + 1] for x in lses])
        assert torch.equal(one[0], whole[0][:, :, i : i + 1]) and torch.equal(one[1], whole[1][:, :, i : i + 1])
    turned = outs[0].transpose(1, 2).contiguous().transpose(1, 2), lses[0].mT.contiguous().mT
    across = outs[1].mT.contiguous().mT
    for mixed in ([turned[0], *outs[1:]], [turned[0]] * 3, [across] * 3):
        found = launched(mixed, [turned[1], *lses[1:]])
        assert torch.equal(found[0], launched([x.contiguous() for x in mixed], lses)[0])


def test_nothing_but_empty_parts_and_huge_gaps():
    outs, lses = parts(3, 1, 2, 1, 16, dead=1.0)
    out, lse = run(outs, lses)
    assert (out == 0).all() and (lse == -math.inf).all()
    sinks = torch.tensor([2.0, -1.5], device=DEVICE)
    out, lse = run(outs, lses, sinks)
    assert (out == 0).all()
    torch.testing.assert_close(lse.flatten(), sinks)
    outs, lses = parts(2, 1, 2, 1, 16)
    out, lse = run(outs, [torch.full_like(lses[0], -300.0), torch.full_like(lses[0], 300.0)])
    assert torch.equal(out, outs[1]) and (lse == 300).all()


def test_sinks_of_a_model_in_half_precision():
    outs, lses = parts(2, 1, 4, 1, 16)
    sinks = torch.randn(4, device=DEVICE).bfloat16()
    found = launched(outs, lses, sinks)
    torch.testing.assert_close(found, launched(outs, lses, sinks.float()))
    torch.testing.assert_close(found, weighted(outs, lses, sinks), atol=1e-6, rtol=1e-5)


@settings(max_examples=15)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 999))
def test_merging_in_two_steps_or_another_order_changes_nothing(count, cut, seed):
    torch.manual_seed(seed)
    outs, lses = parts(count, 1, 2, 1, 16, dead=0.3)
    whole = launched(outs, lses)
    cut = min(cut, count - 1)
    first, last = launched(outs[:cut], lses[:cut]), launched(outs[cut:], lses[cut:])
    for found in (launched([first[0], last[0]], [first[1], last[1]]), launched(outs[::-1], lses[::-1])):
        torch.testing.assert_close(found, whole, atol=2e-6, rtol=1e-5)


def test_the_operator_is_sound():
    outs, lses = parts(3, 2, 2, 1, 16)
    torch.library.opcheck(merge_parts, (outs, lses))
    torch.library.opcheck(merge_parts, (outs, lses, torch.randn(2, device=DEVICE)))
