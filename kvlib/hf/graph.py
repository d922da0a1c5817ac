"""Decode steps of a model as a CUDA graph: recorded between two seals, replayed while memory stays where it is."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlib.hf.cache import Cache
from kvlib.hf.rope import moves, rope_types
from kvlib.steady import Clock, Steady


class CapturedDecode:
    """A model's decode step on a cache, without the host's work: call it with one token per row.

    On a GPU the first step after memory has moved runs as it is and the next is recorded; all others are replayed.  Sealing
    happens on the host between two calls.  On a CPU, which has no graphs, every step runs as it is.

    model: the model `cache` was made for.
    cache: holds the prompt; recipes with a host tier, a codec, or statistics of every step cannot be recorded.

    Raises ValueError, with the reason, for a recipe, a model or a state that cannot be recorded.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache):
        if len(cache.managed) != len(cache.layers):
            raise ValueError(
                "layers with a sliding window or linear attention keep a stock cache, which cannot be recorded"
            )
        if cache.token_ids is not None:
            raise ValueError(f"the recipe {cache.recipe} reads the ids of new tokens at every step: it cannot be recorded")
        if cache.managed[0].store.shape is None:
            raise ValueError("the cache is empty: read the prompt first, model(input_ids, past_key_values=cache)")
        moving = sorted(filter(moves, rope_types(model)))
        if moving:
            raise ValueError(
                f"a rotary embedding of type {moving[0]!r} asks the device for the text's length at every step"
            )
        devices = {layer.store.device for layer in cache.managed}
        if len(devices) > 1:
            raise ValueError(f"the model is spread over {len(devices)} devices, and a graph belongs to one")
        self.model, self.cache, self.device = model, cache, devices.pop()
        self._clock = Clock(self.device)
        self._per_kv = cache.spec.q_heads // cache.spec.kv_heads
        with torch.inference_mode(False):  # so that a step in any mode can write them
            self._ids = torch.zeros(cache.managed[0].batch_size, 1, dtype=torch.int64, device=self.device)
        self._steady: list[Steady] = []
        self._left = 0  # tokens until the host has to look again
        self._position: Tensor | None = None
        self._addresses: tuple[int, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._fresh = True  # whether nothing has run yet since memory moved, so that kernels may have to be compiled
        self.recorded = 0  # graphs so far
        self._prepare()

    def _prepare(self) -> None:
        """Set the counters to what the host knows, and note whether the last recording still holds."""
        self._clock.begin()
        self._steady = [Steady(layer.store, self._clock, self._per_kv) for layer in self.cache.managed]
        self._left = min(steady.steps for steady in self._steady)
        tokens = self.cache.managed[0].store.groups[0].tokens
        self._position = self._clock.counter(tokens[:, None], 1, torch.int64)
        addresses = (self._position.data_ptr(), *(x for steady in self._steady for x in steady.addresses()))
        if addresses != self._addresses:
            self._addresses, self._graph = addresses, None
            self._fresh = True

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Logits [B, vocabulary] after one more token ids [B] or [B, 1] per row; the memory is that of the next call's."""
        if ids.numel() != len(self._ids):
            raise ValueError(f"got {ids.numel()} ids for {len(self._ids)} rows: give one token per row")
        if not self._left:
            self._prepare()
        self._ids.copy_(ids.view(-1, 1))
        if not self._left:  # between two states, such as a window that is just being filled
            return self._eagerly()
        if self._graph is None and self.device.type == "cuda" and not self._fresh:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits, self._fresh = self._step(), False
        self._advance()
        assert self._logits is not None
        return self._logits

    def _eagerly(self) -> Tensor:
        assert self._position is not None
        out = self.model(input_ids=self._ids, position_ids=self._position, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.graph(graph, stream=stream):  # its default is of the device that was current at first use
                self._logits = self._step()
        except torch.AcceleratorError as error:
            raise ValueError(f"this model's step cannot be recorded, it waits for the device: {error}") from error
        self._graph = graph
        self.recorded += 1

    def _step(self) -> Tensor:
        """One step by what is on the device."""
        for layer, steady in zip(self.cache.managed, self._steady, strict=True):
            layer.steady = steady
        try:
            logits = self._eagerly()
        finally:
            for layer in self.cache.managed:
                layer.steady = None
        self._clock.tick()
        return logits

    def _advance(self) -> None:
        """Let the host follow: lengths, and what has become due."""
        self._left -= 1
        for layer, steady in zip(self.cache.managed, self._steady, strict=True):
            layer.seen += 1
            steady.advance()
