"""SentenceKV: sentences are recalled whole, by their mean keys and the mean query of the open one, arXiv 2504.00970."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvlib.kernels.bounds import bounds
from kvlib.offload.transfer import sent
from kvlib.policies.base import Budget, Evictor, Needs, RecipeError, register
from kvlib.policies.evict.snapkv import SnapKV
from kvlib.policies.select.clusterkv import means
from kvlib.policies.select.sentences import Terminators, borders, terminators
from kvlib.policies.selection import Block, Index, Past, Selector, Units, cosine


@register
@dataclass(frozen=True)
class SentenceKV(Selector):
    """Read the sentences whose mean keys fit the mean query of the sentence being written.

    budget: tokens a decode query reads per KV head (int), sinks and newest tokens included, or fraction of the prompt
        (float).
    scope:  "kv_head" (the query heads of a KV head choose together), "layer" (with r=inf) or "query_head" (the paper).
    dense_layers: first layers that read everything; never more than a quarter of the model's.
    r:      semantic factor: the prompt keeps r * budget tokens, chosen as by SnapKV, for good; inf keeps all (3).
    theta:  cosine of mean queries from which on the last choice serves again; None: choose at every step.

    A sentence has 4 to 64 tokens; longer ones are cut at a comma or a newline.  Needs the tokenizer.
    """

    name: ClassVar[str] = "sentencekv"
    paper: ClassVar[str] = "2504.00970"
    needs: ClassVar[Needs] = Needs(token_ids=True, tokenizer=True)
    lossless_recall: ClassVar[bool] = False

    budget: Budget = 1024
    r: float | str = 3.0
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r == "inf":  # as a recipe writes it
            object.__setattr__(self, "r", math.inf)
        if isinstance(self.r, bool | str) or not isinstance(self.r, int | float) or not self.r >= 1:
            raise RecipeError(self.name, "r", self.r, "give a number, 1 or more, or inf")
        if self.theta is not None and (isinstance(self.theta, bool) or not isinstance(self.theta, int | float)):
            raise RecipeError(self.name, "theta", self.theta, "give a cosine or None")
        if self.scope == "layer" and self.evictor() is not None:
            raise RecipeError(self.name, "scope", self.scope, "heads keep different tokens: give kv_head, or r=inf")

    @property
    def remembers(self) -> bool:
        """The mean query is of all queries since the last sentence ended."""
        return True

    @property
    def portions(self) -> tuple[int, int, int]:
        """As the paper's, and an open sentence that is read whole."""
        return 32, 32, 128

    def fit(self, shape: tuple[int, int, int], tokenizer: Any) -> None:
        """Raise RecipeError for a tokenizer whose vocabulary cannot be read."""
        try:
            terminators(tokenizer)
        except (AttributeError, TypeError) as error:
            remedy = f"it reads text, and this tokenizer's vocabulary cannot be read ({error}): give the model's own"
            raise RecipeError(self.name, "tokenizer", type(tokenizer).__name__, remedy) from error

    def evictor(self) -> Evictor | None:
        """SnapKV with r times the budget; None where that is everything."""
        kept = float(self.r) * self.budget
        if kept >= 2**31 or (isinstance(self.budget, float) and kept >= 1):
            return None
        return SnapKV(budget=kept if isinstance(self.budget, float) else int(kept))

    def whole(self, block: Block) -> int:
        """Up to the last sentence that is complete."""
        found = self._borders(block, int(block.first[0]), block.keys.shape[2])
        return int(found[-1]) if len(found) else 0

    def build(self, block: Block) -> Units:
        """A mean key per sentence; tokens that an evictor has left gaps between belong where they stood."""
        at = block.positions[0].cpu().numpy()  # rows that need ids come one by one
        first, stop = int(block.first[0]), int(at.max()) + 1
        ends = first + self._borders(block, first, stop - first)
        units = np.searchsorted(ends, at, side="right")
        count = int(units.max()) + 1
        size = torch.from_numpy(np.stack([np.bincount(head, minlength=count) for head in units])).int()
        size = size.to(block.keys.device)
        order = torch.arange(at.shape[1], device=block.keys.device).expand(at.shape)  # by position, so by sentence
        return Units({"mean": means(block.keys[0], order, size)[None]}, size[None])

    def _borders(self, block: Block, first: int, tokens: int) -> np.ndarray:
        """Ends of the complete sentences among `tokens` tokens from position `first` on."""
        ends, soft = terminators(block.tokenizer).of(block.ids(first, first + tokens)[0].cpu().numpy())
        # No longer than a block, so that one is whole whenever a block is due.
        most = max(min(4, block.limit), min(64, block.limit // 2))
        return borders(ends, min(4, most), most, soft)

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """Inner product with the mean of a sentence's keys."""
        return bounds(q, index.summary["mean"])

    def prepare(self, q: Tensor, past: Past, newest: Callable[[], Tensor], tokenizer: Any) -> tuple[Tensor, Past]:
        """The mean of the queries since the last sentence ended; the query itself where one has just ended."""
        table = _hard(terminators(tokenizer), q.device)
        ids = newest()
        ended = (table[ids.clamp(0, len(table) - 1)] & (ids < len(table))).view(-1, 1, 1)
        total, count = q.float(), torch.ones_like(ended, dtype=torch.float32)
        if past.own:
            total, count = total + past.own["sum"], count + past.own["count"]
        mean = torch.where(ended, q.float(), total / count)
        own = {"sum": total.masked_fill(ended, 0), "count": count.masked_fill(ended, 0)}
        return mean, replace(past, own=own)

    def reuse(self, q: Tensor, past: Past, tokens: np.ndarray) -> Tensor | None:
        """The last choice, while the mean query stays close to the one it was made for."""
        return None if self.theta is None or past.query is None else cosine(q, past.query) >= self.theta


_tables: weakref.WeakKeyDictionary[Terminators, dict[torch.device, Tensor]] = weakref.WeakKeyDictionary()


def _hard(found: Terminators, device: torch.device) -> Tensor:
    """Which ids end a sentence, on a device."""
    known = _tables.setdefault(found, {})
    if device not in known:
        known[device] = sent(found.hard, device)
    return known[device]
