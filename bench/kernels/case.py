"""What is measured: a call at a shape, the bytes it must move, and how far its result is from the torch reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PAGE = 16  # tokens of a page, and of an average cluster
_SETS = 64  # of inputs, at most


@lru_cache
def _generator(device: torch.device) -> torch.Generator:
    """Not the default one, which a capture that fails leaves unusable."""
    return torch.Generator(device).manual_seed(0)


@dataclass(frozen=True)
class Shape:
    """A batch of sequences of `context` tokens in one layer, by default with Llama-3-8B's heads."""

    batch: int
    context: int
    device: torch.device
    cache: int = 0  # bytes of the device's last cache
    q_heads: int = 32
    heads: int = 8
    d: int = 128
    listed: int = 2048  # tokens that a selection reads
    rank: int = 160
    layers: int = 32
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        """Of the logits."""
        return float(self.d**-0.5)

    @property
    def dense(self) -> int:
        """Bytes of all keys and values: B H T 2 d b."""
        return self.read(self.context)

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return self.context // PAGE

    def read(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens of each head."""
        return self.batch * self.heads * tokens * 2 * self.d * self.dtype.itemsize

    def copies(self, nbytes: int) -> int:
        """How many sets of inputs, of which a call reads `nbytes`, leave nothing of the last round in the cache."""
        return max(1, min(_SETS, -(-2 * self.cache // max(1, nbytes))))

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, in the model's type unless another is asked for."""
        return torch.randn(size, generator=_generator(self.device), device=self.device, dtype=dtype or self.dtype)

    def uniform(self, *size: int) -> Tensor:
        """Random numbers from 0 to 1, fp32."""
        return torch.rand(size, generator=_generator(self.device), device=self.device)

    def below(self, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Random integers in 0..high - 1."""
        return torch.randint(high, size, generator=_generator(self.device), device=self.device, dtype=dtype)

    def chosen(self, high: int, count: int) -> Tensor:
        """For each list `count` different entries below `high`, spread and in no order: int64 [B, H, count]."""
        step = high // count
        spread = torch.arange(count, device=self.device) * step + self.below(step, self.batch, self.heads, count)
        return spread[..., self.uniform(count).argsort()]

    def query(self, n: int = 1) -> Tensor:
        """[B, Hq, n, d]."""
        return self.normal(self.batch, self.q_heads, n, self.d)

    def keys(self) -> Tensor:
        """[B, H, T, d]."""
        return self.normal(self.batch, self.heads, self.context, self.d)

    def lengths(self, tokens: int) -> Tensor:
        """That every list has so many tokens, int32 [B, H]."""
        return torch.full((self.batch, self.heads), tokens, dtype=torch.int32, device=self.device)

    def like(self, *xs: Tensor) -> tuple[Any, ...]:
        """The last sequence of each, which a reference is computed for."""
        return tuple(x[-1:] for x in xs)


@dataclass(frozen=True)
class Case:
    """One call to be checked and timed.

    make:  sets of the call's arguments, which it goes through in turn, so that it finds none of them in the cache.
    off:   how far a result, of the arguments given, is from the reference's; `bound` is what is allowed.
    moved: bytes that the call must move, over memory or over the host's `bus`.  held: bytes of its arguments.
    flops: what it must compute, where that may be what bounds it.
    peer:  it is somebody else's.  skip: why it is not measured at this shape.
    time:  microseconds and whether a graph was replayed, for what is timed in its own way; the arguments are the first set.
    """

    kernel: str
    variant: str
    make: Callable[[], Sequence[tuple[Any, ...]]]
    run: Callable[..., Any]
    off: Callable[[tuple[Any, ...], Any], float]
    bound: float
    moved: int
    held: int = 0
    flops: int = 0
    bus: bool = False
    peer: bool = False
    skip: str = ""
    time: Callable[..., tuple[float, bool]] | None = None


def error(found: Tensor, wanted: Tensor) -> float:
    """How far a tensor is from another, as a share of that one's norm; infinite where it has NaN."""
    found, wanted = found.double(), wanted.double()
    share = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return share if share == share else float("inf")


def pair_error(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    """The same of (out, lse) of the last sequence; log-sum-exps count by their largest difference."""
    out, lse = (x[-1:].double() for x in found)
    return max(error(out, wanted[0]), float((lse - wanted[1].double()).abs().nan_to_num(nan=float("inf")).max()))
