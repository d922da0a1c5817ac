"""StreamingLLM: attention sinks and a rolling window, arXiv 2309.17453 (ICLR 2024)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from kvlib.policies.base import Evictor, RecipeError, Sizes, Split, View, check_flag, check_whole, register

if TYPE_CHECKING:
    from typing_extensions import Self

UNLIMITED = 2**40


@register
@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Keep the first tokens, where attention dumps its mass, and a window of the newest; drop everything between.

    sink:   first tokens of every sequence that stay.
    recent: newest tokens a query sees, its own included.
    exact:  True limits prompt queries to sink + recent as well, so that any chunking of the prompt gives the same and
            memory never exceeds the window; False lets a prompt chunk read all that is held and itself, densely.

    Tokens keep their true rotary positions (the paper's slot positions matter only beyond the trained context).
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "2309.17453"
    when: ClassVar[Literal["online", "prefill_end"]] = "online"
    bodiless: ClassVar[bool] = True

    sink: int = 4
    recent: int = 2000
    exact: bool = False

    def __post_init__(self) -> None:
        check_whole(self.name, "sink", self.sink)
        check_whole(self.name, "recent", self.recent, 1)
        check_flag(self.name, "exact", self.exact)

    @property
    def chunk_invariant(self) -> bool:  # type: ignore[override]
        """Only where prompt queries see what a decode query sees."""
        return self.exact

    def evicts(self) -> bool:
        """Whether the window ends."""
        return self.recent < UNLIMITED

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """sink | nothing | recent, and a block that waits unseen until it is dropped."""
        if sizes.sink is not None or sizes.recent is not None:
            what, value = ("sink", sizes.sink) if sizes.sink is not None else ("recent", sizes.recent)
            raise RecipeError("recipe", what, value, f"streaming_llm has its own: write streaming_llm({what}={value})")
        block = min(16, max(1, self.recent // 4)) if sizes.block is None else sizes.block
        full = np.full_like(seen, 1)
        return Split(full * self.sink, full * self.recent, full * block, full * 0)

    def band(self, prompt: bool) -> tuple[int | None, int]:
        """sink + recent, for decode queries and where `exact` for prompt queries."""
        return (None, 0) if prompt and not self.exact else (self.recent, self.sink)

    def keep(self, view: View, rankable: Tensor, body: Tensor) -> Tensor:
        """Nothing stays between the sink and the window."""
        return torch.zeros_like(rankable)

    def unlimited(self) -> Self:
        """The same method with an endless window."""
        return dataclasses.replace(self, recent=UNLIMITED)
