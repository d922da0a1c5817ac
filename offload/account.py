"""Count bytes per memory tier from live storages, so that what is reported is what is allocated."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

TIERS = ("device", "host", "disk")
PARTS = ("sink", "body", "tail", "index", "slots", "statistics", "staging", "stock")


def allocated(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Bytes of the distinct storages behind `tensors`; `seen` collects their addresses across calls, so that a storage
    shared by two parts counts once."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
