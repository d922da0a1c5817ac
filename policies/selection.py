"""The role `select`: which of the tokens held a query reads, and the index of units it finds them by."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvlib.policies.base import (
    Budget,
    Evictor,
    Method,
    Needs,
    RecipeError,
    Sizes,
    Split,
    budget_tokens,
    check_budget,
    check_whole,
    shares,
)

if TYPE_CHECKING:
    from typing_extensions import Self

SEGMENT = 8192  # most prompt tokens that fitted units are fitted to at once: keeps the cost of fitting linear
SCOPES = ("kv_head", "layer", "query_head")


@dataclass(frozen=True)
class Block:
    """Tokens of R batch rows about to enter the body: keys and values [R, H, m, d] and their positions [R, H, m].

    first [R] are the positions where the span begins in which they lie (evictors leave gaps); heads [H] are the KV heads'
    places in the model, layer * kv_heads + head; limit is the most tokens that may wait for a unit to be whole; fixed holds
    what `Selector.calibrate` found for these rows; `ids(start, stop)` fetches the ids [R, stop - start] of a span of
    positions where the method asked for token ids, and tokenizer reads them; fresh says that it is the prompt's.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    first: np.ndarray
    heads: np.ndarray
    limit: int
    fixed: dict[str, Tensor]
    ids: Callable[[int, int], Tensor]
    tokenizer: Any = None
    fresh: bool = True


@dataclass(frozen=True)
class Units:
    """A block split into units: summary parts [R, H, U, ...] by name, the sizes [R, H, U] int32 (None: `Selector.run`
    tokens each), and the order [R, H, m] that puts the tokens of each unit side by side (None: they are)."""

    summary: dict[str, Tensor]
    size: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class Index:
    """What a selector finds units by: summary parts [B, H, U, ...], the sizes [B, H, U] where they differ, what was
    calibrated per row, and for methods that read every key their products with a query [B, Hq, d], [B, Hq, T] fp32."""

    summary: dict[str, Tensor]
    size: Tensor | None
    fixed: dict[str, Tensor]
    products: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Past:
    """What a selector remembers of earlier queries: the last order of units [B, H, K], when it was made (`tokens` [B]) and
    with how much in the body (`sealed` [B], -1 where it must not serve again), the query [B, Hq, d] it was made for, and
    tensors [B, ...] of its own."""

    order: Tensor | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    sealed: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    query: Tensor | None = None
    own: dict[str, Tensor] = field(default_factory=dict)

    def expired(self, rows: np.ndarray) -> Past:
        """The same, but rows [B] that read everything now will choose anew."""
        return self if self.order is None else replace(self, sealed=np.where(rows, -1, self.sealed))

    def where(self, real: np.ndarray, before: Past) -> Past:
        """What rows [B] with a token remember now, and the others what they did before."""
        if self is before or real.all():
            return self
        rows = torch.from_numpy(real)

        def mixed(now: Tensor | None, then: Tensor | None) -> Tensor:
            some = then if now is None else now
            assert some is not None
            now, then = (torch.zeros_like(some) if x is None else x for x in (now, then))
            return torch.where(rows.to(some.device).view(-1, *[1] * (some.dim() - 1)), now, then)

        own = {name: mixed(self.own.get(name), before.own.get(name)) for name in {**before.own, **self.own}}
        if self.order is None or before.order is None:  # one of the two kinds of rows has not chosen
            chosen = self.expired(~real) if before.order is None else before.expired(real)
            return replace(chosen, own=own)
        width = max(self.order.shape[-1], before.order.shape[-1])
        order, last = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (self.order, before.order))
        tokens, sealed = np.where(real, self.tokens, before.tokens), np.where(real, self.sealed, before.sealed)
        return Past(mixed(order, last), tokens, sealed, mixed(self.query, before.query), own)

    def reorder(self, rows: Tensor) -> Past:
        """Select batch rows [B']."""
        if not self.tensors():
            return self  # and do not ask the device which rows
        chosen = rows.cpu().numpy()

        def picked(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, rows)

        tokens, sealed = (x[chosen] if len(x) else x for x in (self.tokens, self.sealed))
        own = {name: x.index_select(0, rows) for name, x in self.own.items()}
        return Past(picked(self.order), tokens, sealed, picked(self.query), own)

    def tensors(self) -> list[Tensor]:
        """Every storage."""
        return [x for x in (self.order, self.query, *self.own.values()) if x is not None]


