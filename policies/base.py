"""The roles a method can play, what it may look at, and the registry of methods by name."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from torch import Tensor

from kvlib.kernels.ranking import best, best_shared

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvlib.policies.heads.table import HeadTable

Budget = int | float


class RecipeError(ValueError):
    """A recipe that cannot work: names the method, the argument, the value as written and the remedy."""

    def __init__(self, method: str, argument: str | None, value: object, remedy: str):
        self.method, self.argument, self.value, self.remedy = method, argument, value, remedy
        what = method if argument is None else f"{method}({argument}={value})"
        super().__init__(f"{what}: {remedy}")


def check_whole(method: str, argument: str, value: object, least: int = 0) -> None:
    """Raise RecipeError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(method, argument, value, f"give a whole number, {least} or more")


def check_flag(method: str, argument: str, value: object) -> None:
    """Raise RecipeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise RecipeError(method, argument, value, "give True or False")


def check_fraction(method: str, argument: str, value: object) -> None:
    """Raise RecipeError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RecipeError(method, argument, value, "give a number from 0 to 1")


def check_budget(method: str, value: object, least: int) -> None:
    """Raise RecipeError unless `value` is a budget: int tokens >= `least`, or a float fraction in (0, 1]."""
    remedy = "give a whole number of tokens (budget=256) or a fraction of the prompt in (0, 1] (budget=0.25)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(method, "budget", value, remedy)
    if isinstance(value, float) and not (math.isfinite(value) and 0 < value <= 1):
        raise RecipeError(method, "budget", value, remedy)
    if isinstance(value, int) and value < 1:
        raise RecipeError(method, "budget", value, remedy)
    if isinstance(value, int) and value < least:
        raise RecipeError(method, "budget", value, f"{method} needs at least {least} tokens: give budget={least} or more")


def budget_tokens(budget: Budget, seen: np.ndarray, least: int) -> np.ndarray:
    """A budget in tokens, int64 [B], for rows of `seen` [B] tokens; a fraction never gives less than `least`."""
    if isinstance(budget, int):
        return np.full_like(seen, budget)
    return np.maximum(np.rint(budget * seen).astype(np.int64), least)


@dataclass(frozen=True)
class Needs:
    """What a method must be given beyond keys and values; computed only when asked for.

    mass:   probability each key collected from every query so far (`View.mass`).
    votes:  probability each key collected from the last `votes` prompt queries (`View.votes`).
    products: the prompt's sum of |q.k| per key channel, each token with itself (`Selector.calibrate`).
    token_ids: the ids behind the tokens (`View.token_ids`).
    tokenizer: the tokenizer, to read them (`View.tokenizer`).
    """

    mass: bool = False
    votes: int = 0
    products: bool = False
    token_ids: bool = False
    tokenizer: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What both need."""
        return Needs(
            self.mass or other.mass,
            max(self.votes, other.votes),
            self.products or other.products,
            self.token_ids or other.token_ids,
            self.tokenizer or other.tokenizer,
        )


@dataclass(frozen=True)
class Split:
    """Shares of a budget per batch row, in tokens (int64 arrays [B]): `sink` first and `recent` last tokens, `body` kept
    between them, and `block`, how many more may wait in the tail before the oldest are sealed."""

    sink: np.ndarray
    recent: np.ndarray
    block: np.ndarray
    body: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Most tokens a decode query attends: the budget."""
        total: np.ndarray = self.sink + self.recent + self.block + self.body
        return total


@dataclass(frozen=True)
class Sizes:
    """A recipe's own `sink`, `recent` and `block`, None where the method decides; blocks are whole multiples of `grain`,
    the tokens that its codec encodes together."""

    sink: int | None = None
    recent: int | None = None
    block: int | None = None
    grain: int = 1


