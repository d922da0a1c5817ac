"""kv4, kv8 and kv: a scale per token and head; keys and values, layers and heads, each with a codec of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from kvlib.policies.base import RecipeError, check_fraction, register
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import DENSE, Codec, Form
from kvlib.policies.notation import method_of


@register
@dataclass(frozen=True)
class KV4(Codec):
    """Keep every token in 4 bits, with a scale and a least value of its own per head.

    QServe's KV4 (arXiv 2405.04532).  The least value is stored, not a zero point in units of codes, for which fp16 is too
    coarse.
    smooth: exponent of SmoothAttention: key channels are divided by their largest value in the prompt to that power and
        queries multiplied, here without calibration; 0: off (the paper's is 0.5).
    """

    name: ClassVar[str] = "kv4"
    paper: ClassVar[str] = "2405.04532"
    bits: ClassVar[int] = 4

    smooth: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, "smooth", self.smooth)

    def keys(self) -> Form:
        """Codes per token, smoothed."""
        return Uniform(self.bits, smooth=self.smooth)

    def values(self) -> Form:
        """Codes per token."""
        return Uniform(self.bits)


@register
@dataclass(frozen=True)
class KV8(KV4):
    """Keep every token in 8 bits, with a scale and a least value of its own per head.

    QServe's KV8 (arXiv 2405.04532); smooth as for kv4.
    """

    name: ClassVar[str] = "kv8"
    bits: ClassVar[int] = 8


@register
@dataclass(frozen=True)
class KV(Codec):
    """Keep keys and values, layers and heads, each by a codec of its own.

    k, v:   recipes of codecs, such as "kivi(bits=2)", or "full" for dense; v as k unless given.
    recent: newest tokens that are dense, for the exceptions too.
    where:  exceptions, "layers: codec; layers: codec", a layer being a number, a range 0-3 or layer.head, negative ones
        counted from the end: "0-1, -1: full; 5.2: kv8".  The first that fits counts.
    """

    name: ClassVar[str] = "kv"

    k: str = "kv4"
    v: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument in ("k", "v", "where"):
            if not isinstance(getattr(self, argument), str):
                raise RecipeError(self.name, argument, getattr(self, argument), 'give text, such as k="kivi(bits=2)"')
        for argument in ("k", "v"):
            self._codec(argument, getattr(self, argument) or self.k)
        self._exceptions  # noqa: B018  (parsed here, so that mistakes show when the recipe is built)

    def _codec(self, argument: str, text: str) -> Codec | None:
        """The codec written, None for "full"."""
        if text == "full":
            return None
        method = method_of(text)
        if not isinstance(method, Codec) or isinstance(method, KV):
            raise RecipeError(self.name, argument, text, 'give a codec, such as "kivi(bits=2)", or "full"')
        if method.recent != type(method).recent:
            raise RecipeError(self.name, argument, text, f"write kv(..., recent={method.recent}) instead: it holds for all")
        if argument == "v" and method.values() is DENSE:
            raise RecipeError(self.name, argument, text, f'{method.name} leaves values as they are: give "full"')
        return method

    @cached_property
    def _exceptions(self) -> list[tuple[list[tuple[int, int, int | None]], Codec | None]]:
        """For each exception (first layer, last layer, head) of its places, and its codec."""
        found = []
        for clause in filter(None, (part.strip() for part in self.where.split(";"))):
            places, colon, text = clause.partition(":")
            spans = [re.fullmatch(r"\s*(-?\d+)(?:-(\d+)|\.(\d+))?\s*", place) for place in places.split(",")]
            if not colon or not all(spans):
                remedy = 'write "layers: codec; layers: codec", as in "0-1, -1: full; 5.2: kv8"'
                raise RecipeError(self.name, "where", clause, remedy)
            ends = [(int(m[1]), int(m[2] or m[1]), None if m[3] is None else int(m[3])) for m in spans if m]
            for first, last, _ in ends:
                if last != first and not 0 <= first < last:
                    remedy = (
                        "a range counts up from the first layers, as in 0-3; the last ones are written one by one: -2, -1"
                    )
                    raise RecipeError(self.name, "where", clause, remedy)
            codec = self._codec("where", text.strip())
            found.append((ends, codec and replace(codec, recent=self.recent)))
        return found

    def draft(self) -> Codec:
        """Keys and values as their codecs' drafts."""
        codecs = [self._codec(side, text) for side, text in (("k", self.k), ("v", self.v or self.k))]
        k, v = ("full" if codec is None else str(codec.draft()) for codec in codecs)
        return self if (k, v) == (self.k, self.v or self.k) else replace(self, k=k, v=v)

    @property
    def by_head(self) -> bool:
        """Whether an exception names a head."""
        return any(head is not None for places, _ in self._exceptions for _, _, head in places)

    def within(self, heads: int, d: int) -> Codec:
        """Of the keys' codec; values share nothing between heads."""
        codec = self._codec("k", self.k)
        return self if codec is None else replace(self, k=str(codec.within(heads, d)))

    def members(self) -> tuple[Codec, ...]:
        """Itself and the exceptions."""
        return self, *(codec for _, codec in self._exceptions if codec is not None)

    def keys(self) -> Form:
        """As the codec of keys keeps keys."""
        codec = self._codec("k", self.k)
        return DENSE if codec is None else codec.keys()

    def values(self) -> Form:
        """As the codec of values keeps values."""
        codec = self._codec("v", self.v or self.k)
        return DENSE if codec is None else codec.values()

    def at(self, layer: int, head: int, layers: int) -> Codec | None:
        """The first exception that fits, else this codec."""
        for places, codec in self._exceptions:
            for first, last, only in places:
                lo, hi = (x + layers if x < 0 else x for x in (first, last))
                if lo <= layer <= hi and only in (None, head):
                    return codec
        return self

    def fit(self, layers: int, heads: int, d: int) -> None:
        """Also raise where an exception names a layer or a head that the model does not have."""
        for argument in ("k", "v"):
            side = self._codec(argument, getattr(self, argument) or self.k)
            if side is not None:
                side.fit(layers, heads, d)
        for places, codec in self._exceptions:
            for first, last, head in places:
                for layer in (first, last):
                    if not -layers <= layer < layers:
                        raise RecipeError(self.name, "where", layer, f"the model has layers 0 to {layers - 1}")
                if head is not None and head >= heads:
                    raise RecipeError(self.name, "where", head, f"the model has KV heads 0 to {heads - 1}")
            if codec is not None:
                codec.fit(layers, heads, d)
