"""DuoAttention: retrieval heads keep everything, streaming heads keep sinks and recent tokens, arXiv 2410.10819."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvlib.policies.base import HeadSplit, RecipeError, check_flag, check_fraction, check_whole, register
from kvlib.policies.evict.streaming_llm import StreamingLLM
from kvlib.policies.heads.table import HeadTable

if TYPE_CHECKING:
    from typing_extensions import Self


@register
@dataclass(frozen=True)
class DuoAttention(HeadSplit):
    """Retrieval heads keep everything, streaming heads keep sinks and recent tokens.

    sparsity: fraction of all KV heads that stream, those of the lowest gates (0.5 for grouped-query models).
    heads:    head table file; without one the heads are ranked by the induction probe (arXiv 2407.15891).
    sink, recent: what a streaming head keeps.
    exact:    as in `streaming_llm`: whether prompt queries of streaming heads are limited like decode queries.
    """

    name: ClassVar[str] = "duo_attention"
    paper: ClassVar[str] = "2410.10819"

    sparsity: float = 0.5
    heads: str = ""
    sink: int = 64
    recent: int = 256
    exact: bool = False

    def __post_init__(self) -> None:
        check_fraction(self.name, "sparsity", self.sparsity)
        check_whole(self.name, "sink", self.sink)
        check_whole(self.name, "recent", self.recent, 1)
        check_flag(self.name, "exact", self.exact)
        if not isinstance(self.heads, str):
            raise RecipeError(self.name, "heads", self.heads, "give the path of a head table file")

    def streaming(self) -> StreamingLLM:
        """What the streaming heads keep."""
        return StreamingLLM(self.sink, self.recent, self.exact)

    def table(self, shape: tuple[int, int], probe: Callable[[], np.ndarray]) -> HeadTable:
        """The given table, or the probe's ranking.  Raises RecipeError where a file does not fit the model."""
        if not self.heads:
            gates = np.ones(shape) if self.sparsity in (0, 1) else probe()
            return HeadTable(gates, "induction probe (training-free)")
        if not Path(self.heads).is_file():
            raise RecipeError(self.name, "heads", self.heads, "no such file: make one with `kvlib heads identify`")
        try:
            table = HeadTable.load(self.heads)
        except ValueError as error:
            raise RecipeError(self.name, "heads", self.heads, str(error)) from error
        if table.gates.shape != shape:
            remedy = f"its gates are {table.gates.shape}, the model has (layers, kv_heads) = {shape}: give its own table"
            raise RecipeError(self.name, "heads", self.heads, remedy)
        return table

    def split(self, table: HeadTable, layers: np.ndarray) -> np.ndarray:
        """The heads of the lowest gates."""
        return table.streaming(self.sparsity, layers)

    def unlimited(self) -> Self:
        """The same method at `sparsity=0.0`."""
        return dataclasses.replace(self, sparsity=0.0)
