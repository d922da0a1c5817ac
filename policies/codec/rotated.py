"""Rotated codes: a random rotation spreads what stands out, so that a scale per token is enough even at 2 or 3 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.kernels.hadamard import rotate, rotate_back
from kvlib.kernels.quantise import pack
from kvlib.kernels.ran import note
from kvlib.kernels.unpack import unpack_codes
from kvlib.policies.base import RecipeError, register
from kvlib.policies.codec.kivi import check_bits
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import Codec, Form, Stored, Tokens

# Lloyd-Max levels of the standard normal distribution, the positive half.
_LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}


@lru_cache
def _levels(bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        half = torch.tensor(_LEVELS[bits], device=device)
        return torch.cat([-half.flip(0), half])


def _valued(codes: Tensor, levels: Tensor) -> Tensor:
    """The levels of codes [...]."""
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


@dataclass(frozen=True)
class LloydMax(Form):
    """Rotated unit vectors on the levels that suit a normal distribution, and the norm that gives q.k no bias.

    TurboQuant's first stage (arXiv 2504.19874).  Codes shrink a vector; what is stored is not its norm but the factor under
    which the coded vector's product with the true one is the true one's square.
    """

    bits: int

    @property
    def spans(self) -> Mapping[str, int]:
        """All of a single token."""
        return {"codes": 1, "norm": 1}

    def check(self, name: str, d: int) -> None:
        """Codes must fill bytes."""
        Uniform(self.bits, rotated=True).check(name, d)

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """Codes [R, H, m, d * bits / 8] and norms [R, H, m, 1] fp16."""
        note("encoding", "torch")
        y, levels = rotate(tokens.x), _levels(self.bits, tokens.x.device)
        norm = y.norm(dim=-1, keepdim=True)
        unit = y * (y.shape[-1] ** 0.5 / norm.clamp(min=1e-30))
        codes = torch.zeros_like(unit, dtype=torch.uint8)
        for border in (levels[1:] + levels[:-1]) / 2:  # a few comparisons, each of which reads faster than a search
            codes += unit > border
        shrink = (unit * _valued(codes, levels)).sum(-1, keepdim=True) / y.shape[-1]
        factor = torch.where(norm > 0, norm / shrink.clamp(min=1e-6), 0.0) * y.shape[-1] ** -0.5
        return {"codes": pack(codes, self.bits), "norm": factor.clamp(max=65504.0).half()}

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rotated tokens [B, H, m, d] in `dtype`."""
        codes, norm = stored.parts["codes"], stored.parts["norm"].unsqueeze(4)
        x: Tensor = unpack_codes(codes, norm, self.bits, levels=_levels(self.bits, codes.device), dtype=dtype)
        return x

    def prologue(self, q: Tensor, stored: Stored) -> Tensor:
        """Rotated as the keys are."""
        return rotate(q)

    def epilogue(self, out: Tensor, stored: Stored) -> Tensor:
        """Rotated back."""
        return rotate_back(out)

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """Codes and an fp16 norm."""
        return d * self.bits / 8 + 2


@register
@dataclass(frozen=True)
class Rotated(Codec):
    """Rotate every token by a random Hadamard matrix, and a scale per token is enough for few bits.

    QuaRot (arXiv 2404.00456): keys and queries after their rotary embedding, values before, the output back.  No token
    depends on another: any can be evicted, picked, shared.
    bits:   2, 3, 4 or 8; k_bits and v_bits where keys and values differ (0: bits).
    levels: "uniform" between a token's least and largest entry, or "lloyd_max", TurboQuant's (arXiv 2504.19874), to 4 bits.
    """

    name: ClassVar[str] = "rotated"
    paper: ClassVar[str] = "2404.00456"

    bits: int = 4
    k_bits: int = 0
    v_bits: int = 0
    levels: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels not in ("uniform", "lloyd_max"):
            raise RecipeError(self.name, "levels", self.levels, "give uniform or lloyd_max")
        known = (2, 3, 4, 8) if self.levels == "uniform" else tuple(_LEVELS)
        check_bits(self.name, "bits", self.bits, known)
        for side in ("k_bits", "v_bits"):
            if getattr(self, side) or isinstance(getattr(self, side), bool):
                check_bits(self.name, side, getattr(self, side), known)

    def keys(self) -> Form:
        """Rotated after the rotary embedding."""
        return self._form(self.k_bits or self.bits)

    def values(self) -> Form:
        """Rotated too."""
        return self._form(self.v_bits or self.bits)

    def _form(self, bits: int) -> Form:
        return Uniform(bits, rotated=True) if self.levels == "uniform" else LloydMax(bits)
