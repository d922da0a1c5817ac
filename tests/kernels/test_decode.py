import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.decode import chunk_of, decode, gathered_decode, split_decode
from tests.kernels.poison import DEVICE, ERROR, close, error, poisoned


def plain(q, k, v, scale, slots, softcap=0.0, causal=False, weight=None, bias=None):
    """Float64, one list at a time; slots[b][l] lists tokens, weight likewise."""
    batch, q_heads, n, _ = q.shape
    lists = len(slots[0])
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    out = torch.zeros(batch, q_heads, n, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, q_heads, n), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for head in range(q_heads):
            own = head * lists // q_heads
            kv = head * k.shape[1] // q_heads
            at = torch.as_tensor(slots[b][own], dtype=torch.long)
            for i in range(n):
                seen = at[: max(0, len(at) - (n - 1 - i))] if causal else at
                s = k[b, kv, seen] @ q[b, head, i] * scale
                s = softcap * torch.tanh(s / softcap) if softcap else s
                if weight is not None:
                    s = s + weight[b][own][: len(seen)].double()
                total = s.logsumexp(0) if len(seen) else torch.tensor(-math.inf)
                if total > -math.inf:
                    out[b, head, i] = torch.softmax(s, 0) @ v[b, kv, seen]
                    lse[b, head, i] = total + (0 if bias is None else float(bias[b, own]))
    return out, lse


def tensors(batch, heads, group, n, tokens, d, dtype, dv=None, strided=False):
    q = torch.randn(batch, heads * group, n, d).to(dtype)
    if strided:  # token-major, with room between tokens, from an offset
        pool = torch.randn(batch, tokens + 3, heads, 2, d + 8).to(dtype)
        k, v = (pool[:, 3:, :, i, :d].transpose(1, 2) for i in (0, 1))
        q = torch.randn(heads * group, n, batch, d).to(dtype).permute(2, 0, 1, 3)
    else:
        k, v = torch.randn(batch, heads, tokens, d).to(dtype), torch.randn(batch, heads, tokens, dv or d).to(dtype)
    return q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)


def run(*arguments, **options):
    with poisoned():
        found = split_decode(*arguments, **options)
    for reference in (gathered_decode, decode):
        twin = reference(*arguments, **options)
        torch.testing.assert_close(twin[0], found[0], atol=0.05, rtol=0.02)
        torch.testing.assert_close(twin[1], found[1], atol=5e-3, rtol=1e-3)
    return found


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", ERROR)
def test_ranges_of_every_length_around_a_tile(dtype, strided):
    q, k, v = tensors(2, 4, 2, 1, 130, 64, dtype, strided=strided)
    length = torch.tensor([[0, 1, 63, 64], [65, 15, 17, 130]], dtype=torch.int32, device=DEVICE)
    found = run(q, k, v, 0.125, length=length)
    slots = [[range(x) for x in row] for row in length.tolist()]
    close(found, *plain(q, k, v, 0.125, slots), dtype)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128])
def test_without_lengths_all_is_read(tokens):
    q, k, v = tensors(1, 2, 3, 2, tokens, 32, torch.float16)
    close(run(q, k, v, 0.2), *plain(q, k, v, 0.2, [[range(tokens)] * 2]), torch.float16)


def test_long_rows_are_split_and_merged_and_short_ones_beside_them_too():
    q, k, v = tensors(2, 2, 2, 1, 3000, 16, torch.float16)
    assert chunk_of(3000) == 128
    length = torch.tensor([[3000, 0], [129, 128]], dtype=torch.int32, device=DEVICE)
    found = run(q, k, v, 0.25, length=length)
    close(found, *plain(q, k, v, 0.25, [[range(x) for x in row] for row in length.tolist()]), torch.float16)


@pytest.mark.parametrize(("d", "dv", "group"), [(80, 80, 7), (96, 64, 5), (128, 256, 1), (256, 128, 8), (16, 24, 4)])
def test_head_sizes_and_groups(d, dv, group):
    q, k, v = tensors(1, 2, group, 1, 40, d, torch.bfloat16, dv)
    found = run(q, k, v, d**-0.5, start=torch.tensor([3], device=DEVICE), length=torch.tensor([35], device=DEVICE))
    close(found, *plain(q, k, v, d**-0.5, [[range(3, 38)] * 2]), torch.bfloat16)


def test_query_rows_of_a_draft_see_one_token_more_each():
    q, k, v = tensors(2, 2, 5, 20, 70, 32, torch.float32)  # 100 rows per head: more than one program takes
    length = torch.tensor([[70, 19], [1, 0]], dtype=torch.int32, device=DEVICE)
    found = run(q, k, v, 0.2, softcap=3.0, causal=True, length=length)
    slots = [[range(x) for x in row] for row in length.tolist()]
    close(found, *plain(q, k, v, 0.2, slots, 3.0, causal=True), torch.float32)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("lists", [1, 2, 4])
