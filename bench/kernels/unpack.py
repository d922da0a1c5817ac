"""A prompt's keys and values of 4 bits as vectors again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from bench.kernels.case import Case, Shape, error
from bench.kernels.decode_q4 import codes
from kvlib.kernels.unpack import unpack_codes, unpacked

SPAN = 128  # tokens that share a range of keys


def cases(s: Shape) -> Iterator[Case]:
    """Keys by channel in spans of 128 tokens, values token by token."""
    tokens = s.batch * s.heads * s.context
    span = min(SPAN, s.context)
    for variant, own, ranges in ((f"keys, span {span}", span, 4 * s.d / span), ("values", 1, 4)):
        read = int(tokens * (s.d / 2 + ranges))
        moved = read + tokens * s.d * s.dtype.itemsize

        def make(own: int = own, moved: int = moved) -> list[tuple[Tensor, ...]]:
            return [codes(s, 4, span)[:2] if own > 1 else codes(s, 4, span)[2:] for _ in range(s.copies(moved))]

        def run(planes: Tensor, found: Tensor, own: int = own) -> Tensor:
            return unpack_codes(planes, found, 4, own, dtype=s.dtype)

        def off(given: tuple[Tensor, ...], found: Tensor, own: int = own) -> float:
            return error(found[-1:], unpacked(*s.like(*given), 4, own, dtype=s.dtype))

        yield Case("unpack", variant, make, run, off, 0.0, moved, held=read)
