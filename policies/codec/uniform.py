"""Uniform codes with a scale and a least value per group: what kv4, KIVI, rotated codes and GEAR's backbone share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.kernels.codes import Codes, code_scores, code_sums
from kvlib.kernels.hadamard import rotate, rotate_back
from kvlib.kernels.pack import pack_codes
from kvlib.kernels.unpack import unpack_codes
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
        """The tokens as they are quantised, in fp32 or as they came."""
        x = tokens.x
        if self.smooth:
            x = x.float() / tokens.fixed["smooth"].float()
        return rotate(x) if self.rotated else x

    def quantise(self, x: Tensor) -> dict[str, Tensor]:
        """Codes and ranges of x [R, H, m, d] of any float dtype."""
        codes, found = pack_codes(x, self.bits, self.group, self.per_channel)
        return {"codes": codes, "range": found}

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

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tokens [B, H, m, d] in `dtype`."""
        codes, found = stored.parts["codes"], self._ranges(stored)
        x: Tensor = unpack_codes(codes, found, self.bits, span_of(codes, found), dtype=dtype)
        return x

    def in_place(self, stored: Stored) -> Codes | None:
        """The codes, where every token's range follows from its place alone."""
        codes, found = stored.parts["codes"], stored.parts["range"]
        if self.bits not in (2, 4, 8) or self._apart(stored):
            return None
        return Codes(codes, found, self.bits, self._span(codes.shape[2]))

    def _apart(self, stored: Stored) -> bool:
        """Whether a token's range does not follow from its place: tokens picked one by one, or of several segments."""
        return self.per_channel and (stored.slots.dim() > 1 or (not self.group and stored.parts["range"].shape[2] > 1))

    def decodes(self, stored: Stored) -> bool:
        """Where no kernel reads the codes."""
        return self.in_place(stored) is None

    def scores(self, q: Tensor, stored: Stored) -> Tensor:
        """From the codes, where a kernel reads them."""
        codes = self.in_place(stored)
        found = None if codes is None else code_scores(q, [codes])
        return super().scores(q, stored) if found is None else found

    def weighted_sum(self, p: Tensor, stored: Stored) -> Tensor:
        """From the codes, where a kernel reads them."""
        codes = self.in_place(stored)
        found = None if codes is None or self.per_channel else code_sums(p, [codes])
        return super().weighted_sum(p, stored) if found is None else found

    def _span(self, tokens: int) -> int:
        """Neighbouring tokens that share a range, of all `tokens` there are."""
        return (self.group or tokens) if self.per_channel else 1

    def _ranges(self, stored: Stored) -> Tensor:
        """Ranges [B, H, m / span, 2, .] of the tokens."""
        whole = self.per_channel and not self.group
        return stored.of_segment("range", SEGMENT) if whole else stored.parts["range"]

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """Codes, and 4 bytes per group."""
        codes = d * self.bits / 8
        if not self.per_channel:
            return codes + 4 * (d / self._channels(d))
        span = self.group or n
        return codes + (4 * d / span if span else 0.0)


def span_of(codes: Tensor, found: Tensor) -> int:
    """Tokens of codes [B, H, m, .] that share one of the ranges [B, H, m / span, 2, .]."""
    return codes.shape[2] // max(1, found.shape[2])