def test_lists_of_the_layer_of_kv_heads_and_of_query_heads(lists, page):
    q, k, v = tensors(2, 2, 2, 1, 160, 64, torch.float16)
    ids = torch.randint(0, 160 // page, (2, lists, 96 // page), device=DEVICE)  # some twice
    weight = torch.randn(2, lists, 96 // page, device=DEVICE)
    weight[:, :, 1] = -math.inf
    length = torch.tensor([96, 50], dtype=torch.int32, device=DEVICE)
    found = run(q, k, v, 0.125, page=page, length=length, ids=ids, weight=weight)
    slots = [
        [[int(e) * page + j for e in own for j in range(page)][:n] for own in row]
        for row, n in zip(ids.tolist(), length.tolist(), strict=True)
    ]
    spread = weight.cpu().repeat_interleave(page, 2)
    close(found, *plain(q, k, v, 0.125, slots, weight=[list(row) for row in spread]), torch.float16)


def test_ragged_lists_with_a_bias_each():
    q, k, v = tensors(2, 2, 2, 1, 90, 32, torch.float32)
    counts = [0, 1, 70, 33]
    indptr = torch.tensor([0, 0, 1, 71, 104], device=DEVICE)
    ids = torch.randint(0, 90, (104,), device=DEVICE)
    bias = torch.randn(2, 2, device=DEVICE)
    length = torch.tensor(counts, dtype=torch.int32, device=DEVICE).view(2, 2)
    found = run(q, k, v, 0.2, ids=ids, indptr=indptr, length=length, bias=bias)
    flat = [ids[indptr[i] : indptr[i + 1]].cpu() for i in range(4)]
    close(found, *plain(q, k, v, 0.2, [flat[:2], flat[2:]], bias=bias), torch.float32)


def test_a_row_whose_every_weight_is_minus_infinity_sees_nothing():
    q, k, v = tensors(1, 2, 2, 1, 20, 16, torch.float16)
    ids = torch.arange(20, device=DEVICE).expand(1, 2, -1)
    weight = torch.zeros(1, 2, 20, device=DEVICE)
    weight[:, 1] = -math.inf
    out, lse = run(q, k, v, 0.2, ids=ids, weight=weight)
    assert (lse[:, 2:] == -math.inf).all() and (out[:, 2:] == 0).all() and lse[:, :2].isfinite().all()


def test_nothing_to_read():
    q, k, v = tensors(1, 2, 2, 1, 20, 16, torch.float16)
    with poisoned():
        out, lse = split_decode(q, k[:, :, :0], v[:, :, :0], 0.2)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_garbage_past_the_length_never_shows():
    q, k, v = tensors(1, 2, 2, 1, 100, 32, torch.float16)
    length = torch.tensor([[37, 80]], dtype=torch.int32, device=DEVICE)
    before = split_decode(q, k, v, 0.2, length=length)
    k[:, 0, 37:], v[:, 0, 37:], k[:, 1, 80:], v[:, 1, 80:] = math.nan, math.inf, math.inf, math.nan
    after = split_decode(q, k, v, 0.2, length=length)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@settings(max_examples=8)
@given(st.data())
def test_a_list_cut_in_two_and_merged_a_list_permuted_and_a_weight_of_ln_2(data):
    torch.manual_seed(0)
    q, k, v = tensors(1, 1, 4, 1, 64, 32, torch.float32)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 63), min_size=2, max_size=40)), device=DEVICE)
    cut = data.draw(st.integers(1, len(ids) - 1))
    out, _ = split_decode(q, k, v, 0.2, ids=ids.view(1, 1, -1))
    halves = [split_decode(q, k, v, 0.2, ids=x.view(1, 1, -1)) for x in (ids[:cut], ids[cut:])]
    share = torch.stack([part[1] for part in halves]).softmax(0)
    joined = sum(w.unsqueeze(-1) * part[0] for w, part in zip(share, halves, strict=True))
    torch.testing.assert_close(joined, out, atol=2e-6, rtol=1e-5)
    turned = split_decode(q, k, v, 0.2, ids=ids[torch.randperm(len(ids), device=DEVICE)].view(1, 1, -1))
    torch.testing.assert_close(turned[0], out, atol=2e-6, rtol=1e-5)
    twice = split_decode(q, k, v, 0.2, ids=torch.cat([ids, ids]).view(1, 1, -1))
    heavy = split_decode(
        q, k, v, 0.2, ids=ids.view(1, 1, -1), weight=torch.full((1, 1, len(ids)), math.log(2), device=DEVICE)
    )
    torch.testing.assert_close(heavy[0], twice[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(heavy[1], twice[1])


def test_a_row_does_not_know_its_neighbours():
    q, k, v = tensors(3, 2, 2, 1, 500, 32, torch.float16)
    length = torch.tensor([500, 7, 130], dtype=torch.int32, device=DEVICE)
    together = split_decode(q, k, v, 0.2, length=length)
    for r in range(3):
        alone = split_decode(q[r : r + 1], k[r : r + 1], v[r : r + 1], 0.2, length=length[r : r + 1])
        assert torch.equal(alone[0][0], together[0][r]) and torch.equal(alone[1][0], together[1][r])


def test_the_operator_is_sound():
    q, k, v = tensors(1, 2, 2, 1, 20, 16, torch.float32)
    length = torch.tensor([[3, 20]], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(decode, (q, k, v, 0.2), {"length": length})
    assert error(decode(q, k, v, 0.2)[0], gathered_decode(q, k, v, 0.2)[0]) < 1e-6


def test_compilers_see_one_node():
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module

    @torch.compile(fullgraph=True, backend=keep)
    def doubled(q, k, v):
        return decode(q, k, v, 0.2)[0] * 2

    q, k, v = tensors(1, 2, 2, 1, 20, 16, torch.float32)
    torch.testing.assert_close(doubled(q, k, v), 2 * gathered_decode(q, k, v, 0.2)[0], atol=1e-5, rtol=1e-5)
    assert [node.target for node in graphs[0].nodes].count(decode) == 1
