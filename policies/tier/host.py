"""Host tier: the body lives in host memory, and the device holds what was read last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvlib.policies.base import Method, RecipeError, check_flag, register

if TYPE_CHECKING:
    from typing_extensions import Self


@register
@dataclass(frozen=True)
class Host(Method):
    """Keep the body in host memory; the device holds sinks, newest tokens and the units read last.

    attend: compute the body's share of attention on the CPU and move the result, instead of moving keys and values.
    slots:  device slots under a selector, as a multiple of its budget (1 or more): the least recently read units leave.
    """

    name: ClassVar[str] = "host"
    role: ClassVar[str] = "tier"
    lossless_recall: ClassVar[bool] = True

    attend: bool = False
    slots: float = 2.0

    def __post_init__(self) -> None:
        check_flag(self.name, "attend", self.attend)
        if isinstance(self.slots, bool) or not isinstance(self.slots, int | float) or self.slots < 1:
            raise RecipeError(self.name, "slots", self.slots, "give a number of budgets, 1 or more")
        if self.attend and self.slots != type(self).slots:
            raise RecipeError(self.name, "slots", self.slots, "attend=True moves no keys to slots: leave it out")

    def unlimited(self) -> Self:
        """The same tier: nothing is ever given up."""
        return self
