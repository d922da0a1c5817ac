"""Decode steps of a cache recorded as one CUDA graph and replayed: append a token, attend, merge; without projections.

Layers hold the same prompt, each in memory of its own, as a model's would: with 32 of them, a step finds nothing of the one
before in the cache.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.kernels.bounds import boxes_moved
from bench.kernels.case import Case, Shape, error
from kvlib.group import HeadGroup
from kvlib.layer import Layer
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.steady import Clock, Steady

_BURST = 32  # steps between two looks at the clock
_ROUNDS = 7
_MOST_ROWS = 8


class Step:
    """Layers after a prompt of random keys and values, and a step that all of them take."""

    def __init__(self, s: Shape, recipe: str, layers: int):
        parsed, k, v = Recipe.parse(recipe), s.keys(), s.keys()
        self.layers = []
        for _ in range(layers):
            group = HeadGroup(parsed.evict, parsed.sizes, selector=parsed.select)
            group.take_in(k, v, None)
            group.finish_prefill()
            self.layers.append(Layer([group], [None]))
        self.s, self.spec, self.clock = s, Spec(s.scale), Clock(s.device)
        self.token = [s.query(), *(s.normal(s.batch, s.heads, 1, s.d) for _ in "kv")]
        self.twin = self.layers[0].copy(None)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out = torch.empty(0)
        self.reset()

    def reset(self) -> None:
        """Back to the first step."""
        self.clock.begin()
        self.steady = [Steady(layer, self.clock, self.s.q_heads // self.s.heads) for layer in self.layers]

    def addresses(self) -> list[tuple[int, ...]]:
        """What a recording refers to."""
        return [steady.addresses() for steady in self.steady]

    def eager(self) -> Tensor:
        """One step."""
        q, k, v = self.token
        for steady in self.steady:
            out = steady.step(q, k, v, self.spec)
        self.clock.tick()
        return out

    def record(self) -> None:
        """Compile what has to be, then record."""
        self.eager()
        self.reset()
        before = self.addresses()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        gc.disable()  # a kernel that is unloaded in the middle of a recording would spoil it
        try:
            with torch.cuda.graph(self.graph):
                self.out = self.eager()
        finally:
            gc.enable()
        self.reset()
        if before != self.addresses():
            raise RuntimeError("memory has moved since the step was recorded")

    def step(self) -> Tensor:
        """One step, recorded where there are graphs."""
        if self.s.device.type != "cuda":
            return self.eager()
        if self.graph is None:
            self.record()
        assert self.graph is not None
        self.graph.replay()
        return self.out

    def off(self, found: Tensor) -> float:
        """How far the last layer's output is from that of an ordinary step of the first one's twin."""
        q, k, v = self.token
        return error(found, self.twin.forward(q, k, v, None, self.spec))

    def time(self) -> tuple[float, bool]:
        """Microseconds per step, the median of some bursts."""
        took = []
        for _ in range(_ROUNDS):
            self.reset()
            steps = min(_BURST, *(steady.steps for steady in self.steady))
            took.append(self._burst(steps) / steps)
        return statistics.median(took), self.graph is not None

    def _burst(self, steps: int) -> float:
        if self.graph is None:
            began = time.perf_counter()
            for _ in range(steps):
                self.eager()
            return 1e6 * (time.perf_counter() - began)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * float(begin.elapsed_time(end))


def cases(s: Shape) -> Iterator[Case]:
    """Everything, sinks and a window of 2,048, Quest's 2,048; one layer and a model's."""
    skip = f"batches up to {_MOST_ROWS}" if s.batch > _MOST_ROWS else ""
    recipes = {
        "full": ("full", s.dense, s.dense),
        "streaming_llm": (f"streaming_llm(sink=4, recent={s.listed - 4})", s.read(s.listed), 0),
        "quest": (f"quest(budget={s.listed})", s.read(s.listed) + boxes_moved(s), s.dense + boxes_moved(s)),
    }
    for layers in (1, s.layers):
        for name, (recipe, moved, held) in recipes.items():

            def make(recipe: str = recipe, layers: int = layers) -> list[tuple[Any, ...]]:
                return [(Step(s, recipe, layers),)]

            def off(given: tuple[Any, ...], found: Tensor) -> float:
                return float(given[0].off(found))

            variant = f"{name}, {layers} layer{'s' if layers > 1 else ''}"
            # A prompt on its way into a layer is there three times; buffers have 6 % of slack.
            room = int(1.1 * layers * held) + 4 * s.dense
            yield Case("steady", variant, make, Step.step, off, 1e-2, layers * moved, room, skip=skip, time=Step.time)
