"""LServe: streaming heads beside pages chosen at a finer grain, and less often, than they are read, arXiv 2502.14866."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlib.policies.base import Budget, Composition, Method, register
from kvlib.policies.heads.duo_attention import DuoAttention
from kvlib.policies.select.quest import Quest


@register
@dataclass(frozen=True)
class LServe(Composition):
    """Half of the heads stream; the others read large pages, ranked by the best of their small ones every few steps.

    budget: tokens a decode query of a retrieval head reads (int), or fraction of the prompt (float).
    sparsity, heads, sink, recent: which heads stream, and what they keep, as in `duo_attention`.
    page, logical: tokens per physical page and per logical page (64, 16).
    every:  decode steps a choice serves (4).
    """

    name: ClassVar[str] = "lserve"
    paper: ClassVar[str] = "2502.14866"

    budget: Budget = 4096
    sparsity: float = 0.5
    heads: str = ""
    sink: int = 128
    recent: int = 256
    page: int = 64
    logical: int = 16
    every: int = 4

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> tuple[Method, ...]:
        """`duo_attention` and `quest`."""
        quest = Quest(self.budget, dense_layers=0, page=self.page, logical=self.logical, every=self.every)
        return DuoAttention(self.sparsity, self.heads, self.sink, self.recent), quest
