import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.kernels.attention import Partial, attention
from kvlib.kernels.merge import merge, merge_segments
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
