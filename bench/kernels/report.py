"""Results as tables and a picture, and what the project wants of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from bench.kernels.measure import Row

_BATCH = 8  # of what is drawn, where it was measured
_COMPUTES = 200  # operations per byte from which arithmetic is what takes the time


class Target(NamedTuple):
    """What is wanted, at which batch, what was found, and whether that is enough; None: it was not measured."""

    wanted: str
    batch: int | None
    found: str
    met: bool | None


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """The project's, for each batch that was measured."""
    batches = sorted({row["batch"] for row in rows})
    timed = [row for row in rows if "us" in row]
    yield _target("dense decode: 85 % of copy bandwidth from 32k tokens on", _BATCH, _dense(timed, _BATCH), 0.85)
    for batch in batches:
        wanted = "4-bit decode: 2.5 times as fast as bf16's at 128k tokens"
        yield _target(
            wanted,
            batch,
            _faster(timed, batch, lambda row: row["kernel"] == "decode_q4" and "4 bits" in row["variant"]),
            2.5,
        )
    for batch in batches:
        wanted = "Quest, 2,048 of 128k tokens: 8 times as fast as dense decode"
        yield _target(wanted, batch, _faster(timed, batch, lambda row: row["kernel"] == "selection"), 8.0)
    for batch in batches:
        merges = [
            row["us"] for row in timed if row["kernel"] == "merge" and row["batch"] == batch and "parts" in row["variant"]
        ]
        found = f"{max(merges):.1f} us" if merges else "not measured"
        yield Target("merge of up to 8 parts: less than 10 us", batch, found, max(merges) < 10 if merges else None)
    steps = [row for row in rows if row["kernel"] == "steady" and "left_out" not in row]
    good = [row.get("graph", False) for row in steps]
    found = f"{sum(good)} of {len(good)} replayed" if steps else "not measured"
    yield Target("a decode step is recorded and replayed as a CUDA graph", None, found, all(good) if steps else None)


def _target(wanted: str, batch: int, found: float | None, least: float) -> Target:
    if found is None:
        return Target(wanted, batch, "not measured", None)
    return Target(wanted, batch, f"{100 * found:.0f} %" if least < 1 else f"{found:.1f} times", found >= least)


def _dense(rows: Sequence[Row], batch: int) -> float | None:
    long = [row["share"] for row in rows if is_dense(row) and row["batch"] == batch and row["context"] >= 32768]
    return min(long, default=None)


def is_dense(row: Row) -> bool:
    """Whether this is our own decode attention over whole sequences."""
    return (row["kernel"], row["variant"]) == ("decode", "range")


def _faster(rows: Sequence[Row], batch: int, what: Callable[[Row], bool]) -> float | None:
    """How many times as fast as dense decode its fastest variant is, at 128k tokens."""
    here = [row for row in rows if (row["batch"], row["context"]) == (batch, 131072)]
    dense = [row["us"] for row in here if is_dense(row)]
    others = [row["us"] for row in here if what(row)]
    return dense[0] / min(others) if dense and others else None


def target_table(rows: Sequence[Row]) -> Table:
    """What is wanted, and yes or no."""
    table = Table(title="Targets", title_justify="left")
    for column in ("target", "batch", "found", "met"):
        table.add_column(column)
    for wanted, batch, found, met in targets(rows):
        said = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "-"}[met]
        table.add_row(wanted, "" if batch is None else str(batch), found, said)
    return table


def _drawn_batch(rows: Sequence[Row]) -> int:
    batches = {row["batch"] for row in rows}
    return _BATCH if _BATCH in batches or not batches else max(batches)


def time_table(rows: Sequence[Row]) -> Table:
    """Microseconds by kernel and context at one batch, and the share of bandwidth."""
    batch = _drawn_batch(rows)
    here = [row for row in rows if row["batch"] == batch and row["variant"]]
    contexts = sorted({row["context"] for row in here if row["context"]})
    table = Table(title=f"us, and % of bandwidth, batch {batch}", title_justify="left")
    table.add_column("kernel")
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for kernel, variant in dict.fromkeys((row["kernel"], row["variant"]) for row in here):
        found = {row["context"]: row for row in here if (row["kernel"], row["variant"]) == (kernel, variant)}
        cells = [_cell(found.get(context) or found.get(None)) for context in contexts]
        table.add_row(f"{kernel}: {variant}", *(cells[:1] + [""] * (len(cells) - 1) if None in found else cells))
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "us" not in row:
        return "left out" if "left_out" in row else "[red]error[/red]" if not row.get("peer") else "error"
    return f"{row['us']:,.1f} {100 * row['share']:4.0f} %{'' if row['graph'] else '*'}"


def draw(report: Row, path: Path) -> None:
    """Share of copy bandwidth by context, a line per kernel, and the time of dense decode beside others'."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    rows = [row for row in report["rows"] if "us" in row and row["context"]]
    batch = _drawn_batch(rows)
    rows = [row for row in rows if row["batch"] == batch]
    figure = Figure(figsize=(13, 7), layout="constrained")
    shares, times = figure.subplots(1, 2)
    for i, (name, line) in enumerate(_lines(_shown(rows))):
        style = {"marker": "os^vDP*Xph"[i % 10], "ms": 4, "ls": "-" if i < 10 else "--"}
        shares.plot(list(line), [100 * row["share"] for row in line.values()], label=name, **style)
    shares.set(xlabel="tokens", ylabel="bytes that must move, % of copy bandwidth", ylim=(0, None))
    dense = [row for row in rows if is_dense(row) or (row["kernel"] == "decode" and row.get("peer"))]
    for i, (name, line) in enumerate(_lines(dense)):
        label = "kvlib" if name == "decode: range" else name.removeprefix("decode: ")
        times.plot(list(line), [row["us"] for row in line.values()], marker="os^vDP*Xph"[i % 10], ms=4, label=label)
    times.set(xlabel="tokens", ylabel="us, decode attention over all tokens", yscale="log")
    contexts = sorted({row["context"] for row in rows})
    for panel in (shares, times):
        panel.set_xscale("log", base=2)
        panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    times.legend(fontsize=8)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    heads = "a toy's heads" if report["device"] == "cpu" else "Llama-3-8B's heads"
    figure.suptitle(f"{report['device']}, batch {batch}, {heads}, one layer, {report['date']}")
    figure.savefig(path, dpi=110)


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Each kernel's first variant, where memory's speed is what it is about."""
    first: dict[str, str] = {}
    own = [row for row in rows if row["of"] == "copy" and not row.get("peer") and row["kernel"] != "steady"]
    for row in own:
        first.setdefault(row["kernel"], row["variant"])
    here = [row for row in own if row["variant"] == first[row["kernel"]] and row["cold"]]
    return [row for row in here if row.get("flops", 0) < _COMPUTES * row["bytes"]]


def _lines(rows: Sequence[Row]) -> list[tuple[str, dict[Any, Row]]]:
    """By name, rows by context."""
    found: dict[str, dict[Any, Row]] = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        found.setdefault(f"{row['kernel']}: {row['variant']}", {})[row["context"]] = row
    return sorted(found.items())