@dataclass(frozen=True)
class Selector(Method):
    """Decides which of the tokens held a query reads once the prompt has ended; prompts read everything.

    budget: tokens a decode query reads per KV head (int), sinks and newest tokens included, or fraction of the prompt
        (float).
    scope:  who shares a choice: "kv_head" (the query heads of a KV head), "layer" (all heads) or "query_head" (nobody).
    dense_layers: first layers that read everything; never more than a quarter of the model's.
    """

    role: ClassVar[str] = "select"
    lossless_recall: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()
    fitted: ClassVar[bool] = (
        False  # whether units are fitted to a block as a whole, and may put its tokens in another order
    )
    loudest: ClassVar[bool] = False  # whether a unit counts as much as to the one query head that wants it most
    reads_keys: ClassVar[bool] = False  # whether the keys themselves are the index, and stay on the device on any tier

    budget: Budget = 0.25
    scope: str = "kv_head"
    dense_layers: int = 0

    def __post_init__(self) -> None:
        check_budget(self.name, self.budget, self.minimum)
        check_whole(self.name, "dense_layers", self.dense_layers)
        if self.scope not in SCOPES:
            raise RecipeError(self.name, "scope", self.scope, f"give one of {', '.join(SCOPES)}")

    @property
    def run(self) -> int:
        """Tokens of every unit, 0 where they differ."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether a choice depends on earlier queries."""
        return False

    @property
    def scaled(self) -> bool:
        """Whether votes use the attention's own scale; else the logits as they are, among themselves."""
        return True

    @property
    def minimum(self) -> int:
        """Least budget in tokens."""
        return 8

    @property
    def portions(self) -> tuple[int, int, int]:
        """Sink, recent and block where the budget is large; they shrink with it."""
        return 16, 32, 64

    @abstractmethod
    def build(self, block: Block) -> Units:
        """Split tokens that enter the body into units and summarise them; every row for itself."""

    @abstractmethod
    def logits(self, q: Tensor, index: Index) -> Tensor:
        """What a unit promises each query head q [B, Hq, d], [B, Hq, U] fp32, on the scale of q.k."""

    def always(self, index: Index) -> Tensor | None:
        """Mask [B, H, U] of units that are read whatever the query; None: none."""
        return None

    def estimation(self, index: Index) -> tuple[Tensor, Tensor] | None:
        """Mean keys and mean values [B, H, U, d] that stand for units nobody reads; None: they are left out."""
        return None

    def whole(self, block: Block) -> int:
        """How many of a block's tokens make whole units; the others wait in the tail."""
        m: int = block.keys.shape[2]
        return m // self.run * self.run if self.run else m

    def requirements(self) -> Needs:
        """What this instance needs; `needs` of the class unless it depends on a parameter."""
        return self.needs

    def fit(self, shape: tuple[int, int, int], tokenizer: Any) -> None:
        """Raise RecipeError where the method cannot serve a model of shape (layers, KV heads, d) with this tokenizer."""

    def remark(self) -> str:
        """What a report should say of this instance."""
        return ""

    def calibrate(self, products: Tensor | None, heads: np.ndarray, like: Tensor) -> dict[str, Tensor]:
        """Tensors [B, ...] fixed when the prompt ends; products [B, H, d] is the prompt's sum of |q.k| per key channel
        where `needs` asked for it, heads [H] are the KV heads' places in the model, like [B, H, T, d] the keys."""
        return {}

    def prepare(self, q: Tensor, past: Past, newest: Callable[[], Tensor], tokenizer: Any) -> tuple[Tensor, Past]:
        """The query [B, Hq, d] to score with, and what to remember; `newest` fetches the ids [B] of the query's tokens."""
        return q, past

    def reuse(self, q: Tensor, past: Past, tokens: np.ndarray) -> Tensor | np.ndarray | None:
        """Rows [B] whose last order still serves the query q of rows that have seen `tokens` [B]; None: none."""
        return None

    def evictor(self) -> Evictor | None:
        """What the method gives up for good when the prompt ends; None: nothing."""
        return None

    def selects(self) -> bool:
        """Whether the budget is less than everything."""
        return not (isinstance(self.budget, float) and self.budget == 1.0)

    def tokens(self, seen: np.ndarray) -> np.ndarray:
        """The budget in tokens, [B]; a fraction never gives less than the method's minimum."""
        return budget_tokens(self.budget, seen, self.minimum)

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """The house rule: sinks, recent tokens and an open block within the budget, the rest of it chosen from the body."""
        sink, recent, block = self.portions
        step = lcm(max(self.run, 1), sizes.grain)
        budget = self.tokens(seen)
        if sizes.grain > 1 and not isinstance(self.budget, int):
            budget = np.maximum(budget, 2 * step)
        return shares(budget, sizes, max(block, step), recent, sink, step)

    def unlimited(self) -> Self:
        """The same method at `budget=1.0`."""
        return dataclasses.replace(self, budget=1.0)


@dataclass(frozen=True)
class Everything(Selector):
    """Read the whole body: what a recipe without a selector does where its body is encoded or lives outside the device.

    recent: newest tokens that stay in the tail.
    """

    name: ClassVar[str] = "everything"

    budget: Budget = 1.0
    recent: int = 64

    @property
    def portions(self) -> tuple[int, int, int]:
        """Few in the tail, the rest in the body."""
        return 4, self.recent, 64

    def build(self, block: Block) -> Units:
        """No units."""
        return Units({})

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """The same however long the prompt."""
        sink, recent, block = (
            default if size is None else size
            for size, default in zip((sizes.sink, sizes.recent, sizes.block), self.portions, strict=True)
        )
        block = -(-block // sizes.grain) * sizes.grain
        none = np.zeros_like(seen)
        return Split(none + sink, none + recent, none + block, none)

    def logits(self, q: Tensor, index: Index) -> Tensor:
        """Nothing is ever ranked."""
        raise NotImplementedError


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [B] of two queries [B, Hq, d], all heads together."""
    return torch.nn.functional.cosine_similarity(a.flatten(1).float(), b.flatten(1).float(), dim=1)
