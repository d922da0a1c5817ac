"""The ids behind the tokens a cache has seen, by row and position, for methods that read text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvlib.layer import NewTokens
from kvlib.offload.transfer import sent
from kvlib.segment import empty, slack


class TokenIds:
    """Ids [B, capacity] int32; row r holds those of positions 0..count[r]-1.  One store serves all layers."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget every id."""
        self.ids: Tensor | None = None
        self.count = np.zeros(0, dtype=np.int64)

    def put(self, ids: Tensor, new: NewTokens, first: np.ndarray) -> None:
        """Write the ids [B, n] of a chunk from position first[r] of each row on; what stood there and after is forgotten.
        Raises ValueError for another batch size."""
        batch, n = ids.shape
        if self.ids is None:
            self.ids = empty((batch, n + slack(n)), ids, torch.int32)
        if not batch == len(first) == len(self.ids):
            raise ValueError(f"the cache holds {len(self.ids)} rows, the new ids have {batch}: call cache.reset()")
        need = int((first + new.count).max())
        if need > self.ids.shape[1]:
            wider = empty((batch, need + slack(need)), self.ids)
            wider[:, : self.ids.shape[1]] = self.ids
            self.ids = wider
        if new.order is not None:
            ids = ids.gather(1, new.order)
        column = torch.arange(n, device=ids.device)
        before = sent(first - (n - new.count), ids.device)[:, None]
        real = column >= sent(n - new.count, ids.device)[:, None]
        row = torch.arange(batch, device=ids.device)[:, None].expand(-1, n)
        self.ids[row[real], (before + column)[real]] = ids[real].int()
        self.count = first + new.count

    def at(self, positions: Tensor) -> Tensor:
        """Ids at positions [B, H, M]."""
        assert self.ids is not None
        held = self.ids.to(positions.device)
        index = positions.long().flatten(1).clamp(0, held.shape[1] - 1)
        return held.gather(1, index).view(positions.shape).long()

    def nbytes(self, used: bool) -> int:
        """Bytes allocated, or with `used` those of the ids held."""
        if self.ids is None:
            return 0
        return int(self.count.sum()) * self.ids.element_size() if used else self.ids.nbytes

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows."""
        if self.ids is not None:
            with torch.inference_mode(False):
                self.ids = self.ids.index_select(0, rows.to(self.ids.device))
            self.count = self.count[rows.cpu().numpy()]
