"""Decode attention over codes of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import Case, Shape, pair_error
from kvlib.kernels.decode import gathered_decode
from kvlib.kernels.decode_q4 import decode_q4
from kvlib.kernels.quantise import decode as levels
from kvlib.kernels.quantise import folded, unpack

SPAN = 128  # tokens that share a range of keys


def coded(s: Shape, bits: int, span: int) -> int:
    """Bytes of all codes and ranges, one range per value: B H T (2 d bits / 8 + 4 d / span + 4), or 4 per key at span 1."""
    per_key = 4 if span == 1 else 4 * s.d / span
    return int(s.batch * s.heads * s.context * (2 * s.d * bits / 8 + per_key + 4))


def codes(s: Shape, bits: int, span: int) -> tuple[Tensor, ...]:
    """Random codes and ranges of keys, then of values, that stand for numbers of about one's size."""

    def side(*ranges: int) -> tuple[Tensor, Tensor]:
        planes = s.below(256, s.batch, s.heads, s.context, s.d * bits // 8, dtype=torch.uint8)
        scale = (0.5 + s.uniform(s.batch, s.heads, *ranges)) * 3.5 / (2**bits - 1)
        return planes, torch.stack([scale, scale * -(2**bits - 1) / 2], 3).half()

    return *side(*((s.context, 1) if span == 1 else (s.context // span, s.d))), *side(s.context, 1)


def rebuilt(planes: Tensor, ranges: Tensor, bits: int, span: int) -> Tensor:
    """The numbers that codes and ranges stand for, fp32."""
    plain = folded(unpack(planes, bits), 2, span)
    found: Tensor = levels(plain, ranges[:, :, :, :1], ranges[:, :, :, 1:]).flatten(2, 3)
    return found


def cases(s: Shape) -> Iterator[Case]:
    """Keys by channel in spans of 128 tokens and by token, at 4 bits; by token at 8."""
    for bits, span in ((4, min(SPAN, s.context)), (4, 1), (8, 1)):
        moved = coded(s, bits, span)

        def make(bits: int = bits, span: int = span, moved: int = moved) -> list[tuple[Any, ...]]:
            return [(s.query(), *codes(s, bits, span), s.lengths(s.context)) for _ in range(s.copies(moved))]

        def run(q: Tensor, k: Tensor, kr: Tensor, v: Tensor, vr: Tensor, length: Tensor, span: int = span) -> Any:
            return decode_q4(q, k, kr, v, vr, s.scale, span=span, length=length)

        def off(given: tuple[Any, ...], found: Any, span: int = span, bits: int = bits) -> float:
            q, k, kr, v, vr, _ = s.like(*given)
            wide = rebuilt(k, kr, bits, span), rebuilt(v, vr, bits, 1)
            return pair_error(found, gathered_decode(q.float(), *wide, s.scale))

        keys = "token" if span == 1 else f"{span} tokens of a channel"
        yield Case("decode_q4", f"{bits} bits, range per {keys}", make, run, off, 1e-2, moved)
