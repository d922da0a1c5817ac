"""Measuring in a process of its own: a kernel that reads where it may not, or never ends, takes only that one down."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.kernels.measure import Events, Job, events, head_of

PATIENCE = 150.0  # seconds for one case, compilers included, and for a process to begin


def isolated(jobs: Sequence[Job], device: str, rep: int, method: str = "spawn", patience: float = PATIENCE) -> Events:
    """`events`, from as many processes as it takes: where one ends before its time, its case is an error, and the next
    process goes on with the case after it."""
    context: Any = multiprocessing.get_context(method)
    start = (0, 0)
    while start[0] < len(jobs):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(there, jobs, device, rep, start))
        process.start()
        there.close()
        last, why = None, ""
        try:
            while not why:
                if not here.poll(PATIENCE if last is None else patience):
                    why = f"nothing came for {patience:.0f} seconds"
                    continue
                message = here.recv()
                if message is None:
                    return
                last = message
                yield message
        except EOFError:
            process.join()
            why = f"the process ended with code {process.exitcode}"
        finally:
            process.kill()
            process.join(PATIENCE)
        if last is None:
            raise RuntimeError(f"nothing could be measured: {why}")
        kind, place, head = last
        if kind == "facts":
            head = head_of(jobs[place[0]])
            start = (place[0] + 1, 0)
        else:
            start = (place[0], place[1] + 1)
        if kind != "row":
            yield "row", place, head | {"error": why}


def _serve(pipe: Connection, jobs: Sequence[Job], device: str, rep: int, start: tuple[int, int]) -> None:
    """Send what happens, and None in the end; end early where the device takes no more calls."""
    import torch

    for event in events(jobs, torch.device(device), rep, start):
        pipe.send(event)
        if device != "cpu" and "error" in event[2]:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                pipe.close()
                os._exit(1)
    pipe.send(None)
