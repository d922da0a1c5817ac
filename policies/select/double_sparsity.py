"""Double Sparsity: a few channels of every key are enough to rank the tokens, arXiv 2408.07092."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from kvlib.kernels.bounds import bounds
from kvlib.offload.transfer import sent
from kvlib.policies.base import Budget, Needs, RecipeError, check_whole, register
from kvlib.policies.select.channels import ChannelTable
from kvlib.policies.selection import Block, Index, Selector, Units


@register
@dataclass(frozen=True)
class DoubleSparsity(Selector):
    """Read the tokens that score highest on the few key channels that carry a head's scores.

    budget: tokens a decode query reads per KV head (int), sinks and newest tokens included, or fraction of the prompt
        (float).
    scope:  "kv_head" (the query heads of a KV head choose together), "layer" or, as in the paper, "query_head".
    dense_layers: first layers that read everything (2 in the paper); never more than a quarter of the model's.
    factor: one channel of so many is kept as a token's label.  The paper's headline is 16, its code also runs 4 and 2;
        heads of 64 and fewer channels need 4.
    channels: file of the channels' ranks (`kvlib channels identify`); without one every row ranks them by its own prompt.
    """

    name: ClassVar[str] = "double_sparsity"
    paper: ClassVar[str] = "2408.07092"

    budget: Budget = 1 / 16
    dense_layers: int = 2
    factor: int = 4
    channels: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.name, "factor", self.factor, 1)
        if not isinstance(self.channels, str):
            raise RecipeError(self.name, "channels", self.channels, "give the path of a channel table")
        if self.channels and not Path(self.channels).is_file():
            remedy = "no such file: make one with `kvlib channels identify`, or leave it out"
            raise RecipeError(self.name, "channels", self.channels, remedy)
        if self.channels:
            try:
                _ = self._table
            except ValueError as error:
                raise RecipeError(self.name, "channels", self.channels, str(error)) from error

    @cached_property
    def _table(self) -> ChannelTable:
        return ChannelTable.load(self.channels)

    @property
    def run(self) -> int:
        """Single tokens."""
        return 1

    @property
    def portions(self) -> tuple[int, int, int]:
        """Sinks and a local window outside the ranking."""
        return 16, 32, 32

    def requirements(self) -> Needs:
        """Without a table the prompt's own statistic."""
        return Needs(products=not self.channels)

    def remark(self) -> str:
        """Where the channels come from."""
        source = self.channels or "each row's own prompt (no channel table given)"
        return f"channels ranked by {source}"

    def fit(self, shape: tuple[int, int, int], tokenizer: Any) -> None:
        """Raise RecipeError where the table is of another model."""
        if self.channels and self._table.order.shape != shape:
            remedy = f"its shape is {self._table.order.shape}, the model has (layers, kv_heads, d) = {shape}: give its own"
            raise RecipeError(self.name, "channels", self.channels, remedy)

    def calibrate(self, products: Tensor | None, heads: np.ndarray, like: Tensor) -> dict[str, Tensor]:
        """The channels [B, H, c] of every head, most important first, ties by lower channel."""
        d = like.shape[3]
        if products is not None:
            order = products.argsort(dim=-1, descending=True, stable=True)
        else:
            ranked = sent(self._table.order.reshape(-1, d)[heads].astype(np.int64), like.device)
            order = ranked.expand(len(like), -1, -1)
        return {"channels": order[..., : max(1, d // self.factor)].contiguous()}

    def build(self, block: Block) -> Units:
        """Every token's label: its key on those channels."""
        channels = block.fixed["channels"].unsqueeze(2)
        return Units({"label": block.keys.gather(3, channels.expand(-1, -1, block.keys.shape[2], -1))})

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """The scores on those channels, as far apart as those on all channels would be."""
        channels, d = index.fixed["channels"], q.shape[-1]
        lists = channels.repeat_interleave(q.shape[1] // channels.shape[1], 1)
        spread: float = (d / channels.shape[2]) ** 0.5
        return bounds(q.gather(2, lists), index.summary["label"], scale=spread)
