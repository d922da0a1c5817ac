"""Rotary position embedding as arithmetic of its own: keys can be turned to a position, and turned back from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding: the pair of dimensions i turns by position * inv_freq[i] radians and is scaled.

    inv_freq:    radians per position of each of the rot / 2 pairs; the dimensions from rot on are left as they are.
    scaling:     factor on the rotated dimensions (transformers' attention_scaling; not 1 under YaRN).
    interleaved: pairs are (2i, 2i + 1), as in GPT-J, Cohere and GLM; else (i, i + rot / 2), as in Llama.

    Angles are fp32 products, as transformers computes them, so both methods use the angles the model used.  Beyond 2^16
    positions such an angle is off the exact product by up to 2^-8 = 0.004 radians, in the model and here alike.
    Source: arXiv 2104.09864 (RoFormer).
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    interleaved: bool = False

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors to their positions, as the model does.

        x [..., m, d] of any dtype, positions [..., m] integers on its device, broadcastable; returns [..., m, d] in fp32.
        Raises ValueError where d is smaller than the dimensions that rotate.  Source: arXiv 2104.09864.
        """
        angles = self._angles(positions, x.device)
        return self._rotate(x, angles.cos() * self.scaling, angles.sin() * self.scaling)

    def turn_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo `turn`: recover vectors as they were before their rotary embedding.

        x [..., m, d] of any dtype, positions [..., m] integers on its device, broadcastable; returns [..., m, d] in fp32,
        exact but for the rounding of x.  Raises ValueError where d is smaller than the dimensions that rotate.
        Source: arXiv 2104.09864.
        """
        angles = self._angles(positions, x.device)
        return self._rotate(x, angles.cos() / self.scaling, -angles.sin() / self.scaling)

    def _angles(self, positions: Tensor, device: torch.device) -> Tensor:
        return positions.unsqueeze(-1).float() * frequencies(self.inv_freq, device)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rot, d = 2 * len(self.inv_freq), x.shape[-1]
        if d < rot:
            raise ValueError(f"this rotary embedding rotates {rot} dimensions, but the vectors have {d}")
        x = x.float()
        turning = x[..., :rot]
        a, b = (turning[..., ::2], turning[..., 1::2]) if self.interleaved else turning.chunk(2, -1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        parts = (torch.stack(pair, -1).flatten(-2),) if self.interleaved else pair
        return torch.cat([*parts, x[..., rot:]], -1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the tensor outlives the call, and an inference tensor could not be used under autograd
def frequencies(inv_freq: tuple[float, ...], device: torch.device) -> Tensor:
    """inv_freq [rot / 2] fp32 on a device, kept there."""
    return torch.tensor(inv_freq, dtype=torch.float32, device=device)
