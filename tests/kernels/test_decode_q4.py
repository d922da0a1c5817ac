import math

import pytest
import torch

from kvlib.kernels.decode_q4 import decode_q4, split_decode_q4
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import Stored, Tokens
from tests.kernels.poison import DEVICE, error, poisoned

FORMS = {
    "4 bits of channels, wide values": (Uniform(4, 128, per_channel=True), Uniform(4)),
    "4 bits of channels, halves": (Uniform(4, 64, per_channel=True), Uniform(4, 64)),
    "4 bits of channels, quarters": (Uniform(4, 32, per_channel=True), Uniform(4, 32)),
    "4 bits of a segment": (Uniform(4, 0, per_channel=True), Uniform(4)),
    "4 bits of tokens": (Uniform(4), Uniform(4)),
    "8 bits of tokens": (Uniform(8), Uniform(8)),
    "8 bits of channels": (Uniform(8, 64, per_channel=True), Uniform(8, 32)),
    "2 bits of channels": (Uniform(2, 32, per_channel=True), Uniform(2, 32)),
    "2 bits of tokens": (Uniform(2), Uniform(2)),
}


def coded(form, x):
    """Parts of x [B, H, T, d], and the values they stand for, float64."""
    batch, heads, m, _ = x.shape
    slots = torch.arange(m)
    parts = form.encode(Tokens(x, slots.view(1, 1, -1), None, {}, slots[:1]))
    stored = Stored(heads, parts, {}, slots, lambda span: torch.zeros(batch, 1, m, dtype=torch.long), lambda: slots, None)
    return parts["codes"].to(DEVICE), parts["range"].to(DEVICE), form.decode(stored).double()


def wider(x, garbage):
    """The same as a view of a larger buffer, garbage behind it."""
    room = torch.full((*x.shape[:2], x.shape[2] + 40, *x.shape[3:]), garbage, dtype=x.dtype, device=x.device)
    room[:, :, : x.shape[2]] = x
    return room


def plain(q, keys, values, scale, slots, softcap=0.0):
    group = q.shape[1] // keys.shape[1]
    q = q.double().cpu()
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            at = torch.as_tensor(slots[b][h // group], dtype=torch.long)
            if len(at):
                s = q[b, h] @ keys[b, h // group, at].T * scale
                s = softcap * torch.tanh(s / softcap) if softcap else s
                lse[b, h], out[b, h] = s.logsumexp(-1), torch.softmax(s, -1) @ values[b, h // group, at]
    return out, lse


def check(found, out, lse, tolerance):
    assert error(found[0], out) < tolerance and found[0].isfinite().all()
    dead = lse == -math.inf
    assert (found[1].cpu()[dead] == -math.inf).all() and (found[0].cpu()[dead] == 0).all()
    assert (found[1].cpu().double() - lse)[~dead].abs().max() < 2e-2


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("d", [64, 128])
def test_codes_of_every_layout_and_length(name, d):
    key, value = FORMS[name]
    group = 4 if d == 128 else 1
    q = torch.randn(2, 4 * group, 1, d, device=DEVICE).half().float()
    k, k_range, keys = coded(key, torch.randn(2, 4, 256, d) * torch.rand(d) * 4)
    v, v_range, values = coded(value, torch.randn(2, 4, 256, d) + 0.5)
    length = torch.tensor([[0, 1, 63, 64], [65, 127, 128, 256]], dtype=torch.int32, device=DEVICE)
    with poisoned():
        found = split_decode_q4(q, k, k_range, v, v_range, d**-0.5, span=key.group or 256, length=length)
    out, lse = plain(q, keys, values, d**-0.5, [[range(n) for n in row] for row in length.tolist()])
    check(found, out, lse, 2e-3)
    exact = decode_q4(q.cpu(), *(x.cpu() for x in (k, k_range, v, v_range)), d**-0.5, key.group or 256, length=length.cpu())
    assert error(exact[0], out) < 1e-5


def test_garbage_past_the_length_never_shows():
    key, value = FORMS["4 bits of channels, halves"]
    q = torch.randn(1, 8, 1, 64, device=DEVICE)
    k, k_range, _ = coded(key, torch.randn(1, 2, 128, 64))
    v, v_range, _ = coded(value, torch.randn(1, 2, 128, 64))
    length = torch.tensor([[70, 128]], dtype=torch.int32, device=DEVICE)
    before = split_decode_q4(q, k, k_range, v, v_range, 0.125, span=64, length=length)
    k, v = wider(k, 255), wider(v, 255)
    v_range = wider(v_range, math.nan)
    k[:, 0, 70:], v[:, 0, 70:], v_range[:, 0, 70:] = 255, 255, math.nan
    after = split_decode_q4(q, k, wider(k_range, math.nan), v, v_range, 0.125, span=64, length=length)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_channel_is_its_own(bits):
    """A value that only one channel has comes out there, and a key that only one channel has answers that channel."""
    d, form = 64, Uniform(bits)
    x = torch.eye(d)[None, None] * 3
    codes, found, _ = coded(form, x)
    q = 40 * torch.eye(d, device=DEVICE)[None].transpose(0, 1).reshape(1, d, 1, d)  # each query head asks for one channel
    out, _ = split_decode_q4(q, codes, found, codes, found, 1.0)
    assert (out[0, :, 0].argmax(-1).cpu() == torch.arange(d)).all()


def test_lists_rows_of_a_draft_and_a_softcap():
    for name in ("4 bits of tokens", "4 bits of channels, halves"):
        key, value = FORMS[name]
        q = torch.randn(1, 4, 3, 64, device=DEVICE)
        k, k_range, keys = coded(key, torch.randn(1, 2, 128, 64))
        v, v_range, values = coded(value, torch.randn(1, 2, 128, 64))
        ids = torch.randint(0, 128, (1, 2, 70), device=DEVICE)
        length = torch.tensor([50], dtype=torch.int32, device=DEVICE)
        found = split_decode_q4(q, k, k_range, v, v_range, 0.2, span=64, softcap=5.0, length=length, ids=ids)
        out, lse = plain(q, keys, values, 0.2, [[own[:50] for own in ids[0].tolist()]], softcap=5.0)
        check(found, out, lse, 2e-3)


def test_many_chunks():
    key, value = FORMS["4 bits of tokens"]
    q = torch.randn(1, 2, 1, 64, device=DEVICE)
    k, k_range, keys = coded(key, torch.randn(1, 1, 3000, 64))
    v, v_range, values = coded(value, torch.randn(1, 1, 3000, 64))
    found = split_decode_q4(q, k, k_range, v, v_range, 0.125)
    check(found, *plain(q, keys, values, 0.125, [[range(3000)]]), 2e-3)
