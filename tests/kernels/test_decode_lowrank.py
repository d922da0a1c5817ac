import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.kernels.attention import Partial
from kvlib.kernels.decode import chunk_of
from kvlib.kernels.decode_lowrank import decode_lowrank, gathered_lowrank, serves, split_lowrank, turn
from kvlib.kernels.launch import jit, tl
from kvlib.kernels.merge import merge
from kvlib.kernels.rotary import Rotary
from tests.kernels.poison import DEVICE, close, poisoned

ROTARY = 10000.0


def frequencies(rot):
    return tuple((ROTARY ** (-torch.arange(0, rot, 2).double() / rot)).float().tolist())


def turned(x, position, freq, scaling, interleaved=False):
    """One vector [d] in float64, pair by pair; the angle is the fp32 product that models form."""
    half, x = len(freq), x.clone()
    for i, f in enumerate(freq):
        angle = float(torch.tensor(float(position), dtype=torch.float32) * torch.tensor(f))
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        low, high = float(x[a]), float(x[b])
        x[a] = (low * math.cos(angle) - high * math.sin(angle)) * scaling
        x[b] = (high * math.cos(angle) + low * math.sin(angle)) * scaling
    return x


def plain(q, u, basis, v, freq, scale, lists, scaling=1.0, softcap=0.0, interleaved=False):
    """Float64, one token at a time; lists[b][h] holds (slot of u, position, slot of v, exact key or None)."""
    batch, q_heads, n, _ = q.shape
    heads = basis.shape[1]
    q, u, basis, v = (x.double().cpu() for x in (q, u.expand(batch, heads, -1, -1), basis, v))
    out = torch.zeros(batch, q_heads, n, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, q_heads, n), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            tokens = lists[b][h]
            if not tokens:
                continue
            keys = [
                turned(u[b, h, s] @ basis[b, h], at, freq, scaling, interleaved) if x is None else x.double().cpu()
                for s, at, _, x in tokens
            ]
            values = v[b, h, [place for _, _, place, _ in tokens]]
            for head in range(h * q_heads // heads, (h + 1) * q_heads // heads):
                s = q[b, head] @ torch.stack(keys).T * scale
                s = softcap * torch.tanh(s / softcap) if softcap else s
                out[b, head], lse[b, head] = torch.softmax(s, -1) @ values, s.logsumexp(-1)
    return out, lse


def tensors(batch, heads, group, n, tokens, d, r, dtype, strided=False):
    q = torch.randn(batch, heads * group, n, d).to(DEVICE, dtype)
    u, basis = torch.randn(batch, 1, tokens, r) / r**0.5, torch.randn(batch, heads, r, d)
    u, basis, v = (x.to(DEVICE, dtype) for x in (u, basis, torch.randn(batch, heads, tokens, d)))
    if not strided:
        return q, u, basis, v
    return tuple(inside(x) for x in (q, u, basis, v))


def inside(x):
    """The same numbers in the middle of something larger that is full of NaN, every other one, in another order."""
    larger = x.new_full([2 * size + 3 for size in reversed(x.shape)], math.nan).permute(3, 2, 1, 0)
    view = larger[tuple(slice(2, 2 + 2 * size, 2) for size in x.shape)]
    return view.copy_(x)


def run(q, u, basis, v, freq, *rest, **options):
    freq = torch.tensor(freq, device=DEVICE)
    with poisoned():
        found = split_lowrank(q, u, basis, v, freq, *rest, **options)
    for reference in (gathered_lowrank, decode_lowrank):
        twin = reference(q, u, basis, v, freq, *rest, **options)
        torch.testing.assert_close(twin[0], found[0], atol=0.05, rtol=0.02)
        torch.testing.assert_close(twin[1], found[1], atol=2e-2, rtol=1e-3)
    return found


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranges_of_every_length_around_a_tile(dtype, strided):
    tensor = tensors(2, 4, 2, 1, 66, 32, 16, dtype, strided)
    length = torch.tensor([[0, 1, 63, 64], [65, 15, 17, 66]], dtype=torch.int32, device=DEVICE)
    found = run(*tensor, frequencies(32), 0.2, length=length)
    lists = [[[(t, t, t, None) for t in range(x)] for x in row] for row in length.tolist()]
    close(found, *plain(*tensor, frequencies(32), 0.2, lists), dtype)


@pytest.mark.parametrize(
    ("d", "r", "group", "n"), [(64, 160, 4, 1), (128, 160, 1, 1), (128, 16, 5, 4), (64, 33, 3, 2), (256, 8, 1, 1)]
)
def test_head_sizes_ranks_and_groups(d, r, group, n):
    tensor = tensors(1, 2, group, n, 40, d, r, torch.float16)
    found = run(*tensor, frequencies(d), d**-0.5)
    close(found, *plain(*tensor, frequencies(d), d**-0.5, [[[(t, t, t, None) for t in range(40)]] * 2]), torch.float16)


@pytest.mark.parametrize("shared", [False, True])
def test_tokens_from_anywhere_with_values_elsewhere_and_some_exact(shared):
    q, u, basis, v = tensors(2, 2, 4, 1, 90, 32, 16, torch.bfloat16)
    lists, m = 1 if shared else 2, 70
    ids = torch.stack([torch.randperm(90)[:m] for _ in range(2 * lists)]).view(2, lists, m).to(DEVICE)
    where = torch.stack([torch.randperm(90)[:m] for _ in range(4)]).view(2, 2, m).to(DEVICE)
    positions = torch.randint(0, 4000, (2, lists, 90), dtype=torch.int32, device=DEVICE)
    exact = torch.randn(2, 2, 5, 32, device=DEVICE).bfloat16()
    at = torch.randint(-30, 5, (2, 2, m), device=DEVICE).clamp(min=-1).int()
    length = torch.tensor([m, 31], dtype=torch.int32, device=DEVICE)
    options = {"positions": positions, "ids": ids, "where": where, "exact": exact, "at": at, "length": length}
    found = run(q, u, basis, v, frequencies(32), 0.2, 1.25, 5.0, **options)
    wanted = [[[] for _ in range(2)] for _ in range(2)]
    for b in range(2):
        for h in range(2):
            for t in range(int(length[b])):
                slot, row = int(ids[b, h % lists, t]), int(at[b, h, t])
                kept = exact[b, h, row] if row >= 0 else None
                wanted[b][h].append((slot, int(positions[b, h % lists, slot]), int(where[b, h, t]), kept))
    assert any(x[3] is not None for x in wanted[0][0])
    close(found, *plain(q, u, basis, v, frequencies(32), 0.2, wanted, 1.25, 5.0), torch.bfloat16)


def test_positions_far_out_and_after_padding():
    tensor = tensors(2, 1, 4, 1, 20, 64, 16, torch.float16)
    base = torch.tensor([-3, 131052], device=DEVICE)
    found = run(*tensor, frequencies(64), 0.125, base=base)
    lists = [[[(t, t + b, t, None) for t in range(20)]] for b in base.tolist()]
    close(found, *plain(*tensor, frequencies(64), 0.125, lists), torch.float16)


@jit
def _turns(x_at, cos_at, sin_at, n: tl.constexpr):
    i = tl.arange(0, n)
    cos, sin = turn(tl.load(x_at + i))
    tl.store(cos_at + i, cos)
    tl.store(sin_at + i, sin)


def test_angles_of_the_last_of_a_million_positions():
    x = torch.cat([torch.arange(2048) * 1023.0, torch.rand(1024) * 10, torch.rand(1024) * 2**21]).to(DEVICE)
    cos, sin = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    _turns[(1,)](x, cos, sin, n=4096)
    assert (cos.double() - x.double().cos()).abs().max() < 2e-6
    assert (sin.double() - x.double().sin()).abs().max() < 2e-6


def test_long_rows_are_split_and_merged_and_short_ones_beside_them_too():
    tensor = tensors(1, 3, 2, 1, 2100, 32, 16, torch.float16)
    assert chunk_of(2100) == 128
    ids = torch.arange(2100, device=DEVICE).expand(1, 1, -1)
    length = torch.tensor([[130, 0, 128]], dtype=torch.int32, device=DEVICE)
    found = run(*tensor, frequencies(32), 0.2, length=length, ids=ids)
    lists = [[[(t, t, t, None) for t in range(x)] for x in length[0].tolist()]]
    close(found, *plain(*tensor, frequencies(32), 0.2, lists), torch.float16)
    chosen = run(*tensor, frequencies(32), 0.2, length=length[:, :1].clamp(max=64), most=64)
    wanted = [[[(t, t, t, None) for t in range(64)]] * 3]
    close(chosen, *plain(*tensor, frequencies(32), 0.2, wanted), torch.float16)


def test_a_tile_whose_scores_are_hundreds_below_the_one_before():
    q, u, basis, v = tensors(1, 1, 4, 1, 2100, 32, 16, torch.float16)
    assert chunk_of(2100) == 128
    q, u, basis = torch.ones_like(q), torch.full_like(u, 1 / 16), torch.ones_like(basis)  # unturned: every key is ones
    u[:, :, 64:] *= -1
    length = torch.tensor([128], dtype=torch.int32, device=DEVICE)
    found = run(q, u, basis, v, [0.0] * 16, 16.0, length=length)
    lse = torch.full((1, 4, 1), 512 + math.log(64), dtype=torch.float64)
    close(found, v[:, :, :64].double().cpu().mean(2, keepdim=True).expand(-1, 4, -1, -1), lse, torch.float16)


def test_garbage_past_the_length_never_shows():
    q, u, basis, v = tensors(1, 2, 2, 1, 70, 32, 16, torch.float16)
    freq, length = torch.tensor(frequencies(32), device=DEVICE), torch.tensor([37], dtype=torch.int32, device=DEVICE)
    before = split_lowrank(q, u, basis, v, freq, 0.2, length=length)
    u[:, :, 37:], v[:, :, 37:] = math.nan, math.inf
    after = split_lowrank(q, u, basis, v, freq, 0.2, length=length)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@settings(max_examples=8)
@given(st.data())
def test_a_list_cut_in_two_and_merged_and_a_list_permuted(data):
    torch.manual_seed(0)
    q, u, basis, v = tensors(1, 1, 4, 1, 90, 32, 16, torch.float16)
    freq = torch.tensor(frequencies(32), device=DEVICE)
    ids = torch.tensor(data.draw(st.permutations(range(90))), device=DEVICE).view(1, 1, -1)
    cut = data.draw(st.integers(0, 90))
    whole = split_lowrank(q, u, basis, v, freq, 0.2)
    parts = [split_lowrank(q, u, basis, v, freq, 0.2, ids=x) for x in (ids[..., :cut], ids[..., cut:])]
    joined = merge([Partial(*part) for part in parts])
    assert joined.lse is not None
    torch.testing.assert_close(joined.out, whole[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(joined.lse, whole[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rot", "interleaved", "dtype"), [(32, True, torch.float16), (16, False, torch.float32)])
def test_embeddings_that_the_kernel_leaves_to_the_reference(rot, interleaved, dtype):
    tensor = tensors(1, 2, 2, 1, 20, 32, 16, dtype)
    assert not serves(tensor[0], rot, interleaved)
    found = run(*tensor, frequencies(rot), 0.2, 1.5, interleaved=interleaved)
    lists = [[[(t, t, t, None) for t in range(20)]] * 2]
    close(found, *plain(*tensor, frequencies(rot), 0.2, lists, 1.5, interleaved=interleaved), dtype)


@pytest.mark.parametrize(("rot", "interleaved"), [(32, False), (32, True), (16, False)])
def test_the_reference_turns_as_rotary_does_and_keeps_double_precision(rot, interleaved):
    q, u, basis, v = (x.cpu() for x in tensors(1, 2, 1, 1, 9, 32, 16, torch.float64))
    freq = frequencies(rot)
    found = gathered_lowrank(q, u, basis, v, torch.tensor(freq), 0.2, 1.5, interleaved=interleaved)
    k = Rotary(freq, 1.5, interleaved).turn(u @ basis, torch.arange(9)).double()
    p = torch.softmax(q @ k.mT * 0.2, -1)
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found[0], p @ v, atol=1e-5, rtol=1e-5)
    lists = [[[(t, t, t, None) for t in range(9)]] * 2]
    wanted = plain(q, u, basis, v, freq, 0.2, lists, 1.5, interleaved=interleaved)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-12, rtol=1e-12)
