"""Train the tiny model that really retrieves, on documents made on the fly: no data, no downloads.

    .venv/bin/python bench/tiny/train.py --out runs/tiny                   # 2.6M parameters, documents to 4,096 tokens
    .venv/bin/python bench/tiny/train.py --out runs/long --preset long     # 4.7M parameters, to 32,768, on a large GPU

The first takes 24 minutes on two free CPU cores: two processes of one thread, 20M tokens.  Asked again, a command
goes on from its last checkpoint, to the weights an uninterrupted run gives, bit for bit on a CPU.  The second is a plan
whose stages were not timed: cut them to the time there is with --stages.

What to know of the model before using it as evidence: part of its retrieval circuit is laid by construction (see
circuit.py), not learnt; it has no attention sink; and it is weak at questions for all values of a name, because it cannot
tell where the list ends.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from circuit import BLOCKED, build
from documents import QUESTIONS, Batch, ahead, batch
from presets import PRESETS, Preset, Step, schedule, staged
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from saving import export, last_checkpoint, write_checkpoint

from kvlib.eval.grammar import NAMES

LOG_EVERY = 25
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34)}  # keep pages for the next step


def make(preset: Preset, rank: int, step: Step) -> Batch:
    """The batch of one process at one step."""
    size = {"length": step.length, "documents": step.documents}
    share = preset.phases[step.epoch].text_share
    return batch(preset.seed, step.epoch, rank, step.index, **size, text_share=share)


class Learner:
    """A model, its optimisers, and moving averages of its losses and of its accuracy on each kind of question."""

    def __init__(self, preset: Preset):
        self.preset = preset
        self.device = torch.device(preset.device)
        self.model = build(preset.shape, preset.seed).to(self.device).train()
        self.model.set_attn_implementation(BLOCKED if self.device.type == "cpu" else "sdpa")
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.optimisers = [
            torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = (preset.matrix_rate, preset.rate)
        self.parameters = matrices + others
        self.averages: dict[str, float] = {}

    def learn(self, step: Step, made: Batch) -> None:
        """Take one step."""
        phase = self.preset.phases[step.epoch]
        ids = torch.from_numpy(made.ids).to(self.device)
        at = torch.from_numpy(made.at).to(self.device)
        questions = torch.from_numpy(made.questions).to(self.device)
        target, answer = ids[:, 1:].flatten()[at], questions > 0
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[at])  # of no other token: they are most of the memory
        entropy = F.cross_entropy(logits.float(), target, reduction="none")
        losses = [(entropy * part).sum() / part.sum().clamp(min=1) for part in (answer, ~answer)]
        (losses[0] + phase.text_weight * losses[1]).backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * phase.rate(step.index)
            optimiser.step()
            optimiser.zero_grad()
        self._note(losses, logits.argmax(-1) == target, torch.where(target >= NAMES.start, questions, 0))

    def _share_gradients(self) -> None:
        if self.preset.procs == 1:
            return
        gradients = [p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.preset.procs
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _note(self, losses: list[torch.Tensor], right: torch.Tensor, questions: torch.Tensor) -> None:
        """questions: as in a batch, but 0 for separators, which any model soon gets right."""
        seen = {"answer loss": losses[0].item(), "text loss": losses[1].item()}
        right, questions = right.cpu(), questions.cpu()
        for word, name in QUESTIONS.items():
            if (asked := questions == word).any():
                seen[name] = right[asked].float().mean().item()
        for name, value in seen.items():
            self.averages[name] = 0.95 * self.averages.get(name, value) + 0.05 * value

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, and the averages."""
        optimisers = [optimiser.state_dict() for optimiser in self.optimisers]
        return {"model": self.model.state_dict(), "optimisers": optimisers, "averages": self.averages}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.averages = state["averages"]


