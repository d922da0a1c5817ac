"""Running cases: is the result right, and then how long does it take."""

from __future__ import annotations

import gc
import itertools
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

import kvlib
from bench.kernels.case import Case, Shape

Row = dict[str, Any]
Events = Generator[tuple[str, tuple[int, int], Row], None, None]
_SHARE = 0.6  # of free memory that a case may take
_TOKENS = 8 * 2**20  # of a batch, at most
_LINE = 500  # letters of an error
_SLOW = 20.0  # milliseconds from which a call's launches do not matter


class Job(NamedTuple):
    """The cases of one kernel at one shape; a context of 0: the kernel does not know about contexts."""

    kernel: str
    context: int
    batch: int


def head_of(job: Job) -> Row:
    """What a row begins with."""
    return {"kernel": job.kernel, "variant": "", "context": job.context or None, "batch": job.batch}


def shape_of(job: Job, device: torch.device, cache: int = 0) -> Shape:
    """Llama-3-8B's on a GPU with so large a cache, on a CPU a toy's."""
    if device.type == "cuda":
        return Shape(job.batch, job.context, device, cache)
    return Shape(job.batch, job.context, device, q_heads=4, heads=2, d=32, listed=64, rank=8, layers=2)


def facts(device: torch.device) -> Row:
    """The device, versions, and how fast it copies: bytes read and written per second, and from the host's memory."""
    versions = {"kvlib": kvlib.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cpu":
        copy = _copied(torch.ones(4 << 20), torch.empty(4 << 20))
        return {
            "device": "cpu",
            "versions": versions,
            "cache_bytes": 0,
            "copy_bytes_per_s": 2 * copy,
            "bus_bytes_per_s": copy,
        }
    import triton

    versions |= {"triton": triton.__version__, "cuda": torch.version.cuda or "", "driver": _driver()}
    size = min(1 << 32, torch.cuda.mem_get_info()[0] // 8)
    big = torch.ones(size, dtype=torch.uint8, device=device)
    copy = _copied(big, torch.empty_like(big))
    pinned = torch.ones(min(size, 1 << 29), dtype=torch.uint8, pin_memory=True)
    bus = _copied(pinned, big[: len(pinned)])
    return {
        "device": torch.cuda.get_device_name(device),
        "versions": versions,
        "cache_bytes": torch.cuda.get_device_properties(device).L2_cache_size,
        "copy_bytes_per_s": 2 * copy,
        "bus_bytes_per_s": bus,
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip() or "unknown"


def _copied(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes per second of a copy, the best of ten."""
    best = min(_once(lambda: target.copy_(source, non_blocking=True), target.device) for _ in range(10))
    return source.nbytes / best


def _once(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def timed(case: Case, sets: Sequence[tuple[Any, ...]], device: torch.device, rep: int) -> Row:
    """Microseconds, the median, and whether a CUDA graph was replayed; why not, where recording one failed."""
    if case.time is not None:
        us, graph = case.time(*sets[0])
        return {"us": us, "graph": graph}
    turn = itertools.cycle(sets)

    def call() -> Any:
        return case.run(*next(turn))

    slow = 1000 * _once(call, device) > _SLOW
    if device.type == "cpu" or slow:
        return {"us": 1e6 * statistics.median(_once(call, device) for _ in range(3)), "graph": False}
    from triton.testing import do_bench, do_bench_cudagraph

    gc.collect()
    gc.disable()  # a kernel that is unloaded in the middle of a recording would spoil it
    try:
        return {"us": 1000 * do_bench_cudagraph(call, rep=rep, return_mode="median"), "graph": True}
    except Exception as error:  # whatever cannot be recorded
        torch.cuda.synchronize()
        us = 1000 * do_bench(call, warmup=rep, rep=2 * rep, return_mode="median")
        return {"us": us, "graph": False, "why": _text(error)}
    finally:
        gc.enable()


def measured(case: Case, device: torch.device, known: Row, rep: int) -> Row:
    """What is known of a case afterwards: its time and what follows, or why there is none."""
    if case.skip:
        return {"left_out": case.skip}
    held = max(case.held, case.moved)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if held > _SHARE * free:
            return {
                "left_out": f"its {held / 1e9:.0f} GB are more than {100 * _SHARE:.0f} % of the {free / 1e9:.0f} GB free"
            }
    try:
        sets = case.make()
        off = case.off(sets[0], case.run(*sets[0]))
        if not off <= case.bound:
            return {"error": f"its result is off by {off:.2g}, {case.bound:.2g} is allowed: no time is given"}
        row = timed(case, sets, device, rep)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever a kernel or a compiler raises: the others are to go on
        return {"error": _text(error)}
    speed = case.moved / row["us"] * 1e6
    row |= {"bytes": case.moved, "bytes_per_s": speed, "off": off}
    row |= {"sets": len(sets), "cold": len(sets) * case.moved >= 2 * known["cache_bytes"]}
    row |= {
        "share": speed / known["bus_bytes_per_s" if case.bus else "copy_bytes_per_s"],
        "of": "bus" if case.bus else "copy",
    }
    return row | ({"flops": case.flops, "flops_per_s": case.flops / row["us"] * 1e6} if case.flops else {})


def _forget(device: torch.device) -> None:
    """Give memory back."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _text(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return (
        text if len(text) <= _LINE else f"{text[: _LINE // 3]} ... {text[-2 * _LINE // 3 :]}"
    )  # compilers give the reason last


def cases_of(job: Job, shape: Shape) -> Iterator[Case | Row]:
    """The cases of a job, or a row that says why it has none."""
    if job.context * job.batch > _TOKENS:
        yield {"left_out": f"more than {_TOKENS:,} tokens"}
        return
    try:
        yield from import_module(f"bench.kernels.{job.kernel}").cases(shape)
    except Exception as error:  # a kernel that is not there, or whose file does not load
        yield {"error": _text(error)}


def events(jobs: Sequence[Job], device: torch.device, rep: int, start: tuple[int, int] = (0, 0)) -> Events:
    """What happens, case by case from `start` on, (job, case): "facts" first, then of each case "begin" and "row"."""
    known = facts(device)
    _forget(device)
    yield "facts", start, known
    for i in range(start[0], len(jobs)):
        job = jobs[i]
        for j, case in enumerate(cases_of(job, shape_of(job, device, known["cache_bytes"]))):
            if (i, j) < start:
                continue
            head = head_of(job)
            if isinstance(case, dict):
                yield "row", (i, j), head | case
                continue
            head |= {"kernel": case.kernel, "variant": case.variant} | ({"peer": True} if case.peer else {})
            yield "begin", (i, j), head
            row = head | measured(case, device, known, rep)
            _forget(device)
            yield "row", (i, j), row
