"""What decides the weights of the tiny models: their sizes, their stages and their learning rates."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from circuit import Shape


@dataclass(frozen=True)
class Phase:
    """Stages on fresh data that share the weight of text and one course of the learning rate.

    stages: (length, documents per process, steps).  The rate rises over `warmup` steps and follows a cosine to the share
    `end` of itself.  Loss is taken on every answer and on `text_share` of the text, which counts `text_weight`.
    """

    stages: tuple[tuple[int, int, int], ...]
    warmup: int
    end: float
    text_share: float
    text_weight: float

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step of this phase."""
        cosine = (1 + math.cos(math.pi * step / sum(steps for *_, steps in self.stages))) / 2
        return min(1.0, (step + 1) / self.warmup) * (self.end + (1 - self.end) * cosine)


@dataclass(frozen=True)
class Preset:
    """All that decides the weights."""

    phases: tuple[Phase, ...]
    shape: Shape = field(default_factory=Shape)
    matrix_rate: float = 0.01
    rate: float = 2e-3  # of embeddings and norms
    device: str = "cpu"
    procs: int = 2
    seed: int = 0


PRESETS = {
    "short": Preset(
        (
            Phase(((256, 16, 300), (512, 8, 808)), warmup=30, end=1.0, text_share=0.15, text_weight=0.2),
            Phase(
                ((512, 8, 100), (1024, 4, 500), (2048, 2, 500), (4096, 1, 250)),
                warmup=10,
                end=0.03,
                text_share=0.25,
                text_weight=0.4,
            ),
        )
    ),
    "long": Preset(
        (
            Phase(
                ((512, 128, 600), (2048, 32, 800), (4096, 16, 800)),
                warmup=50,
                end=1.0,
                text_share=0.15,
                text_weight=0.2,
            ),
            Phase(
                ((8192, 8, 800), (16384, 4, 600), (32768, 2, 500)),
                warmup=30,
                end=0.03,
                text_share=0.15,
                text_weight=0.5,
            ),
        ),
        Shape(hidden=384, heads=8, theta=1e9, positions=65536, span=8192),
        device="cuda",
        procs=1,
    ),
}


@dataclass(frozen=True)
class Step:
    """One step: number `index` of phase number `epoch`."""

    epoch: int
    index: int
    length: int
    documents: int

    @property
    def work(self) -> float:
        """In tokens of a short document; attention takes as long as the rest at about 2,000."""
        return self.documents * self.length * (1 + self.length / 2000)


def schedule(phases: tuple[Phase, ...]) -> list[Step]:
    """Every step of a run, in order."""
    steps = []
    for epoch, phase in enumerate(phases):
        sizes = [(length, documents) for length, documents, count in phase.stages for _ in range(count)]
        steps += [Step(epoch, index, *size) for index, size in enumerate(sizes)]
    return steps


def staged(phases: tuple[Phase, ...], text: str) -> tuple[Phase, ...]:
    """The phases with other stages: LENGTHxDOCUMENTS:STEPS separated by commas, phases by slashes.

    Raises ValueError where the text is not that.
    """
    stage = r"([1-9]\d*)x([1-9]\d*):([1-9]\d*)"
    found = [[re.fullmatch(stage, one) for one in phase.split(",")] for phase in text.split("/")]
    if len(found) != len(phases) or not all(map(all, found)):
        raise ValueError(
            f"stages {text!r} should be LENGTHxDOCUMENTS:STEPS,... for each of {len(phases)} phases, with / between"
        )
    numbers = [tuple(tuple(map(int, one.groups())) for one in phase) for phase in found]
    return tuple(replace(phase, stages=stages) for phase, stages in zip(phases, numbers, strict=True))
