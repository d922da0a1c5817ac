"""Oracle top-k: what a selector with perfect knowledge would read; the upper bound of every selector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.kernels.attention import Visible, blocked_scores
from kvlib.kernels.ranking import best
from kvlib.policies.base import Selector, register


@register
@dataclass(frozen=True)
class Oracle(Selector):
    """Read the keys that really get most of the attention, found by computing all of it: the scale's upper end.

    budget: tokens a decode query reads per KV head (int), or fraction of the prompt (float).

    The query heads of a KV head read the same keys, those with the largest sum of their attention probabilities, so no
    other choice of as many keys captures more.  Nothing is saved: a yardstick for methods that guess.
    """

    name: ClassVar[str] = "oracle"

    def select(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        visible: Visible,
        softcap: float | None,
        sinks: Tensor | None,
        budget: Tensor,
    ) -> Tensor:
        """The `budget` keys of largest probability, summed over the query heads of each KV head."""
        batch, heads, keys = k.shape[:3]
        chosen = torch.zeros(batch, heads, q.shape[2], keys, dtype=torch.bool, device=q.device)
        for i, j, lo, hi, s in blocked_scores(q, k, scale, visible, softcap):
            lse = s.logsumexp(-1, keepdim=True)
            if sinks is not None:
                own = sinks.float().view(heads, -1, 1, 1).repeat(batch, 1, 1, 1)
                lse = torch.logaddexp(lse, own.expand_as(lse))
            mass = (s - lse).exp_().nan_to_num_(0.0).sum(1).view(batch, heads * (j - i), hi - lo)
            seen = (s[:, 0] > float("-inf")).view_as(mass)
            chosen[:, :, i:j, lo:hi] = best(mass, seen, budget).view(batch, heads, j - i, hi - lo)
        return chosen
