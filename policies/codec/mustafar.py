"""Mustafar: of every token only the entries of largest magnitude, and a bitmap of where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.kernels.expand import expand
from kvlib.kernels.quantise import pack
from kvlib.kernels.ran import note
from kvlib.kernels.selection import top
from kvlib.policies.base import RecipeError, check_fraction, register
from kvlib.policies.encoding import Codec, Form, Stored, Tokens


@dataclass(frozen=True)
class Pruned(Form):
    """The d - floor(sparsity d) entries of largest magnitude, ties to the lower channel, in the order of their channels.

    Every token keeps as many, so that neither offsets nor padding are needed and any token can be read alone.
    """

    sparsity: float

    @property
    def spans(self) -> Mapping[str, int]:
        """All of a single token."""
        return {"bitmap": 1, "kept": 1}

    def check(self, name: str, d: int) -> None:
        """The bitmap must fill bytes."""
        if d % 8:
            raise RecipeError(name, None, None, f"head size {d} is no multiple of 8, as its bitmaps need")

    def k(self, d: int) -> int:
        """Entries that stay, of d."""
        return d - int(self.sparsity * d)

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """Bitmaps [R, H, m, d / 8] and the entries [R, H, m, k] in the model's type."""
        note("encoding", "torch")
        x, d = tokens.x, tokens.x.shape[-1]
        order = top(x.abs(), self.k(d)).sort(-1).values
        mask = torch.zeros(x.shape, dtype=torch.uint8, device=x.device).scatter_(-1, order, 1)
        return {"bitmap": pack(mask, 1), "kept": x.gather(-1, order)}

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tokens [B, H, m, d] with zeros where nothing was kept, in the model's type."""
        x: Tensor = expand(stored.parts["bitmap"], stored.parts["kept"])
        return x

    def numbers(self, stored: Stored) -> torch.dtype:
        """The model's."""
        return stored.parts["kept"].dtype

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """A bit per channel and the entries that stay."""
        return d / 8 + self.k(d) * itemsize


@register
@dataclass(frozen=True)
class Mustafar(Codec):
    """Keep of every token only the entries of largest magnitude, which carry most of q.k and of the output.

    Mustafar, arXiv 2505.22913.  A fixed number per token instead of the paper's tiles: fewer bytes, every token alone.
    sparsity: share of entries dropped, of keys and of values; k_sparsity and v_sparsity where they differ (-1: sparsity).
    recent: newest tokens that are dense, the paper's R.
    """

    name: ClassVar[str] = "mustafar"
    paper: ClassVar[str] = "2505.22913"

    recent: int = 32
    sparsity: float = 0.7
    k_sparsity: float = -1
    v_sparsity: float = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("sparsity", "k_sparsity", "v_sparsity"):
            value = getattr(self, field)
            if field == "sparsity" or value != -1:
                check_fraction(self.name, field, value)
                if value > 0.95:
                    raise RecipeError(self.name, field, value, "nothing would be left: give 0.95 or less")

    def keys(self) -> Form:
        """Entries of each key."""
        return Pruned(self.sparsity if self.k_sparsity == -1 else self.k_sparsity)

    def values(self) -> Form:
        """Entries of each value."""
        return Pruned(self.sparsity if self.v_sparsity == -1 else self.v_sparsity)
