"""Dense attention of a prompt by a fused kernel that somebody else keeps: flash-attn where installed, else torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


@lru_cache
def _flash_attn() -> tuple[Any, str]:
    """The package's forward, None where there is none, and what serves prompts then, for reports."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        broken = f" (flash-attn cannot be loaded: {error})" if find_spec("flash_attn") is not None else ""
        return None, f"torch's fused attention{broken}"
    return flash_attn_func, f"flash-attn {version('flash-attn')}"


def describe() -> str:
    """Which kernel prompts go through on a GPU, for reports."""
    return _flash_attn()[1]


@lru_cache
def _modern(index: int) -> bool:
    """Whether fused kernels run on a GPU: from Ampere on."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def serves(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Whether there is a fused kernel for these: half precision on a GPU, heads of one size of at most 256."""
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] == v.shape[3] <= 256
    known = softcap is None or _flash_attn()[0] is not None
    return fits and q.shape[3] % 8 == 0 and known and _modern(q.device.index)


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, n, d], standing at the last n of the keys k [B, H, T, d], v [B, H, T, d]: out in q's dtype and
    the natural-log lse [B, Hq, n] fp32."""
    flash, _ = _flash_attn()
    if flash is None:
        return in_two(q, k, v, scale, causal, _torch_flash)
    turned = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, _ = flash(*turned, softmax_scale=scale, causal=causal, softcap=softcap or 0.0, return_attn_probs=True)
    return out.transpose(1, 2), lse


def in_two(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The same by a kernel that knows causality only for as many keys as queries: the older keys apart, then merged."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    older = k.shape[2] - q.shape[2]
    if not causal or older == 0:
        return kernel(q, k, v, scale, causal)
    out, lse = kernel(q, k[:, :, :older], v[:, :, :older], scale, False)
    own, own_lse = kernel(q, k[:, :, older:], v[:, :, older:], scale, True)
    total = torch.logaddexp(lse, own_lse)
    share = (lse - total).exp_().unsqueeze(-1)
    return torch.lerp(own.float(), out.float(), share), total


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse
