"""The role `codec`: in what form a body's keys and values are kept, and how a query reads them so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvlib.kernels.attention import EVERYTHING, Partial, Visible, attend_scores, attention
from kvlib.kernels.codes import Codes, attend_codes
from kvlib.policies.base import Method, check_whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvlib.kernels.rotary import Rotary

SEGMENT = 0  # span of a part with one entry for all tokens that were encoded together
MERGED = -1  # span of such a part of which several entries become one, once enough of them are alike
PATCH = -2  # span of a part with entries for some tokens only, which it names
_MADE = (torch.float32, torch.float16)  # what codes are made into, on a CPU and on a GPU, whose products are of halves
_ROOM = 2.0**-6  # by which a query becomes smaller before it is rounded to fp16, so that smoothed ones do not overflow
FEW = 32  # query rows that read codes as they are; for more, as in a prompt, they are decoded once


@dataclass(frozen=True)
class Tokens:
    """Tokens [R, H, m, d] about to be encoded, keys or values, with their positions [R, H, m]; `rotary` is the model's
    rotary embedding, where the form asked for it, `fixed` what `Form.fit` found for these rows, first [R] the slot of the
    first token, and `fresh` says that they are of a prompt."""

    x: Tensor
    positions: Tensor
    rotary: Rotary | None
    fixed: Mapping[str, Tensor]
    first: Tensor
    fresh: bool = True


class Reading(NamedTuple):
    """Which of the tokens stored are read, and how: the slots ids [B, H', m] (None: all, from the first on), of each row or
    head the first length [B] or [B, H] (None: all), scale and softcap; `where` [B, H, m]: the places of what was moved;
    `probabilities` as of `attention`."""

    ids: Tensor | None
    length: Tensor | None
    scale: float
    softcap: float | None
    where: Tensor | None = None
    probabilities: bool = False


class Stored:
    """Tokens of a body as a form keeps them.

    parts: by name [B, H, m / span, ...], with a span of 1 where tokens were picked one by one; of segments [B, H, S, ...].
    fixed: tensors [B, H, ...] that belong to the row.  slots: places in the body, [m] or [B, H, m].
    segment(span): for a span of `SEGMENT` or `MERGED` the segment that each token belongs to, [B, 1 or H, m].
    """

    def __init__(
        self,
        heads: int,
        parts: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        slots: Tensor,
        segment: Callable[[int], Tensor],
        position: Callable[[], Tensor],
        rotary: Rotary | None,
    ):
        self.heads, self.parts, self.fixed, self.slots, self.rotary = heads, parts, fixed, slots, rotary
        self.segment, self._position = segment, position
        self.ends: Mapping[int, Tensor] = {}  # of neighbouring tokens, by span: where segments end among them, int32 [B, S]

    def to(self, device: torch.device) -> Stored:
        """The same on another device."""
        if self.slots.device == device:
            return self
        parts, fixed = ({name: x.to(device) for name, x in found.items()} for found in (self.parts, self.fixed))
        segment, position = self.segment, self._position
        found = Stored(
            self.heads,
            parts,
            fixed,
            self.slots.to(device),
            lambda span: segment(span).to(device),
            lambda: position().to(device),
            self.rotary,
        )
        found.ends = {span: ends.to(device) for span, ends in self.ends.items()}
        return found

    @cached_property
    def positions(self) -> Tensor:
        """Positions, broadcastable to [B, H, m]."""
        return self._position()

    def of_segment(self, name: str, span: int) -> Tensor:
        """For each token the entry of its segment, [B, H, m, ...], or [B, H, 1, ...] where all have the same."""
        x = self.parts[name]
        if x.shape[2] == 1:
            return x
        segment = self.segment(span).expand(*x.shape[:2], -1)
        index = segment.view(*segment.shape, *[1] * (x.dim() - 3)).expand(*segment.shape, *x.shape[3:])
        return x.gather(2, index)


@dataclass(frozen=True)
class Form(ABC):
    """How the keys, or the values, of a body are kept.

    A form sees whole grains of tokens, never padding, and every row and head for itself (`scope` "head") or every row for
    itself (`scope` "group").  `evict_granularity` and `read_granularity` are the least numbers of neighbouring tokens that
    can be given up, and read, on their own.
    """

    scope: ClassVar[str] = "head"
    read_granularity: ClassVar[int] = 1
    exact: ClassVar[bool] = False  # whether what is read is what was stored, bit for bit
    paged: ClassVar[bool] = False  # whether grains are kept as bytes of any length, in host memory
    needs_rotary: ClassVar[bool] = False
    cold: ClassVar[bool] = False  # whether reading is so slow that it only suits the host tier

    @property
    @abstractmethod
    def spans(self) -> Mapping[str, int]:
        """How many tokens share an entry of each part; `SEGMENT` and `MERGED`: all that were encoded together."""

    @property
    def grain(self) -> int:
        """Tokens that are encoded together, or a multiple of it."""
        return lcm(*(span for span in self.spans.values() if span > 0))  # lcm() is 1

    @property
    def evict_granularity(self) -> int:
        """Tokens that can only be given up together."""
        return self.grain

    @property
    def least(self) -> int:
        """Tokens that a row's first block must have."""
        return self.grain

    @property
    def fitted(self) -> bool:
        """Whether a row's first tokens decide something for later ones."""
        return False

    @property
    def alone(self) -> bool:
        """Whether every token is encoded without any other, so that each can be given up at any time."""
        return set(self.spans.values()) == {1} and not self.fitted

    @property
    def moving(self) -> frozenset[str]:
        """Parts that live in the host tier where there is one: by default those that belong to a single token."""
        return frozenset(name for name, span in self.spans.items() if span == 1)

    def check(self, name: str, d: int) -> None:  # noqa: B027  (most serve any size)
        """Raise RecipeError, in the name of the method `name`, where vectors of size d cannot be kept so."""

    def fit(self, tokens: Tokens) -> dict[str, Tensor]:
        """Tensors [R, H, ...] that a row's first tokens decide for all later ones."""
        return {}

    @abstractmethod
    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """The parts of some tokens: [R, H, m / span, ...] each, [R, H, 1, ...] of a segment."""

    @abstractmethod
    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tokens [B, H, m, d], in the space that `prologue` takes a query to and `epilogue` leads back from: what is
        made of codes in `dtype`, what are numbers already in their own type."""

    def numbers(self, stored: Stored) -> torch.dtype | None:
        """The type of the numbers that are kept; None: `decode` makes them."""
        return None

    def prologue(self, q: Tensor, stored: Stored) -> Tensor:
        """A query [B, Hq, n, d] as stored keys meet it."""
        return q

    def epilogue(self, out: Tensor, stored: Stored) -> Tensor:
        """An output [B, Hq, n, d] of stored values as the model expects it."""
        return out

    def in_place(self, stored: Stored) -> Tensor | Codes | None:
        """All that a body holds as a kernel reads it where it lies; None: it has to be decoded first."""
        return None

    def attend(self, values: Form, q: Tensor, stored: tuple[Stored, Stored], reading: Reading) -> Partial | None:
        """Attention of a query after `prologue` over keys so kept and `values`, read where they lie, before `epilogue`;
        None: there is no kernel for it."""
        k, v = self.in_place(stored[0]), values.in_place(stored[1])
        if k is None or v is None or reading.where is not None:
            return None
        return attend_codes(q, k, v, reading.ids, reading.length, reading.scale, reading.softcap, reading.probabilities)

    def decodes(self, stored: Stored) -> bool:
        """Whether products with what is stored decode it first, so that nothing is lost by doing that at once."""
        return True

    def scores(self, q: Tensor, stored: Stored) -> Tensor:
        """Products q.k [B, Hq, n, m] fp32 with stored keys, q having gone through `prologue`."""
        return grouped(q, self.decode(stored, _MADE[q.is_cuda]).mT)

    def weighted_sum(self, p: Tensor, stored: Stored) -> Tensor:
        """Stored values under weights p [B, Hq, n, m], [B, Hq, n, d] fp32, before `epilogue`."""
        return grouped(p, self.decode(stored))

    def merge(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Several alike segments as one: their parts [1, H, m / span, ...], and [1, H, S, ...] of those that are `MERGED`;
        returns the parts that change, the latter with one entry."""
        raise NotImplementedError

    def to_bytes(self, x: Tensor) -> Tensor:
        """A grain of tokens [H, grain, d] as bytes, in host memory; for forms that are `paged`."""
        raise NotImplementedError

    def from_bytes(self, page: Tensor) -> Tensor:
        """The grain [H, grain, d] of such bytes."""
        raise NotImplementedError

    def draft(self) -> Form:
        """The same store read with fewer bytes, for drafts that are verified later."""
        return self

    @abstractmethod
    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """The card's formula: bytes for a token of one KV head in a segment of n tokens, and where segments are merged of
        `merged` (0: very many), with model values of `itemsize` bytes."""


def grouped(a: Tensor, b: Tensor) -> Tensor:
    """Products of a [B, Hq, n, x] with b [B, H, x, y] of each query head's KV head, [B, Hq, n, y] fp32; on a GPU a is
    rounded to the type of b."""
    batch, q_heads, n, x = a.shape
    heads = b.shape[1]
    rows, b = a.reshape(batch * heads, q_heads // heads * n, x), b.flatten(0, 1)
    if b.is_cuda and b.dtype != torch.float32:
        found = torch.bmm((rows * _ROOM).to(b.dtype), b, out_dtype=torch.float32).div_(_ROOM)
    else:
        found = torch.bmm(rows.float(), b.float())
    return found.view(batch, q_heads, n, -1)


@dataclass(frozen=True)
class Dense(Form):
    """Vectors as the model made them."""

    exact: ClassVar[bool] = True

    @property
    def spans(self) -> Mapping[str, int]:
        """One part."""
        return {"x": 1}

    def encode(self, tokens: Tokens) -> dict[str, Tensor]:
        """As they are."""
        return {"x": tokens.x}

    def decode(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """As they were."""
        return stored.parts["x"]

    def numbers(self, stored: Stored) -> torch.dtype:
        """The model's."""
        return stored.parts["x"].dtype

    def in_place(self, stored: Stored) -> Tensor:
        """As they are."""
        return stored.parts["x"]

    def bytes_per_token(self, d: int, n: int = 0, itemsize: int = 2, merged: int = 0) -> float:
        """d values."""
        return d * itemsize


DENSE = Dense()


def attend(
    forms: tuple[Form, Form],
    q: Tensor,
    stored: tuple[Stored, Stored],
    scale: float,
    visible: Visible = EVERYTHING,
    softcap: float | None = None,
    probabilities: bool = False,
) -> Partial:
    """Attention of q [B, Hq, n, d] over stored tokens, keys and values each in a form of its own; `probabilities` as of
    `attention`."""
    read = prepared(forms, q, stored[0])
    return finished(forms, attend_prepared(forms, read, stored, scale, visible, softcap, probabilities), stored[1])


def attend_in_place(forms: tuple[Form, Form], q: Tensor, stored: tuple[Stored, Stored], reading: Reading) -> Partial | None:
    """`attend` of few query rows over a whole body's parts, none of which is moved or decoded; None: there is no kernel."""
    if _exact(forms) or q.shape[2] > FEW:
        return None
    found = forms[0].attend(forms[1], prepared(forms, q, stored[0]), stored, reading)
    return None if found is None else finished(forms, found, stored[1])


def prepared(forms: tuple[Form, Form], q: Tensor, k: Stored) -> Tensor:
    """A query as stored keys meet it: once, however many pieces are read."""
    return q if _exact(forms) else forms[0].prologue(q.float(), k)


def finished(forms: tuple[Form, Form], part: Partial, v: Stored) -> Partial:
    """The output of all pieces as the model expects it."""
    return part if _exact(forms) else part._replace(out=forms[1].epilogue(part.out, v))


def _exact(forms: tuple[Form, Form]) -> bool:
    return forms[0].exact and forms[1].exact


def attend_prepared(
    forms: tuple[Form, Form],
    q: Tensor,
    stored: tuple[Stored, Stored],
    scale: float,
    visible: Visible = EVERYTHING,
    softcap: float | None = None,
    probabilities: bool = False,
) -> Partial:
    """`attend` between `prepared` and `finished`: what is to be done for each piece."""
    (key, value), (k, v) = forms, stored
    if _exact(forms):
        return attention(q, key.decode(k), value.decode(v), scale, visible, softcap, probabilities=probabilities)
    if q.shape[2] <= FEW and visible.is_length:
        found = key.attend(value, q, stored, Reading(None, visible.length, scale, softcap, probabilities=probabilities))
        if found is not None:
            return found
    if q.shape[2] > FEW or q.is_cuda or probabilities or (key.decodes(k) and value.decodes(v)):
        keys, values = vectors(forms, stored, q.is_cuda)
        room = _ROOM if keys.dtype == torch.float16 else 1.0
        q = (q * room).to(keys.dtype)
        return attention(q, keys, values, scale / room, visible, softcap, probabilities=probabilities)
    p, lse = attend_scores(key.scores(q, k).mul_(scale), visible, softcap, k.heads)
    return Partial(value.weighted_sum(p, v), lse)


def vectors(forms: tuple[Form, Form], stored: tuple[Stored, Stored], on_gpu: bool) -> tuple[Tensor, Tensor]:
    """Keys and values in one type: fp32, or on a GPU the model's where one side has that, else fp16."""
    dtype = _MADE[on_gpu]
    if on_gpu:
        own = (form.numbers(x) for form, x in zip(forms, stored, strict=True))
        dtype = next(filter(None, own), dtype)
    k, v = (form.decode(x, dtype).to(dtype) for form, x in zip(forms, stored, strict=True))
    return k, v


@dataclass(frozen=True)
class Codec(Method):
    """Decides in what form the body is kept; sinks and newest tokens stay dense.

    recent: newest tokens that are always dense where no selector decides.
    """

    exact: ClassVar[bool] = False  # whether what is read is what was stored, bit for bit
    role: ClassVar[str] = "codec"
    lossless_recall: ClassVar[bool] = True  # every token can be read later, if not to the bit

    recent: int = 64

    def __post_init__(self) -> None:
        check_whole(self.name, "recent", self.recent)

    @abstractmethod
    def keys(self) -> Form:
        """How keys are kept."""

    @abstractmethod
    def values(self) -> Form:
        """How values are kept."""

    def forms(self) -> tuple[Form, Form]:
        """How keys and values are kept."""
        return self.keys(), self.values()

    @property
    def grain(self) -> int:
        """Tokens that leave the tail together, or a multiple of it."""
        return lcm(self.keys().grain, self.values().grain)

    def draft(self) -> Codec:
        """The codec under which a draft reads the same store."""
        return self

    def at(self, layer: int, head: int, layers: int) -> Codec | None:
        """The codec of one KV head of one of a model's layers; None: dense."""
        return self

    @property
    def by_head(self) -> bool:
        """Whether heads of a layer may differ."""
        return False

    def members(self) -> tuple[Codec, ...]:
        """Every codec that some layer or head may have."""
        return (self,)

    def within(self, heads: int, d: int) -> Codec:
        """The codec of a group of `heads` KV heads of size d."""
        return self

    def fit(self, layers: int, heads: int, d: int) -> None:
        """Raise RecipeError where a model of this shape cannot be served."""
        for form in self.forms():
            form.check(self.name, d)

    def unlimited(self) -> Self:
        """The same method, under which no token is ever old enough to be encoded."""
        return replace(self, recent=1 << 30)
