"""Learn which KV heads retrieve: DuoAttention's optimisation, arXiv 2410.10819, for models that fit one device.

Every KV head has one gate alpha.  A student whose heads answer alpha * full + (1 - alpha) * streaming is trained, weights
frozen, to give the hidden states of the full model where passkeys from a long text are repeated; what a head can do
without full attention, the penalty on alpha takes from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlib.group import HeadGroup
from kvlib.hf import Cache
from kvlib.layer import Layer
from kvlib.policies.base import Sizes
from kvlib.policies.heads.table import HeadTable
from kvlib.segment import Spec

WORDS = (
    "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike "
    "november oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDER = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


@dataclass(frozen=True)
class Training:
    """The paper's recipe, at a length and a number of steps a small model can afford on a CPU.

    The paper: steps 2000, length 1000..32000, ten passkeys of 32 words, sink 128, recent 256.
    """

    steps: int = 120
    length: int = 768
    passkeys: int = 3
    words: int = 12
    sink: int = 16
    recent: int = 64
    penalty: float = 0.05
    rate: float = 0.02
    seed: int = 0

    def factor(self, step: int) -> float:
        """Learning rate schedule: a ramp over the first fifth and back over the last."""
        ramp = self.steps / 5
        return min(1.0, max((step + 1) / ramp, 0.1), max((self.steps - step) / ramp, 0.1))


class _Recorded(Layer):
    """Full attention whose head outputs are kept for the student."""

    def __init__(self) -> None:
        super().__init__([HeadGroup(None, Sizes())], [None])
        self.out: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, new: Any, spec: Spec, *rest: Any, **more: Any) -> Tensor:
        """Attend densely and remember."""
        self.out = super().forward(q, k, v, new, spec, *rest, **more)
        return self.out


class _Gated(Layer):
    """The student's heads: the teacher's output and their own streaming attention, mixed by the gates."""

    def __init__(self, gates: Tensor, teacher: Tensor, visible: Tensor):
        super().__init__([HeadGroup(None, Sizes())], [None])
        self.gates, self.teacher, self.visible = gates, teacher, visible

    def forward(self, q: Tensor, k: Tensor, v: Tensor, new: Any, spec: Spec, *rest: Any, **more: Any) -> Tensor:
        """Mix; differentiable in the gates and the inputs."""
        group = q.shape[1] // k.shape[1]
        s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * spec.scale
        if spec.softcap is not None:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        s = s.masked_fill(~self.visible, float("-inf"))
        if spec.sinks is not None:
            s = torch.cat([s, spec.sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
        streamed = s.softmax(-1)[..., : k.shape[2]] @ v.repeat_interleave(group, 1)
        gate = self.gates.repeat_interleave(group).view(1, -1, 1, 1)
        return gate * self.teacher + (1 - gate) * streamed


def identify(
    model: Any,
    examples: Iterator[tuple[Tensor, Tensor]],
    training: Training,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> HeadTable:
    """Learn the gates of a model in eval mode from (ids [1, n], labelled bool [n]) examples.

    `labelled` marks the positions whose final hidden states must be kept.  `progress(step, loss)` is called after each
    step.  Layers that keep their stock cache have gate 1.
    """
    cache = Cache(model, "full")
    shape = (cache.spec.layers, cache.spec.kv_heads)
    gates = torch.ones(shape, device=model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([gates], lr=training.rate, weight_decay=0.0)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    try:
        for step in range(training.steps):
            for group in optimiser.param_groups:
                group["lr"] = training.rate * training.factor(step)
            with torch.no_grad():
                gates.clamp_(0, 1)
            ids, labelled = next(examples)
            loss = _loss(model, gates, ids.to(model.device), labelled.to(model.device), training)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            progress(step, float(loss.detach()))
    finally:
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)
    learnt = gates.detach().clamp(0, 1).cpu().double().numpy()
    learnt[~cache.managed_layers] = 1.0
    header = {"model": cache.spec.family, "sink": training.sink, "recent": training.recent, "steps": training.steps}
    return HeadTable(learnt, "duo_attention optimisation", header)


def _loss(model: Any, gates: Tensor, ids: Tensor, labelled: Tensor, training: Training) -> Tensor:
    """Distance of the student's hidden states from the full model's at the labelled positions, and the penalty."""
    n = ids.shape[1]
    with torch.no_grad():
        full = Cache(model, "full")
        for layer in full.managed:
            layer.store = _Recorded()
        target = model.base_model(input_ids=ids, past_key_values=full, use_cache=True).last_hidden_state
    row, key = torch.arange(n, device=ids.device)[:, None], torch.arange(n, device=ids.device)
    visible = (key <= row) & ((key > row - training.recent) | (key < training.sink))
    student = Cache(model, "full")
    for layer, taught in zip(student.managed, full.managed, strict=True):
        assert isinstance(taught.store, _Recorded)
        assert taught.store.out is not None
        layer.store = _Gated(gates[layer.index], taught.store.out, visible)
    hidden = model.base_model(input_ids=ids, past_key_values=student, use_cache=True).last_hidden_state
    distance = (hidden - target)[0, labelled].float().square().mean()
    loss: Tensor = distance + training.penalty * gates.abs().mean()
    return loss


def passkeys(tokenizer: Any, text: str, training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless examples: passkeys hidden in `text` at random depths, then asked for; the answers are labelled.

    Raises ValueError where the length leaves no room for the passkeys.
    """
    rng = random.Random(training.seed)
    hay = tokenizer(text, add_special_tokens=False).input_ids

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False).input_ids
        return ids

    while True:
        keys = [" ".join(rng.choices(WORDS, k=training.words)) for _ in range(training.passkeys)]
        needles = [
            encode(f"\nRemember this: it's the {o} passkey to the vault: {key}.\n")
            for o, key in zip(ORDER, keys, strict=False)
        ]
        questions = [
            (encode(f"\nQ: What is the {o} passkey to the vault?\nA:"), encode(" " + key))
            for o, key in zip(ORDER, keys, strict=False)
        ]
        asked = sum(len(q) + len(a) for q, a in questions)
        room = training.length - asked - sum(map(len, needles)) - 1
        if room < len(needles) or len(hay) < room:
            raise ValueError(
                f"length={training.length} leaves {room} tokens of text (of {len(hay)}) around {training.passkeys} "
                f"passkeys of {training.words} words: give a greater length, fewer or shorter passkeys, or a longer text"
            )
        start = rng.randrange(len(hay) - room + 1)
        depths = sorted(rng.uniform(0.05, 0.95) for _ in needles)
        ids, at = [tokenizer.bos_token_id or hay[0]], 0
        for depth, needle in zip(depths, needles, strict=True):
            ids += hay[start + at : start + int(depth * room)] + needle
            at = int(depth * room)
        ids += hay[start + at : start + room]
        labelled = [False] * len(ids)
        for question, answer in questions:
            ids += question + answer
            labelled += [False] * len(question) + [True] * len(answer)
        yield torch.tensor([ids]), torch.tensor(labelled)
