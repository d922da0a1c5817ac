"""A window of the newest tokens whose older part can be encoded, and AccLLM: such a window in 4 bits, arXiv 2505.03745."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from kvlib.policies.base import BudgetedEvictor, Composition, Method, Sizes, Split, View, check_whole, register, shares
from kvlib.policies.codec.kv import KV4


@register
@dataclass(frozen=True)
class Window(BudgetedEvictor):
    """Keep the first tokens and the newest, as many as the budget allows.

    What `streaming_llm` keeps, with all but the very newest tokens in the body, where a codec can encode them.
    """

    name: ClassVar[str] = "window"
    when: ClassVar[Literal["online", "prefill_end"]] = "online"
    chunk_invariant: ClassVar[bool] = False

    def score(self, view: View) -> Tensor:
        """The newer the better."""
        return view.positions.float()

    def split(self, seen: np.ndarray, sizes: Sizes) -> Split:
        """A few dense tokens, the rest of the budget in the body."""
        return shares(self.tokens(seen), sizes, block=16, recent=64)


@register
@dataclass(frozen=True)
class AccLLM(Composition):
    """Keep the first tokens dense and a window of the newest in 4 bits, so that memory stays constant.

    The cache of AccLLM, arXiv 2505.03745: `window + kv4`.  Its prompt is dense, and tokens keep their true positions.
    sink, window: first tokens kept dense, and newest tokens kept; the paper gives neither.
    """

    name: ClassVar[str] = "accllm"
    paper: ClassVar[str] = "2505.03745"

    sink: int = 4
    window: int = 4092

    def __post_init__(self) -> None:
        check_whole(self.name, "sink", self.sink)
        check_whole(self.name, "window", self.window, 8)
        self.parts()

    def parts(self) -> tuple[Method, ...]:
        """Evictor and codec."""
        return Window(budget=self.sink + self.window), KV4()