def train(
    preset: Preset, out: Path, rank: int = 0, workers: int = 0, save_every: int = 200, minutes: float = math.inf
) -> bool:
    """Train from the last checkpoint in `out`, or from the start, and write `out`/model; False where time ran out before.

    Raises ValueError where the checkpoint was made with another preset.
    """
    learner, steps, done, earlier = Learner(preset), schedule(preset.phases), 0, 0.0
    if (last := last_checkpoint(out, preset)) is not None:
        state = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
        learner.restore(state["learner"])
        done, earlier = state["done"], state["seconds"]
    log = out / "log.jsonl"
    if rank == 0 and done < len(steps):
        out.mkdir(parents=True, exist_ok=True)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(lines[: done // LOG_EVERY]))  # what was logged after the checkpoint comes again
    tokens = preset.procs * sum(step.length * step.documents for step in steps[:done])
    began, late = time.monotonic(), False
    with _progress(steps, done, hidden=rank > 0) as progress:
        for step, made in zip(steps[done:], ahead(partial(make, preset, rank), steps[done:], workers), strict=True):
            learner.learn(step, made)
            done, tokens = done + 1, tokens + preset.procs * step.length * step.documents
            seconds = time.monotonic() - began
            late = _agreed(seconds > 60 * minutes, preset.procs)
            if rank == 0:
                line = {"step": done, "length": step.length, "tokens": tokens, "seconds": round(earlier + seconds, 1)}
                if done % LOG_EVERY == 0 or done == len(steps):
                    with log.open("a") as file:
                        file.write(json.dumps(line | {k: round(v, 4) for k, v in learner.averages.items()}) + "\n")
                if done % save_every == 0 or done == len(steps) or late:
                    state = {"done": done, "seconds": earlier + seconds, "learner": learner.state()}
                    write_checkpoint(out, preset, done, state)
                shown = f"step {done}/{len(steps)}, {step.length} tokens"
                progress.update(0, advance=step.work, description=shown, seen=_seen(learner.averages))
            if late:
                break
    if rank == 0 and done == len(steps):
        export(learner.model, out / "model")
    return done == len(steps)


def _progress(steps: list[Step], done: int, hidden: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(16), TimeRemainingColumn(), TextColumn("{task.fields[seen]}")
    progress = Progress(*columns, disable=hidden)
    work = [step.work for step in steps]
    progress.add_task("", total=sum(work), completed=sum(work[:done]), seen="")
    return progress


def _seen(averages: dict[str, float]) -> str:
    return " ".join(f"{name} {averages[name]:.3f}" for name in QUESTIONS.values() if name in averages)


def _agreed(late: bool, procs: int) -> bool:
    """What the first process says: all stop after the same step."""
    if procs == 1:
        return late
    word = torch.tensor(late)
    dist.broadcast(word, 0)
    return bool(word)


def _worker(rank: int, preset: Preset, meeting: str, out: Path, *rest: float) -> None:
    torch.set_num_threads(1)
    if preset.procs > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=preset.procs)
    finished = train(preset, out, rank, *rest)
    if rank == 0:
        print(f"wrote {out / 'model'}" if finished else "the time is up: the same command goes on from here")
    if preset.procs > 1:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log.jsonl and in the end model/")
    parser.add_argument("--preset", choices=PRESETS, default="short")
    parser.add_argument("--stages", help="in place of the preset's: LENGTHxDOCUMENTS:STEPS,... of each phase, phases by /")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda, in place of the preset's")
    parser.add_argument("--procs", type=int, help="data-parallel processes, in place of the preset's")
    parser.add_argument("--workers", type=int, help="processes that make the documents of each; 12 for cuda, else none")
    parser.add_argument("--save-every", type=int, default=200, help="steps from one checkpoint to the next")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop with a checkpoint after so long")
    options = parser.parse_args(arguments)
    preset = replace(PRESETS[options.preset], seed=options.seed)
    preset = replace(preset, device=options.device or preset.device, procs=options.procs or preset.procs)
    try:
        if options.stages:
            preset = replace(preset, phases=staged(preset.phases, options.stages))
        last_checkpoint(options.out, preset)
    except ValueError as error:
        parser.error(str(error))
    workers = (12 if preset.device == "cuda" else 0) if options.workers is None else options.workers
    os.environ.update(ALLOCATOR, OMP_NUM_THREADS="1")  # read when the processes start
    with tempfile.TemporaryDirectory() as folder:
        rest = options.out, workers, options.save_every, options.max_minutes
        torch.multiprocessing.spawn(_worker, (preset, f"{folder}/meeting", *rest), preset.procs)


if __name__ == "__main__":
    main()
