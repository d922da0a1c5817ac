"""H2O: heavy-hitter oracle, arXiv 2306.14048 (NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvlib.policies.base import Budget, BudgetedEvictor, Needs, View, register


@register
@dataclass(frozen=True)
class H2O(BudgetedEvictor):
    """Keep the tokens that collected the most attention so far and the newest ones; evict while decoding.

    budget:   tokens per KV head (int) or fraction of the prompt (float); the paper keeps 10 % heavy hitters + 10 % recent.
    adaptive: the heads of a layer share their budgets by collected attention (AdaKV, arXiv 2407.11550).

    Column sums are accumulated in fp32 per KV head from every query, the prompt's own included; keys stay at their true
    rotary positions.  A few first tokens are protected as sinks (recipe term `sink=0` for the paper's letter).  Eviction
    runs every `block` tokens on the budget's own spare slots; `block=1` is the paper's step.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "2306.14048"
    when: ClassVar[Literal["online", "prefill_end"]] = "online"
    needs: ClassVar[Needs] = Needs(mass=True)
    chunk_invariant: ClassVar[bool] = False  # later chunks read what earlier ones left

    budget: Budget = 0.2

    def score(self, view: View) -> Tensor:
        """Accumulated attention mass."""
        assert view.mass is not None
        return view.mass


@register
@dataclass(frozen=True)
class H2OPrefill(H2O):
    """Keep the prompt tokens that collected the most attention and the newest ones; evict once, when the prompt ends.

    The one-shot variant that other papers call H2O.  Parameters as `h2o`; generated tokens are never evicted.
    """

    name: ClassVar[str] = "h2o_prefill"
    when: ClassVar[Literal["online", "prefill_end"]] = "prefill_end"
    chunk_invariant: ClassVar[bool] = True
