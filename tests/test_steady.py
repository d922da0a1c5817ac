"""Decode steps that a CUDA graph could replay: between two seals they take nothing from the host but bounds."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from kvlib.group import HeadGroup
from kvlib.kernels.decode import decode
from kvlib.layer import Layer, NewTokens
from kvlib.recipe import Recipe
from kvlib.segment import Spec
from kvlib.steady import Clock, Steady, refusal
from tests.replay import recorded

HEADS, GROUP, D = 2, 3, 16
RECIPES = [
    "full",
    "streaming_llm(sink=4, recent=40)",
    "snapkv(budget=64)",
    "quest(budget=96, page=8)",
    "clusterkv(budget=96, cluster=8)",
]
SPEC = Spec(D**-0.5)


def layer_of(text):
    recipe = Recipe.parse(text)
    return Layer([HeadGroup(recipe.evict, recipe.sizes, selector=recipe.select)], [None])


def chunk(n, rows=2):
    return torch.randn(rows, HEADS * GROUP, n, D), torch.randn(rows, HEADS, n, D), torch.randn(rows, HEADS, n, D)


def prompted(text, n=200, rows=2):
    layer = layer_of(text)
    layer.forward(*chunk(n, rows), None, SPEC)
    layer.finish_prefill()
    return layer


class Driver:
    """Steps of a layer by what was recorded, recorded anew only when something has moved."""

    def __init__(self, layer):
        self.layer, self.clock = layer, Clock(torch.device("cpu"))
        self.q, self.k, self.v = chunk(1)
        self.steady, self.addresses, self.recorder, self.out = None, None, None, None
        self.records = self.replays = 0

    def step(self, q, k, v):
        if self.steady is None or self.steady.steps == 0:
            self.clock.begin()
            self.steady = Steady(self.layer, self.clock, GROUP)
            assert self.steady.steps > 0
        for own, new in ((self.q, q), (self.k, k), (self.v, v)):
            own.copy_(new)
        if self.steady.addresses() == self.addresses:
            self.recorder.replay()
            self.replays += 1
        else:
            self.out, self.recorder = recorded(self._run)
            self.addresses = self.steady.addresses()
            self.records += 1
        left = self.steady.steps
        self.steady.advance()
        self.steady = self.steady if left > 1 else None
        return self.out.clone()

    def _run(self):
        out = self.steady.step(self.q, self.k, self.v, SPEC)
        self.clock.tick()
        return out


@pytest.mark.parametrize("text", RECIPES)
def test_replayed_steps_are_the_steps(text):
    layer = prompted(text)
    twin, driver = deepcopy(layer.copy(None)), Driver(layer)
    for _ in range(150):
        q, k, v = chunk(1)
        expected = twin.forward(q, k, v, None, SPEC)
        torch.testing.assert_close(driver.step(q, k, v), expected, atol=2e-6, rtol=1e-5)
    assert driver.replays > 120 and driver.records <= 12
    assert (layer.kept() == twin.kept()).all()
    assert (layer.groups[0].tokens == twin.groups[0].tokens).all()
    found = layer.forward(*chunk(1), None, SPEC)  # and eager steps go on from there
    assert found.isfinite().all() and int(layer.groups[0].tokens[0]) == 351


def test_rows_of_different_lengths():
    layer = layer_of("full")
    layer.forward(*chunk(90), NewTokens(np.array([90, 37])), SPEC)
    twin, driver = layer.copy(None), Driver(layer)
    for _ in range(20):
        q, k, v = chunk(1)
        torch.testing.assert_close(driver.step(q, k, v), twin.forward(q, k, v, None, SPEC), atol=2e-6, rtol=1e-5)


def test_the_recorder_catches_what_the_host_said():
    """A step that takes its slot from the host is right once and then wrong: the test above can fail."""
    layer = prompted("full")
    tail, twin = layer.groups[0].tail, layer.copy(None)
    q, k, v = chunk(1)

    def step():
        tail.k[:, :, tail.end : tail.end + 1] = k
        tail.v[:, :, tail.end : tail.end + 1] = v
        return decode(q, tail.k[:, :, : tail.end + 1], tail.v[:, :, : tail.end + 1], SPEC.scale)[0]

    out, recorder = recorded(step)
    torch.testing.assert_close(out, twin.forward(q, k, v, None, SPEC))
    for own, new in zip((q, k, v), chunk(1), strict=True):
        own.copy_(new)
    tail.end += 1
    recorder.replay()
    assert not torch.allclose(out, twin.forward(q, k, v, None, SPEC), atol=1e-3)


def test_the_recorder_refuses_to_wait_for_the_device():
    with pytest.raises(AssertionError, match="on the host"):
        recorded(lambda: int(torch.ones(3).sum()))


def test_what_cannot_be_recorded_says_why():
    group = layer_of("h2o(budget=64)").groups[0]
    assert "h2o" in refusal(group)
    layer = prompted("h2o(budget=64)")
    with pytest.raises(ValueError, match="counts attention at every step"):
        Steady(layer, Clock(torch.device("cpu")), GROUP)
