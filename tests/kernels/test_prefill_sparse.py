import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.attention import Partial, Visible, attention
from kvlib.kernels.merge import merge
from kvlib.kernels.prefill_sparse import gathered_prefill, prefill_sparse, serves, walk_lists
from tests.kernels.poison import DEVICE, ERROR, close, poisoned

HALF = [torch.float16, torch.bfloat16]


def plain(q, k, v, scale, block=64, softcap=0.0, blocks=None, count=None, columns=None, window=None, sink=0, start=None):
    """Float64, one query row at a time, each with the list of the keys that it reads."""
    batch, q_heads, n, _ = q.shape
    keys, group = k.shape[2], q_heads // k.shape[1]
    q, k, v = (x.double().cpu() for x in (q, k, v))
    out = torch.zeros(batch, q_heads, n, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, q_heads, n), -math.inf, dtype=torch.float64)
    for b in range(batch):
        first = 0 if start is None else int(start[b])
        for head in range(q_heads):
            for i in range(n):
                at, read = keys - n + i, []
                if blocks is not None:
                    own = head * blocks.shape[1] // q_heads
                    listed = blocks[b, own, i // block, : int(count[b, own, i // block])].tolist()
                    read += [t for e in listed for t in range(e * block, (e + 1) * block)]
                if columns is not None:
                    read += columns[b, head * columns.shape[1] // q_heads].tolist()
                if window is not None:
                    read += [t for t in range(keys) if t < first + sink or t > at - window]
                read = [t for t in read if first <= t <= at]
                if read:
                    s = k[b, head // group, read] @ q[b, head, i] * scale
                    s = softcap * torch.tanh(s / softcap) if softcap else s
                    out[b, head, i], lse[b, head, i] = torch.softmax(s, 0) @ v[b, head // group, read], s.logsumexp(0)
    return out, lse


def tensors(batch, heads, group, n, keys, d, dtype, dv=None):
    q, k = torch.randn(batch, heads * group, n, d), torch.randn(batch, heads, keys, d)
    return [x.to(DEVICE, dtype) for x in (q, k, torch.randn(batch, heads, keys, dv or d))]


def lists(batch, lists, n, keys, block, most=99):
    """For each block of query rows some of the blocks that it may see, in any order, and what follows them is garbage."""
    width = -(-keys // block)
    blocks = torch.full((batch, lists, -(-n // block), width), 2**24, dtype=torch.int32)
    count = torch.zeros(batch, lists, -(-n // block), dtype=torch.int32)
    for b in range(batch):
        for h in range(lists):
            for i in range(blocks.shape[2]):
                seen = (min(keys, keys - n + (i + 1) * block) - 1) // block + 1
                some = torch.randperm(seen)[: min(most, int(torch.randint(0, seen + 1, ())))]
                blocks[b, h, i, : len(some)], count[b, h, i] = some.int(), len(some)
    return {"blocks": blocks.to(DEVICE), "count": count.to(DEVICE)}


def run(*arguments, **options):
    with poisoned():
        found = walk_lists(*arguments, **options)
    for reference in (gathered_prefill, prefill_sparse):
        twin = reference(*arguments, **options)
        torch.testing.assert_close(twin[0], found[0], atol=0.05, rtol=0.02)
        torch.testing.assert_close(twin[1], found[1], atol=1e-2, rtol=1e-3)
    return found


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("n", "keys"), [(1, 1), (63, 64), (64, 64), (65, 130), (64, 100)])
def test_all_blocks_are_causal_attention(n, keys, dtype):
    q, k, v = tensors(1, 2, 2, n, keys, 32, dtype)
    blocks = torch.arange(-(-keys // 64), dtype=torch.int32, device=DEVICE).expand(1, 2, -(-n // 64), -1)
    count = torch.full(blocks.shape[:3], blocks.shape[3], dtype=torch.int32, device=DEVICE)
    found = run(q, k, v, 0.2, blocks=blocks, count=count)
    close(found, *plain(q, k, v, 0.2, blocks=blocks, count=count), dtype)
    whole = attention(q.float(), k.float(), v.float(), 0.2, Visible(causal=True))
    torch.testing.assert_close(found[0], whole.out, atol=0.05, rtol=ERROR[dtype])
    torch.testing.assert_close(found[1], whole.lse, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("own", "heads", "group"), [(2, 2, 1), (2, 2, 4), (5, 1, 5), (1, 2, 2)])
def test_lists_of_kv_heads_of_query_heads_and_of_the_layer(own, heads, group, block):
    q, k, v = tensors(2, heads, group, 130, 150, 16, torch.float16)
    options = lists(2, own, 130, 150, block)
    close(run(q, k, v, 0.3, block, **options), *plain(q, k, v, 0.3, block, **options), torch.float16)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (80, 96), (256, 256)])
def test_head_sizes(d, dv):
    q, k, v = tensors(1, 1, 2, 70, 90, d, torch.bfloat16, dv)
    options = lists(1, 2, 70, 90, 128)
    options["columns"] = torch.tensor([[[3, -1, 60]]], dtype=torch.int32, device=DEVICE)
    options["count"].zero_()
    options["count"][0, 0, 0], options["blocks"][0, 0, 0, 0] = 1, 0
    options["columns"] = options["columns"].expand(1, 2, -1).clone()
    options["columns"][0, 0] = -1
    close(run(q, k, v, d**-0.5, 128, **options), *plain(q, k, v, d**-0.5, 128, **options), torch.bfloat16)


@pytest.mark.parametrize("columns", [1, 63, 64, 65])
def test_columns_beside_blocks_under_a_softcap_and_padding(columns):
    q, k, v = tensors(2, 2, 2, 64, 192, 16, torch.float16)
    blocks = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE).expand(2, 2, 1, 2)
    count = torch.ones(2, 2, 1, dtype=torch.int32, device=DEVICE)
    at = torch.stack([torch.randperm(128)[:columns] for _ in range(4)]).view(2, 2, -1)
    at = torch.where(at >= 64, at + 64, at).int().to(DEVICE)  # in the blocks that are not read, the future included
    start = torch.tensor([0, 30], device=DEVICE)
    options = {"blocks": blocks, "count": count, "columns": at, "start": start}
    close(run(q, k, v, 0.5, 64, 2.0, **options), *plain(q, k, v, 0.5, 64, 2.0, **options), torch.float16)


@settings(max_examples=12)
@given(st.data())
def test_first_and_newest_keys_without_a_list(data):
    torch.manual_seed(0)
    n, older = data.draw(st.sampled_from([1, 5, 64, 100])), data.draw(st.sampled_from([0, 3, 90]))
    q, k, v = tensors(2, 1, 2, n, n + older, 16, torch.float16)
    window, sink = data.draw(st.integers(1, n + older + 5)), data.draw(st.integers(0, 70))
    start = st.lists(st.integers(0, n + older), min_size=2, max_size=2).map(lambda x: torch.tensor(x, device=DEVICE))
    options = {"window": window, "sink": sink, "start": data.draw(st.one_of(st.none(), start))}
    close(run(q, k, v, 0.5, 64, **options), *plain(q, k, v, 0.5, 64, **options), torch.float16)


def test_what_a_window_keeps_is_what_attention_keeps():
    q, k, v = tensors(2, 2, 2, 130, 150, 16, torch.float16)
    start = torch.tensor([0, 25], device=DEVICE)
    found = run(q, k, v, 0.3, 128, 3.0, window=20, sink=7, start=start)
    whole = attention(q.float(), k.float(), v.float(), 0.3, Visible(True, start, window=20, sink=7), 3.0)
    torch.testing.assert_close(found[0], whole.out, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(found[1], whole.lse, atol=5e-3, rtol=1e-3)


def test_rows_without_any_key_and_strides_of_any_kind():
    q, k, v = tensors(1, 2, 2, 66, 66, 16, torch.bfloat16)
    around = torch.full((34, 80, 2, 1), math.nan, dtype=torch.bfloat16, device=DEVICE).permute(3, 2, 1, 0)
    k = around[:, :, 5:71, 1:-1:2].copy_(k)
    options = lists(1, 2, 66, 66, 64)
    options["count"][:, 0] = 0
    out, lse = run(q.mT.contiguous().mT, k, v, 0.3, **options)
    assert (out[:, :2] == 0).all() and (lse[:, :2] == -math.inf).all()
    close((out, lse), *plain(q, k, v, 0.3, **options), torch.bfloat16)


def test_garbage_in_padding_never_shows_and_runs_repeat():
    q, k, v = tensors(1, 1, 2, 64, 90, 16, torch.float16)
    options = {"start": torch.tensor([31], device=DEVICE), "window": 20, "sink": 4}
    options |= {"columns": torch.tensor([[[2, 36, 40]]], dtype=torch.int32, device=DEVICE)}
    before = walk_lists(q, k, v, 0.3, **options)
    k[:, :, :31], v[:, :, :31] = math.nan, math.inf
    after = walk_lists(q, k, v, 0.3, **options)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@settings(max_examples=8)
@given(st.integers(0, 3), st.permutations(range(3)))
def test_a_list_cut_in_two_and_merged_equals_the_whole_in_any_order(cut, order):
    torch.manual_seed(0)
    q, k, v = tensors(1, 1, 2, 60, 190, 16, torch.float16)
    blocks = torch.tensor(order, dtype=torch.int32, device=DEVICE).view(1, 1, 1, 3)
    count = torch.tensor([[[3]]], dtype=torch.int32, device=DEVICE)
    whole = walk_lists(q, k, v, 0.3, blocks=torch.arange(3, device=DEVICE).int().view(1, 1, 1, 3), count=count)
    halves = [
        walk_lists(q, k, v, 0.3, blocks=blocks, count=count * 0 + cut),
        walk_lists(q, k, v, 0.3, blocks=blocks[..., cut:], count=count - cut),
    ]
    joined = merge([Partial(*half) for half in halves])
    torch.testing.assert_close(joined.out, whole[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(joined.lse, whole[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precisions_that_are_gathered(dtype):
    q, k, v = tensors(2, 2, 2, 70, 100, 16, dtype)
    options = {**lists(2, 4, 70, 100, 64), "start": torch.tensor([3, 40], device=DEVICE)}
    found = gathered_prefill(q, k, v, 0.3, softcap=4.0, **options)
    assert found[0].dtype == dtype and not serves(q, k, v)
    close(found, *plain(q, k, v, 0.3, softcap=4.0, **options), torch.float32)
