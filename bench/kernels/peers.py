"""Others' kernels for the same work: torch's, flash-attn's and FlashInfer's, each in the layout it likes best."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.case import PAGE, Case, Shape, error
from kvlib.kernels.decode import gathered_decode
from kvlib.kernels.prefill_sparse import gathered_prefill

_FLEX_BATCH = 8


def decoders(s: Shape) -> Iterator[Case]:
    """Decode attention over whole sequences."""
    once = f"it is compiled anew for each shape: batch {_FLEX_BATCH} only" if s.batch != _FLEX_BATCH else ""

    def case(name: str, peer: Any, skip: str = "") -> Case:
        def off(given: tuple[Any, ...], found: Tensor) -> float:
            q, k, v = peer.last(*given)
            return error(found[-1:].reshape(1, s.q_heads, 1, s.d), gathered_decode(q, k, v, s.scale)[0])

        return Case("decode", name, peer.make, peer.run, off, 2e-2, s.dense, held=s.dense, peer=True, skip=skip)

    yield case("torch sdpa", _Sdpa(s))
    yield case("flex_attention", _Flex(s), once)
    yield case("flash-attn", _FlashAttn(s))
    yield case("FlashInfer", _FlashInfer(s))


def prefill(s: Shape, flops: int, moved: int, skip: str) -> Case:
    """Causal attention of whole prompts, in torch."""

    def make() -> list[tuple[Tensor, ...]]:
        return [(s.query(s.context), s.keys(), s.keys())]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s.scale, enable_gqa=True)

    def off(given: tuple[Tensor, ...], found: Tensor) -> float:
        q, k, v = (x[-1:] for x in given)
        rows = min(PAGE, s.context)
        wanted = gathered_prefill(q[:, :, -rows:], k, v, s.scale, window=s.context)
        return error(found[-1:, :, -rows:], wanted[0])

    return Case("prefill_sparse", "torch sdpa", make, run, off, 2e-2, moved, 2 * s.dense, flops, peer=True, skip=skip)


class _Sdpa:
    """torch.nn.functional.scaled_dot_product_attention."""

    def __init__(self, s: Shape):
        self.s = s

    def make(self) -> list[tuple[Any, ...]]:
        s = self.s
        return [(s.query(), s.keys(), s.keys()) for _ in range(s.copies(s.dense))]

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.s.scale, enable_gqa=True)

    def last(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return q[-1:], k[-1:], v[-1:]


class _Flex(_Sdpa):
    """torch's flex_attention, compiled."""

    def make(self) -> list[tuple[Any, ...]]:
        _on_gpu(self.s)
        return super().make()

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = _compiled_flex()(q, k, v, scale=self.s.scale, enable_gqa=True)
        return found


@lru_cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class _FlashAttn(_Sdpa):
    """flash_attn_with_kvcache; tokens before heads."""

    def make(self) -> list[tuple[Any, ...]]:
        import flash_attn  # noqa: F401  (says here whether it is installed)

        s = self.s
        _on_gpu(s)
        held = torch.full((s.batch,), s.context, dtype=torch.int32, device=s.device)
        sets = []
        for _ in range(s.copies(s.dense)):
            k, v = (s.normal(s.batch, s.context, s.heads, s.d) for _ in range(2))
            sets.append((s.normal(s.batch, 1, s.q_heads, s.d), k, v, held))
        return sets

    def run(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:  # type: ignore[override]
        from flash_attn import flash_attn_with_kvcache

        found: Tensor = flash_attn_with_kvcache(q, k, v, cache_seqlens=held, softmax_scale=self.s.scale)
        return found

    def last(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(x[-1:].transpose(1, 2) for x in (q, k, v))


class _FlashInfer(_Sdpa):
    """BatchDecodeWithPagedKVCacheWrapper, planned once; heads before tokens in pages of 16."""

    def make(self) -> list[tuple[Any, ...]]:
        import flashinfer

        s = self.s
        _on_gpu(s)
        room = torch.empty(256 << 20, dtype=torch.uint8, device=s.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=True)
        first = torch.arange(s.batch + 1, dtype=torch.int32, device=s.device) * s.pages
        pages = torch.arange(s.batch * s.pages, dtype=torch.int32, device=s.device)
        full = torch.full((s.batch,), PAGE, dtype=torch.int32, device=s.device)
        sizes = (s.q_heads, s.heads, s.d, PAGE)
        wrapper.plan(first, pages, full, *sizes, data_type=s.dtype, q_data_type=s.dtype, sm_scale=s.scale)
        sets = []
        for _ in range(s.copies(s.dense)):
            k, v = (s.normal(s.batch * s.pages, s.heads, PAGE, s.d) for _ in range(2))
            sets.append((s.normal(s.batch, s.q_heads, s.d), k, v, wrapper))
        return sets

    def run(self, q: Tensor, k: Tensor, v: Tensor, wrapper: Any) -> Tensor:  # type: ignore[override]
        found: Tensor = wrapper.run(q, (k, v))
        return found

    def last(self, q: Tensor, k: Tensor, v: Tensor, wrapper: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        whole = (x[-self.s.pages :].transpose(0, 1).flatten(1, 2)[None] for x in (k, v))
        return q[-1:].unsqueeze(2), *whole


def _on_gpu(s: Shape) -> None:
    if s.device.type != "cuda":
        raise RuntimeError("it runs on a GPU only")
