"""What the kernels reach of a GPU's memory bandwidth, beside others' kernels, and what a recorded decode step takes.

    python -m bench.bench_gpu --out bench/results

One layer of Llama-3-8B's shape (32 query and 8 KV heads of 128, bfloat16), random data.

check:   each case is compared with its torch reference, for the last sequence of the very shape that is timed, and has no
         time where it is off.
time:    median microseconds, of a CUDA graph's replays (`graph`), through so many `sets` of inputs that none is still in
         the cache when its turn comes (`cold`).
share:   bytes that a call must move, per second, of what a plain copy reads and writes per second; `bus`: of a copy from
         page-locked memory.
errors:  kernels run in a process of their own, so that one that fails, crashes or hangs is a row with an error, and the
         others go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.kernels.measure import Job, Row, events, head_of
from bench.kernels.report import draw, target_table, time_table
from bench.kernels.worker import isolated

KERNELS = (  # in the order in which they are missed, should time run out
    "decode",
    "decode_q4",
    "merge",
    "selection",
    "steady",
    "decode_gear",
    "decode_lowrank",
    "bounds",
    "rank",
    "listing",
    "pack",
    "unpack",
    "expand",
    "column_mass",
    "prefill_sparse",
    "kmeans",
    "gather_host",
)
CONTEXTS = {"cuda": (8192, 32768, 131072, 1048576), "cpu": (128, 256)}
BATCHES = {"cuda": (1, 8, 32), "cpu": (1, 2)}
QUICK = {"cuda": ((32768, 131072), (8,)), "cpu": ((128, 256), (2,))}
RESULTS = Path("bench/results")


def numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    return tuple(int(part) for part in text.split(","))


def jobs_of(kernels: Sequence[str], contexts: Sequence[int], batches: Sequence[int]) -> list[Job]:
    """Kernel by kernel; those that know no context once per batch."""
    jobs = []
    for kernel in kernels:
        lengths = contexts if _by_context(kernel) else (0,)
        jobs += [Job(kernel, context, batch) for batch in batches for context in lengths]
    return jobs


def _by_context(kernel: str) -> bool:
    try:
        return getattr(import_module(f"bench.kernels.{kernel}"), "BY_CONTEXT", True)
    except Exception:  # it is a row with the error, later
        return True


def run(jobs: Sequence[Job], device: str, rep: int, minutes: float, console: Console) -> Iterator[Row]:
    """The report, as it grows, after every case."""
    report: Row = {"rows": []}
    stream = isolated(jobs, device, rep) if device == "cuda" else events(jobs, torch.device(device), rep)
    stop = time.monotonic() + 60 * minutes
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=len(jobs))
        for kind, (job, _), row in stream:
            if kind == "facts":
                report = row | {"rows": report["rows"]}
            elif kind == "begin":
                progress.update(task, completed=job, description=_named(row))
            else:
                report["rows"].append(row)
                yield report
            if time.monotonic() > stop:
                report["rows"] += [head_of(left) | {"left_out": f"{minutes:g} minutes were over"} for left in jobs[job:]]
                break
    stream.close()
    yield report


def _named(row: Row) -> str:
    name = f"{row['kernel']}: {row['variant']}" if row["variant"] else row["kernel"]
    at = "" if row["context"] is None else f" at {row['context']:,}"
    return f"{name}{at}, batch {row['batch']}"


def show(report: Row, console: Console) -> int:
    """Print it; returns how many of our own cases failed."""
    rows = report["rows"]
    console.print(time_table(rows))
    failed: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            failed.setdefault(row["error"], []).append(_named(row))
    for why, names in failed.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"{names[0]}{more}: {why}", style="red", markup=False)
    left = sum("left_out" in row for row in rows)
    copy, bus = (report.get(f"{of}_bytes_per_s", 0.0) / 1e9 for of in ("copy", "bus"))
    console.print(f"{report.get('device')}: copies {copy:,.0f} GB/s, from the host {bus:,.0f} GB/s; {left} cases left out")
    console.print(target_table(rows))
    return sum("error" in row and not row.get("peer") for row in rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="kernels, separated by commas")
    parser.add_argument("--contexts", type=numbers, help="tokens, separated by commas")
    parser.add_argument("--batches", type=numbers)
    parser.add_argument("--out", type=Path, help="folder of the JSON and the picture")
    parser.add_argument("--quick", action="store_true", help="two contexts, one batch")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further case begins")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to see that it runs")
    parser.add_argument("--draw", type=Path, help="only draw such a JSON file again")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw; 1 where a kernel failed."""
    args, console = parse(argv), Console(width=150)
    if args.draw:
        draw(json.loads(args.draw.read_text()), args.draw.with_suffix(".png"))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: --device cpu shows that this runs", file=sys.stderr)
        return 1
    contexts, batches = QUICK[args.device] if args.quick else (CONTEXTS[args.device], BATCHES[args.device])
    kernels = args.only.split(",") if args.only else KERNELS
    jobs = jobs_of(kernels, args.contexts or contexts, args.batches or batches)
    out = args.out or (RESULTS if args.device == "cuda" else None)
    date = time.strftime("%Y-%m-%d")
    command = " ".join(["python -m bench.bench_gpu", *(sys.argv[1:] if argv is None else argv)])
    report: dict[str, Any] = {"rows": []}
    path = None
    for report in run(jobs, args.device, 5 if args.quick else 10, args.minutes, Console(stderr=True)):
        if out is not None and "device" in report:
            out.mkdir(parents=True, exist_ok=True)
            slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
            path = out / f"{slug}-{date}.json"
            report = {"command": command, "date": date, **report}
            path.write_text(json.dumps(report, indent=1) + "\n")
    failed = show(report, console)
    if path is not None and any("us" in row for row in report["rows"]):
        picture(report, path, console)
    return 1 if failed else 0


def picture(report: Row, path: Path, console: Console) -> None:
    """Draw it beside its JSON, where there is something to draw with."""
    if find_spec("matplotlib") is None:
        console.print(f"matplotlib is not installed: draw it elsewhere, python -m bench.bench_gpu --draw {path}")
        return
    draw(report, path.with_suffix(".png"))


if __name__ == "__main__":
    raise SystemExit(main())