class View:
    """Candidates [B, H, M] an evictor ranks: the body so far and the block being sealed, oldest first.

    positions int32 and valid bool [B, H, M]; mass and votes fp32 [B, H, M] where asked for, else None; keys, values
    [B, H, M, d] and token_ids [B, H, M] are fetched at first use.  heads [H] are the KV heads' places in the model,
    layer * kv_heads + head.
    """

    def __init__(
        self,
        positions: Tensor,
        valid: Tensor,
        mass: Tensor | None,
        votes: Tensor | None,
        fetch: Callable[[str], Tensor],
        heads: Tensor,
        tokenizer: Any = None,
    ):
        self.positions, self.valid, self.mass, self.votes, self._fetch = positions, valid, mass, votes, fetch
        self.heads, self.tokenizer = heads, tokenizer

    @cached_property
    def keys(self) -> Tensor:
        """Post-rotary keys of the candidates."""
        return self._fetch("k")

    @cached_property
    def values(self) -> Tensor:
        """Values of the candidates."""
        return self._fetch("v")

    @cached_property
    def token_ids(self) -> Tensor:
        """Ids of the candidates' tokens."""
        return self._fetch("token_ids")


def written(self: Any) -> str:
    """A dataclass that has a `name` as text: its budget, and what differs from the defaults."""
    arguments = []
    for field in dataclasses.fields(self):
        value = getattr(self, field.name)
        if field.name == "budget" or value != field.default or type(value) is not type(field.default):
            arguments.append(f"{field.name}={value!r}")
    return f"{self.name}({', '.join(arguments)})" if arguments else str(self.name)


@dataclass(frozen=True)
class Method(ABC):
    """A method in one role of a recipe: a frozen dataclass whose fields are the paper's parameters."""

    name: ClassVar[str]
    role: ClassVar[str]
    paper: ClassVar[str] = ""  # arXiv id
    lossless_recall: ClassVar[bool] = False  # whether every token can still be read later

    @classmethod
    def idea(cls) -> str:
        """The method's idea: the first line of its docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @abstractmethod
    def unlimited(self) -> Self:
        """The same method with so much budget that nothing is given up."""

    def __str__(self) -> str:
        return written(self)


@dataclass(frozen=True)
class Evictor(Method):
    """Decides which tokens stay, for good.  Most methods are a `BudgetedEvictor`."""

    role: ClassVar[str] = "evict"
    when: ClassVar[Literal["online", "prefill_end"]] = "prefill_end"
    needs: ClassVar[Needs] = Needs()
    chunk_invariant: ClassVar[bool] = True  # whether a prompt in chunks gives what the whole prompt gives
    bodiless: ClassVar[bool] = False  # whether nothing is kept between the first and the newest tokens

    @abstractmethod
    def evicts(self) -> bool:
        """Whether this instance ever drops a token."""

    @abstractmethod
    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """Shares of the budget for rows whose prompts have `seen` tokens, int64 [B]; `sizes` holds what the recipe
        prescribes."""

    @abstractmethod
    def keep(self, view: View, rankable: Tensor, body: Tensor) -> Tensor:
        """Mask [B, H, M] of what stays in the body: of the `rankable` candidates, `body` [B] per head."""

    def requirements(self) -> Needs:
        """What this instance needs; `needs` of the class unless it depends on a parameter."""
        return self.needs

    def band(self, prompt: bool) -> tuple[int | None, int]:
        """(window, sink) that limit what a query sees of the tail, for prompt or decode queries; (None, 0): all of it."""
        return None, 0


@dataclass(frozen=True)
class BudgetedEvictor(Evictor):
    """Keeps the best-scored tokens within a budget: subclasses give `score`, and `split` where the house rule is not it."""

    minimum: ClassVar[int] = 4  # least budget in tokens

    budget: Budget = 0.25
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_budget(self.name, self.budget, self.minimum)
        check_flag(self.name, "adaptive", self.adaptive)

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Worth of every candidate, [B, H, M]: the highest stay."""

    def keep(self, view: View, rankable: Tensor, body: Tensor) -> Tensor:
        """The `body` best per head, ties by lower position; with `adaptive` the heads of a row share their budgets."""
        choose = best_shared if self.adaptive else best
        return choose(self.score(view), rankable, body)

    def evicts(self) -> bool:
        """Whether the budget is less than everything."""
        return not (isinstance(self.budget, float) and self.budget == 1.0)

    def tokens(self, seen: np.ndarray) -> np.ndarray:
        """The budget in tokens, [B]; a fraction never gives less than the method's minimum."""
        return budget_tokens(self.budget, seen, self.minimum)

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """The house rule."""
        online = self.when == "online"
        return shares(self.tokens(seen), sizes, block=16 if online else 0)

    def unlimited(self) -> Self:
        """The same method at `budget=1.0`."""
        return dataclasses.replace(self, budget=1.0)


