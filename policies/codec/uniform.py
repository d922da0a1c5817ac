"""Uniform codes with a scale and a least value per group: what kv4, KIVI, rotated codes and GEAR's backbone share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.kernels.hadamard import rotate, rotate_back
from kvlib.kernels.quantise import decode, encode, folded, pack, ranges, unpack
from kvlib.policies.base import RecipeError
from kvlib.policies.encoding import SEGMENT, Form, Stored, Tokens


@dataclass(frozen=True)
class Uniform(Form):
    """Codes of `bits` bits, and per group a scale and a least value in fp16.

    group:  elements that share them: channels of one token (0, or more than there are: all), or with `per_channel` tokens
        of one channel (0: all tokens encoded together).
    rotated: whether vectors go through a random Hadamard rotation first, which spreads channels that stand out.
    smooth: exponent of the key channels' largest values, by which they are divided and queries multiplied; 0: none.
    """

    bits: int
    group: int = 0
    per_channel: bool = False
    rotated: bool = False
    smooth: float = 0.0

    @property
    def spans(self) -> Mapping[str, int]:
        """Codes per token, ranges per group."""
        return {"codes": 1, "range": (self.group or SEGMENT) if self.per_channel else 1}

    def check(self, name: str, d: int) -> None:
        """Codes must fill bytes, groups the head."""
        whole = 8 if self.bits == 3 else 8 // self.bits
        if d % whole:
            raise RecipeError(name, "bits", self.bits, f"head size {d} is no multiple of {whole}: give bits=8")
        if not self.per_channel and d % self._channels(d):
            raise RecipeError(name, "group", self.group, f"it must divide the head size {d}")
        if self.rotated and d % 2:
            raise RecipeError(name, None, None, f"an odd head size {d} cannot be rotated: use kv4")

    @property
    def fitted(self) -> bool:
        """Where there are smoothing factors."""
        return self.smooth > 0

    def fit(self, tokens: Tokens) -> dict[str, Tensor]:
        """The smoothing factors, from the row's first tokens."""
        if not self.smooth:
            return {}
        largest = tokens.x.float().abs().amax(2, keepdim=True)
        factor = torch.where(largest > 0, largest, 1.0).pow(self.smooth)
        return {"smooth": factor.clamp(2**-14, 65504.0).half()}  # what fp16 can hold and divide by

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """Codes [R, H, m, d * bits / 8] and ranges [R, H, ., 2, groups or d]."""
        return self.quantise(self.prepared(tokens))

    def prepared(self, tokens: Tokens) -> Tensor:
        """The tokens as they are quantised, fp32."""
        x = tokens.x.float()
        if self.smooth:
            x = x / tokens.fixed["smooth"].float()
        return rotate(x) if self.rotated else x

    def quantise(self, x: Tensor) -> dict[str, Tensor]:
        """Codes and ranges of x [R, H, m, d] fp32."""
        grouped, dim = self._grouped(x)
        scale, least = ranges(grouped, self.bits, dim)
        codes = encode(grouped, self.bits, scale, least).view(x.shape)
        return {"codes": pack(codes, self.bits), "range": torch.stack([scale, least], 3).squeeze(dim + 1)}

    def _grouped(self, x: Tensor) -> tuple[Tensor, int]:
        """x [R, H, m, d] with an axis for the members of each group, and which axis that is."""
        if self.per_channel:
            return folded(x, 2, self.group or x.shape[2]), 3
        return folded(x, 3, self._channels(x.shape[3])), 4

    def _channels(self, d: int) -> int:
        """Channels that share a range, where tokens do not."""
        return min(self.group or d, d)

    def prologue(self, q: Tensor, stored: Stored) -> Tensor:
        """Smoothed and rotated as the keys are."""
        if self.smooth:
            smooth = stored.fixed["smooth"].float()
            q = q * smooth.repeat_interleave(q.shape[1] // smooth.shape[1], 1)
        return rotate(q) if self.rotated else q

    def epilogue(self, out: Tensor, stored: Stored) -> Tensor:
        """Rotated back."""
        return rotate_back(out) if self.rotated else out

    def decode(self, stored: Stored) -> Tensor:
        """The tokens [B, H, m, d] fp32."""
        codes = unpack(stored.parts["codes"], self.bits)
        return self._levels(codes, self._ranges(stored))

    def _ranges(self, stored: Stored) -> Tensor:
        """Ranges [B, H, m / span, 2, .] of the tokens."""
        whole = self.per_channel and not self.group
        return stored.of_segment("range", SEGMENT) if whole else stored.parts["range"]

    def _levels(self, codes: Tensor, found: Tensor) -> Tensor:
        """The values of codes [B, H, m, d] in groups of ranges [B, H, m / span, 2, .]."""
        axis = 3 if self.per_channel else 4
        members = folded(codes, axis - 1, codes.shape[axis - 1] // found.shape[2 if self.per_channel else 4])
        scale, least = (found.select(3, i).unsqueeze(axis) for i in (0, 1))
        return decode(members, scale, least).view(codes.shape)

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """Codes, and 4 bytes per group."""
        codes = d * self.bits / 8
        if not self.per_channel:
            return codes + 4 * (d / self._channels(d))
        span = self.group or n
        return codes + (4 * d / span if span else 0.0)
