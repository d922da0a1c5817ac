"""Channel tables: which key channels carry a head's scores, and the file they live in (arXiv 2408.07092)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = "kvlib-channel-table-1"
REMEDY = "make one with `kvlib channels identify`"


@dataclass(frozen=True)
class ChannelTable:
    """Channels of every KV head by descending importance, `order` int [layers, kv_heads, d], and where they come from.

    weight [layers, kv_heads, d]: importance by channel, not by rank: the mean over tokens of |sum over the head's group of
        q * k|, post-rotary.  Zero in layers that were not looked at.

    The file is one line of JSON after `# `, then a line per layer and KV head of tab-separated `channel:weight`, the most
    important first.  Raises ValueError unless every head lists every channel once.
    """

    order: np.ndarray
    source: str
    weight: np.ndarray
    header: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order.ndim != 3 or self.order.shape != self.weight.shape:
            raise ValueError(
                f"an order of shape {self.order.shape} with a weight of shape {self.weight.shape}: give both as "
                "[layers, kv_heads, d]"
            )
        channels = np.arange(self.order.shape[2])
        wrong = np.argwhere((np.sort(self.order, axis=-1) != channels).any(-1))
        if len(wrong):
            layer, head = wrong[0]
            missing = np.setdiff1d(channels, self.order[layer, head])[0]
            raise ValueError(
                f"layer {layer}, KV head {head} does not list channel {missing}: list each of the channels 0 to "
                f"{len(channels) - 1} once"
            )
        unfit = ~(np.isfinite(self.weight) & (self.weight >= 0))
        if unfit.any():
            raise ValueError(f"a channel's weight is {self.weight[unfit][0]}: give finite weights, 0 or more")

    @classmethod
    def of(cls, weight: np.ndarray, source: str, header: dict[str, Any] | None = None) -> ChannelTable:
        """The table of these weights [layers, kv_heads, d], ties by lower channel."""
        return cls(np.argsort(-weight, axis=-1, kind="stable"), source, weight, header or {})

    def save(self, path: str | Path) -> None:
        """Write the table to `path`."""
        header = {"format": FORMAT, "source": self.source, "shape": list(self.order.shape), **self.header}
        d = self.order.shape[2]
        weights = np.take_along_axis(self.weight, self.order, -1).reshape(-1, d).tolist()
        rows = [
            "\t".join(f"{channel}:{weight:.6g}" for channel, weight in zip(*head, strict=True))
            for head in zip(self.order.reshape(-1, d).tolist(), weights, strict=True)
        ]
        Path(path).write_text("\n".join(["# " + json.dumps(header), *rows]) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ChannelTable:
        """Read a table; raises FileNotFoundError, or ValueError naming the file, what is wrong with it and the remedy."""
        try:
            first, *rows = Path(path).read_text().splitlines() or [""]
            header = json.loads(first.removeprefix("# "))
            cells = [[cell.split(":") for cell in row.split("\t")] for row in rows if row.strip()]
            ranked = [[(int(channel), float(weight)) for channel, weight in row] for row in cells]
        except ValueError as error:
            raise ValueError(f"{path} is no channel table: {error}; {REMEDY}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no channel table: its first line must be '# ' and JSON with format {FORMAT!r}; {REMEDY}"
            )
        shape: Any = header.get("shape")
        widths = sorted({len(row) for row in ranked})
        if not _is_shape(shape) or len(ranked) != shape[0] * shape[1] or widths != [shape[2]]:
            raise ValueError(
                f"{path}: its shape [layers, kv_heads, d] is {shape} and it has {len(ranked)} lines of {widths} channels: "
                f"give a line per layer and KV head with all d channels, or {REMEDY}"
            )
        order, weights = (np.array([[pair[i] for pair in row] for row in ranked]).reshape(shape) for i in (0, 1))
        known = {"format", "source", "shape"}
        try:
            by_channel = np.take_along_axis(weights, order.argsort(-1), -1)
            return cls(order, str(path), by_channel, {k: v for k, v in header.items() if k not in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}, or {REMEDY}") from error


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)


def channel_weight(q: Tensor, k: Tensor, real: Tensor | None = None) -> Tensor:
    """What each key channel adds to the scores: the sum over tokens of |sum over the group of q * k|, fp32 [B, H, d].

    q [B, Hq, n, d], k [B, H, n, d] post-rotary and of the same tokens, each with itself; `real` [B, n] bool leaves padding
    out.  Divide the sum over blocks by their tokens for the mean.
    """
    batch, heads, n, d = k.shape
    grouped = q.reshape(batch, heads, -1, n, d).sum(2, dtype=torch.float32)
    product = (grouped * k.float()).abs()
    if real is not None:
        product = product.masked_fill(~real[:, None, :, None], 0.0)
    return product.sum(2)