def shares(budget: np.ndarray, sizes: Sizes, block: int, recent: int | None = None, sink: int = 4, step: int = 1) -> Split:
    """The house rule for splitting a budget: sink <= budget / 8, recent <= budget / 2, block <= budget / 4, the rest is
    body.  By default recent and body are equal.  A size the recipe prescribes is taken as it is; blocks are whole
    multiples of `step`."""
    sinks = np.minimum(sink, budget // 8) if sizes.sink is None else np.full_like(budget, sizes.sink)
    if block == 0:
        blocks = np.zeros_like(budget)
    elif sizes.block is None:
        blocks = np.clip(budget // 4, 1, block)
    else:
        blocks = np.minimum(sizes.block, np.maximum(budget - 1, 1))
    blocks = np.maximum(blocks // step, block > 0) * step
    if sizes.recent is not None:
        recents = np.full_like(budget, sizes.recent)
    elif recent is None:
        recents = np.maximum(budget - sinks - blocks, 0) // 2
    else:
        recents = np.minimum(recent, budget // 2)
    # A fractional budget of a very short row can be smaller than what the recipe prescribes: the last tokens win.
    recents = np.minimum(recents, budget - blocks)
    sinks = np.minimum(sinks, budget - blocks - recents)
    return Split(sinks, recents, blocks, budget - sinks - recents - blocks)


@dataclass(frozen=True)
class Composition(Method):
    """A published method that is several roles at once: a name for the methods it is made of."""

    role: ClassVar[str] = "recipe"

    @abstractmethod
    def parts(self) -> tuple[Method, ...]:
        """The methods it stands for, one per role."""

    def unlimited(self) -> Self:
        """The same: what can be limited are its parts."""
        return self


@dataclass(frozen=True)
class HeadSplit(Method):
    """Decides which KV heads form the retrieval group and which the streaming group."""

    role: ClassVar[str] = "heads"

    @abstractmethod
    def streaming(self) -> Evictor:
        """What the streaming heads keep."""

    @abstractmethod
    def table(self, shape: tuple[int, int], probe: Callable[[], np.ndarray]) -> HeadTable:
        """Gates for a model of shape (layers, kv_heads); `probe()` ranks the heads without training."""

    @abstractmethod
    def split(self, table: HeadTable, layers: np.ndarray) -> np.ndarray:
        """Mask [layers, kv_heads] of the heads that stream; only the `layers` [layers] marked may be split."""


_METHODS: dict[str, type[Method]] = {}
MethodType = TypeVar("MethodType", bound=type[Method])


def register(cls: MethodType) -> MethodType:
    """Class decorator: make a method known to recipes under its `name`."""
    other = _METHODS.get(cls.name)
    if other is not None and other.__qualname__ != cls.__qualname__:
        raise ValueError(f"the name {cls.name!r} belongs to {other.__qualname__}: give {cls.__qualname__} another")
    _METHODS[cls.name] = cls
    return cls


def registered() -> dict[str, type[Method]]:
    """All methods by name."""
    return dict(_METHODS)


def parameters(cls: type[Any]) -> dict[str, Any]:
    """Parameters of a method, or of another dataclass, and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(cls)}
