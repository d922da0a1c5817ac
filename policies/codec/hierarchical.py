"""QuantSpec's planes: one 8-bit code as two 4-bit planes, of which a draft reads the upper one only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.kernels.codes import Codes, code_scores, code_sums
from kvlib.kernels.quantise import pack
from kvlib.kernels.unpack import unpack_codes
from kvlib.policies.base import RecipeError, check_whole, register
from kvlib.policies.codec.uniform import Uniform, span_of
from kvlib.policies.encoding import Codec, Form, Stored, Tokens


@dataclass(frozen=True)
class Planes(Uniform):
    """8-bit codes in two planes of nibbles, `read` of which are read.

    The code is the true 8-bit one, 16 upper + lower; the upper plane alone stands for 16 upper + 7.5, the middle of what it
    can mean.  In the host tier the lower plane is what moves.
    """

    read: int = 2

    @property
    def spans(self) -> Mapping[str, int]:
        """Planes per token, ranges per group."""
        lower = {"lower": 1} if self.read == 2 else {}
        return {"upper": 1, **lower, "range": super().spans["range"]}

    @property
    def moving(self) -> frozenset[str]:
        """The plane that drafts do without, if there is another."""
        return frozenset({"lower"}) if self.read == 2 else super().moving

    def check(self, name: str, d: int) -> None:
        """Also, planes of 4 bits must fill bytes."""
        super().check(name, d)
        if d % 2:
            raise RecipeError(name, None, None, f"an odd head size {d} does not fill its planes' bytes: use kv8")

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """Planes [R, H, m, d / 2] and ranges."""
        parts = self.quantise(self.prepared(tokens))
        codes = parts["codes"]
        planes = {"upper": pack(codes >> 4, 4), "lower": pack(codes & 15, 4), "range": parts["range"]}
        return {name: planes[name] for name in self.spans}

    def in_place(self, stored: Stored) -> Codes | None:
        """The upper plane; no kernel reads two at once."""
        return None if self.read == 2 or self._apart(stored) else self._planes(stored)[0]

    def _planes(self, stored: Stored) -> list[Codes]:
        """The planes that are read as codes of 4 bits, of which the sum of the values is the token's."""
        found = stored.parts["range"]
        scale, least = found.select(3, 0), found.select(3, 1)
        span = self._span(stored.parts["upper"].shape[2])
        if self.read == 1:
            return [Codes(stored.parts["upper"], torch.stack([16 * scale, least + 7.5 * scale], 3), 4, span)]
        upper, lower = torch.stack([16 * scale, least], 3), torch.stack([scale, torch.zeros_like(least)], 3)
        return [Codes(stored.parts["upper"], upper, 4, span), Codes(stored.parts["lower"], lower, 4, span)]

    def decodes(self, stored: Stored) -> bool:
        """Where no kernel reads the planes."""
        return self._apart(stored)

    def scores(self, q: Tensor, stored: Stored) -> Tensor:
        """Of each plane, added up."""
        found = None if self._apart(stored) else code_scores(q, self._planes(stored))
        return super().scores(q, stored) if found is None else found

    def weighted_sum(self, p: Tensor, stored: Stored) -> Tensor:
        """Of each plane, added up."""
        found = None if self._apart(stored) else code_sums(p, self._planes(stored))
        return super().weighted_sum(p, stored) if found is None else found

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tokens [B, H, m, d] in `dtype`, by as many planes as are read."""
        upper, found = stored.parts["upper"], self._ranges(stored)
        span = span_of(upper, found)
        codes, above = (stored.parts["lower"], upper) if self.read == 2 else (upper, None)
        if above is None:
            scale, least = found.float().unbind(3)
            found = torch.stack([16 * scale, least + 7.5 * scale], 3)
        x: Tensor = unpack_codes(codes, found, 4, span, above, dtype=dtype)
        return x

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """Half a byte per plane and channel, and 4 bytes per group."""
        return super().bytes_per_token(d, n) - (2 - self.read) * d / 2

    def draft(self) -> Form:
        """The upper plane."""
        return replace(self, read=1)


@register
@dataclass(frozen=True)
class Hierarchical(Codec):
    """Keep an 8-bit code as two 4-bit planes: drafts read one, verification both.

    QuantSpec, arXiv 2502.10424, for `generate_speculative`; otherwise an 8-bit cache.  Keys per channel, values per token.
    group:  tokens of a key channel that share a range, channels of a value that do (at most the head).
    recent: newest tokens that are dense.
    planes: kept and read, 1 or 2; a draft recipe says 1, and reads one plane of both.
    """

    name: ClassVar[str] = "hierarchical"
    paper: ClassVar[str] = "2502.10424"

    recent: int = 128
    group: int = 128
    planes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "group", self.group, 2)
        if self.planes not in (1, 2) or isinstance(self.planes, bool):
            raise RecipeError(self.name, "planes", self.planes, "give 1 or 2")

    def draft(self) -> Codec:
        """The upper plane."""
        return replace(self, planes=1)

    def keys(self) -> Form:
        """Per channel."""
        return Planes(8, self.group, per_channel=True, read=self.planes)

    def values(self) -> Form:
        """Per token."""
        return Planes(8, self.group, read=self.planes)
