"""Lossless: sign and mantissa as they are, exponents entropy coded, for tokens that are rarely read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.offload.lossless import pack, unpack
from kvlib.policies.base import check_whole, register
from kvlib.policies.encoding import Codec, Form, Stored, Tokens


@dataclass(frozen=True)
class Pages(Form):
    """Pages of `page` tokens of all heads, as bytes: see `kvlib.offload.lossless`."""

    scope: ClassVar[str] = "group"
    exact: ClassVar[bool] = True
    paged: ClassVar[bool] = True
    cold: ClassVar[bool] = True

    page: int

    @property
    def spans(self) -> Mapping[str, int]:
        """Nothing of fixed size."""
        return {}

    @property
    def grain(self) -> int:
        """A page."""
        return self.page

    @property
    def read_granularity(self) -> int:  # type: ignore[override]
        """A page."""
        return self.page

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """Nothing of fixed size: see `to_bytes`."""
        return {}

    def to_bytes(self, x: Tensor) -> Tensor:
        """A page [H, page, d] as bytes."""
        return pack(x)

    def from_bytes(self, page: Tensor) -> Tensor:
        """The page [H, page, d], to the bit.  Raises ValueError where the bytes are damaged."""
        return unpack(page)

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """As it was."""
        return stored.parts["x"]

    def numbers(self, stored: Stored) -> torch.dtype:
        """The model's."""
        return stored.parts["x"].dtype

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """What 2.6 bits for an exponent make of it; the data decide."""
        return d * (itemsize - 1 + 2.6 / 8)


@register
@dataclass(frozen=True)
class Lossless(Codec):
    """Entropy-code the exponents of tokens that are rarely read; sign and mantissa stay as they are.

    After DFloat11 (arXiv 2504.11651), which does so to weights.  To the bit, infinities and NaN included.  For the host
    tier, where the whole body is read: pages are decoded on the CPU.
    page: tokens that are coded together.
    """

    name: ClassVar[str] = "lossless"
    paper: ClassVar[str] = "2504.11651"
    exact: ClassVar[bool] = True

    page: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "page", self.page, 1)

    def keys(self) -> Form:
        """Pages."""
        return Pages(self.page)

    def values(self) -> Form:
        """Pages."""
        return Pages(self.page)
