"""Plain float64 attention, written for reading."""

import torch


def reference(q, k, v, scale, visible=None, softcap=None):
    """out, lse and probabilities in float64; visible [B, Hq, n, T] bool, rows that see nothing give (0, -inf)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    s = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if visible is not None:
        s = s.masked_fill(~visible, float("-inf"))
    lse = s.logsumexp(-1)
    p = (s - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return p @ v, lse, p


def causal(n, keys):
    """[n, keys] visibility of rows that stand at the last n keys."""
    return torch.ones(n, keys, dtype=torch.bool).tril(keys - n)
