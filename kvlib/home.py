"""Evicting methods in host memory: the tokens kept live there and are read whole at every step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlib.kernels.attention import Partial
from kvlib.offload.transfer import host_empty

if TYPE_CHECKING:
    from kvlib.segment import Spec, Tiles


FEW = 32  # query rows that the CPU attends; with more, as in a prompt, keys and values move instead


class Home:
    """Host memory behind a group on `device`; `attend`: whether the CPU attends what lives there."""

    def __init__(self, device: torch.device, attend: bool):
        self.device, self.computes = device, attend
        self.moved = 0  # bytes of keys and values brought to the device

    def settle(self, tiles: Tiles) -> Tiles:
        """The same tokens with keys and values in host memory."""

        def there(x: Tensor) -> Tensor:
            host = host_empty(tuple(x.shape), x.dtype, self.device)
            return host.copy_(x)

        return replace(tiles, k=there(tiles.k), v=there(tiles.v), home=self)

    def bring(self, tiles: Tiles) -> Tiles:
        """The same tokens with keys and values on the device, for as long as the caller needs them."""
        self.moved += tiles.k.nbytes + tiles.v.nbytes
        k, v = (x.to(self.device, non_blocking=True) for x in (tiles.k, tiles.v))
        return replace(tiles, k=k, v=v, home=None)

    def attend(self, tiles: Tiles, q: Tensor, spec: Spec, probabilities: bool) -> Partial:
        """Attention of q over tiles that live here."""
        if not self.computes or q.shape[2] > FEW:
            return self.bring(tiles).attend(q, spec, probabilities)
        segment, fill = (None if x is None else x.cpu() for x in (tiles.segment, tiles.fill))
        out, lse, p = replace(tiles, segment=segment, fill=fill, home=None).attend(q.cpu(), spec, probabilities)
        back = (None if x is None else x.to(self.device) for x in (lse, p))
        return Partial(out.to(self.device), *back)
