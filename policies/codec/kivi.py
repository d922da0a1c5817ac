"""KIVI: keys quantised per channel, values per token, the newest tokens dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlib.policies.base import RecipeError, check_whole, register
from kvlib.policies.codec.uniform import Uniform
from kvlib.policies.encoding import Codec, Form

BITS = (2, 4, 8)


def check_bits(method: str, argument: str, value: object, known: tuple[int, ...] = BITS) -> None:
    """Raise RecipeError unless `value` is one of the bit widths `known`."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in known:
        raise RecipeError(method, argument, value, f"give one of {', '.join(map(str, known))}")


@register
@dataclass(frozen=True)
class Kivi(Codec):
    """Quantise keys per channel and values per token, because keys have a few large channels and values have none.

    KIVI, arXiv 2402.02750.  Codes lie token by token, so that one token is readable; keys leave the tail `group` at a time.
    bits:   of keys and values; k_bits and v_bits where they differ (0: bits).
    group:  tokens of a channel that share a range of keys, channels of a token that share one of values (at most the head);
        0: all tokens that are encoded together, and the whole head (GEAR's KCVT).
    recent: newest tokens that are dense, the paper's R.
    """

    name: ClassVar[str] = "kivi"
    paper: ClassVar[str] = "2402.02750"

    recent: int = 128
    bits: int = 2
    k_bits: int = 0
    v_bits: int = 0
    group: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.name, "bits", self.bits)
        for side in ("k_bits", "v_bits"):
            if getattr(self, side) or isinstance(getattr(self, side), bool):
                check_bits(self.name, side, getattr(self, side))
        check_whole(self.name, "group", self.group)
        if self.group == 1:
            raise RecipeError(self.name, "group", 1, "a group of one has no range: give 2 or more, or 0")

    def keys(self) -> Form:
        """Per channel."""
        return Uniform(self.k_bits or self.bits, self.group, per_channel=True)

    def values(self) -> Form:
        """Per token."""
        return Uniform(self.v_bits or self.bits, self.group)
