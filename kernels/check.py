"""Compile every Triton kernel for GPUs that are not there, and print what each would need: `python -m kvlib.kernels.check`.

The static roofline is what the instructions of the main loop could ask of memory, were nothing else in the way: a kernel
below the bytes per clock that an H200's memory feeds (16.5 for each multiprocessor) cannot reach its speed.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvlib.kernels.aot import Needs, compiling, naming, needs
from kvlib.kernels.launch import Example

MODULES = (
    "decode",
    "decode_q4",
    "decode_gear",
    "merge",
    "pack",
    "unpack",
    "expand",
    "gather_host",
    "bounds",
    "selection",
    "kmeans",
    "decode_lowrank",
    "column_mass",
    "prefill_sparse",
)
CAPABILITIES = (80, 90)
FEEDS = 16.5  # bytes per clock and multiprocessor: 4.3e12 / 132 / 1.98e9 of an H200


def examples(module: str, every: bool) -> list[Example]:
    """What a module wants compiled: all of it, or the first launch of each kernel."""
    found = list(import_module(f"kvlib.kernels.{module}").examples())
    if every:
        return found
    known: set[str] = set()
    chosen = []
    for example in found:
        with naming() as names:
            example.launch()
        if not known.issuperset(names):
            chosen.append(example)
        known.update(names)
    return chosen


def check(example: Example, capability: int) -> list[tuple[str, Needs]]:
    """The kernels that a launch compiles for a compute capability, and their needs."""
    with compiling(capability) as found:
        example.launch()
    return [(name, needs(kernel, capability)) for name, kernel in dict(found).items()]


def main(
    every: Annotated[bool, typer.Option("--all", help="Every configuration, not only the first of each kernel.")] = False,
    only: Annotated[str, typer.Option(help="Modules to check, separated by commas.")] = ",".join(MODULES),
    out: Annotated[Path | None, typer.Option(help="Also write the table there, as JSON.")] = None,
) -> None:
    """Print the table; exit 1 where a kernel spills registers or does not compile."""
    console = Console(width=150)
    table = Table(title=f"triton {triton.__version__}, no GPU: static figures", title_justify="left")
    for column in ("kernel", "launch", "sm", "registers", "spilled", "shared", "warps", "blocks/SM", "loop", "B/clk/SM"):
        table.add_column(column, justify="left" if column in ("kernel", "launch") else "right")
    rows: list[dict[str, Any]] = []
    jobs = [(m, e, c) for m in only.split(",") for e in examples(m, every) for c in CAPABILITIES]
    failed = 0
    for module, example, capability in track(jobs, "compiling", console=Console(stderr=True), transient=True):
        try:
            found = check(example, capability)
        except Exception as error:  # whatever a compiler raises: the table is to show all that fail
            failed += 1
            table.add_row(module, example.name, str(capability), f"[red]{type(error).__name__}: {str(error)[-200:]}[/red]")
            continue
        for name, need in found:
            tile = (example.tile or {}).get(name)
            rate = need.bytes_per_clock(tile) if tile and need.loop else None
            failed += need.spilled > 0
            rows.append({"kernel": name, "launch": example.name, "sm": capability, **vars(need), "bytes_per_clock": rate})
            figures = (need.registers, need.spilled, need.shared, need.warps, need.blocks, need.loop)
            shown = [str(x) for x in figures]
            shown[1] = f"[red]{shown[1]}[/red]" if need.spilled else shown[1]
            table.add_row(name, example.name, str(capability), *shown, "" if rate is None else f"{rate:.1f}")
    console.print(table)
    console.print(f"An H200's memory feeds {FEEDS} B/clk/SM. {failed or 'No'} failures.")
    if out is not None:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        out.write_text(json.dumps({"measured": "static, no GPU", **versions, "rows": rows}, indent=1) + "\n")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
