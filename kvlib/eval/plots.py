"""Results as pictures: accuracy against memory, accuracy by length and depth, distance from the full cache."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from kvlib.eval.results import Cell, Results
from kvlib.eval.tables import ASKED
from kvlib.policies import StreamingLLM
from kvlib.policies.base import registered
from kvlib.policies.notation import read_call, split
from kvlib.recipe import Recipe

DEPTHS = 5  # bands of a heat map
TICKS = {1.5625: "1.6", 3.125: "3.1", 6.25: "6¼", 12.5: "12½", 25.0: "25", 50.0: "50", 100.0: "100"}


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw everything there is data for; returns the paths of the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = results.cells()
    drawn = {}
    for kind in dict.fromkeys(cell.question for cell in cells if cell.question):
        drawn[f"frontier-{kind}"] = _frontier(results, [c for c in cells if c.question == kind], kind)
        for task in dict.fromkeys(a.task for a in results.answers if a.question == kind and len(a.depths) == 1):
            drawn[f"depth-{_slug(task)}-{kind}"] = _heat_map(results, task, kind)
    continued = list(dict.fromkeys(cell.task for cell in cells if cell.kl is not None and cell.recipe != "full"))
    for task in continued:
        name = "kl" if len(continued) == 1 else f"kl-{_slug(task)}"
        drawn[name] = _distances(results, [cell for cell in cells if cell.task == task])
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
    return [folder / f"{name}.png" for name in drawn]


def _frontier(results: Results, cells: list[Cell], kind: str) -> Any:
    """Accuracy against bytes held: a panel per task and length, a line per method.  Selectors hold everything: they stand,
    hollow, where they read."""
    tasks, lengths = list(dict.fromkeys(cell.task for cell in cells)), sorted({cell.length for cell in cells})
    families = list(dict.fromkeys(_family(cell.recipe) for cell in cells if cell.recipe != "full"))
    figure = _figure(3.1 * len(tasks) + 3, 2.6 * len(lengths) + 1.2)
    axes = figure.subplots(len(lengths), len(tasks), squeeze=False, sharex=True, sharey=True)
    shares = [_share(cell) for cell in cells]
    for (row, column), panel in np.ndenumerate(axes):
        here = [c for c in cells if (c.length, c.task) == (lengths[row], tasks[column])]
        for cell in here:
            if cell.recipe == "full":
                panel.axhline(100 * cell.value, color="grey", linestyle="--", linewidth=1, label="full")
        for i, family in enumerate(families):
            line = sorted((c for c in here if _family(c.recipe) == family), key=_share)
            if line:
                _draw_line(panel, line, family, f"C{i % 10}", "os^vDP*Xph"[i % 10])
        panel.set_title(f"{tasks[column]}, {lengths[row]:,} tokens", fontsize=9)
        panel.grid(alpha=0.3)
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(list(TICKS), list(TICKS.values()))
    axes[0, 0].set_xlim(0.8 * min(shares), 1.25 * max(100.0, *shares))
    axes[0, 0].set_ylim(-4, 104)
    figure.supxlabel("KV bytes held, % of full (hollow: tokens read, %)", fontsize=10)
    figure.supylabel("answers right, %, and 95 % interval", fontsize=10)
    handles = {name: handle for panel in axes.flat for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    return _titled(figure, results, f"What each recipe still knows: {ASKED[kind]}")


def _draw_line(panel: Any, line: list[Cell], label: str, color: str, marker: str) -> None:
    value = np.array([100 * cell.value for cell in line])
    error = np.array([[100 * (c.value - c.low) for c in line], [100 * (c.high - c.value) for c in line]]).clip(min=0)
    hollow = {"markerfacecolor": "white"} if _selects(line[0].recipe) else {}
    x = [_share(cell) for cell in line]
    style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.2, "elinewidth": 0.5, **hollow}
    panel.errorbar(x, value, error, label=label, **style)


def _heat_map(results: Results, task: str, kind: str) -> Any:
    """Accuracy by length and needle depth, a panel per recipe."""
    scores: dict[str, dict[tuple[int, int], list[float]]] = {}
    for a in results.answers:
        if (a.task, a.question) == (task, kind) and a.score is not None:
            band = min(DEPTHS - 1, int(a.depths[0] * DEPTHS))
            scores.setdefault(_label(a.recipe, a.length), {}).setdefault((band, a.length), []).append(a.score)
    lengths = sorted({length for found in scores.values() for _, length in found})
    columns = min(5, len(scores))
    rows = -(-len(scores) // columns)
    figure = _figure(2.5 * columns + 1.5, 1.9 * rows + 1.1)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in axes.flat[len(scores) :]:
        panel.set_visible(False)
    image = None
    for panel, (label, found) in zip(axes.flat, scores.items(), strict=False):
        grid = np.full((DEPTHS, len(lengths)), np.nan)
        for (band, length), values in found.items():
            grid[band, lengths.index(length)] = 100 * np.mean(values)
        image = panel.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        panel.set_title("\n".join(textwrap.wrap(label, 36)), fontsize=7)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        panel.set_yticks(range(DEPTHS), [f"{(2 * i + 1) * 50 // DEPTHS} %" for i in range(DEPTHS)], fontsize=7)
    figure.colorbar(image, ax=axes, label="answers right, %", shrink=0.8)
    figure.supxlabel("prompt tokens", fontsize=9)
    figure.supylabel("needle depth", fontsize=9)
    return _titled(figure, results, f"{task}: {ASKED[kind]}")


def _distances(results: Results, cells: list[Cell]) -> Any:
    """KL from the full cache's predictions, a bar per recipe and length, with the perplexity written beside it."""
    lengths = sorted({cell.length for cell in cells})
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.recipe != "full":
            rows.setdefault(_label(cell.recipe, cell.length), []).append(cell)
    figure = _figure(11, 0.14 * len(rows) * len(lengths) + 0.1 * len(rows) + 1.2)
    panel = figure.subplots()
    height = 0.8 / len(lengths)
    for i, length in enumerate(lengths):
        full = [f", full: {cell.value:.1f}" for cell in cells if cell.recipe == "full" and cell.length == length]
        panel.barh(0, 0, color=f"C{i}", label=f"{length:,} tokens" + "".join(full))
        for row, found in enumerate(rows.values()):
            for cell in (cell for cell in found if cell.length == length):
                y, kl = row + (i - (len(lengths) - 1) / 2) * height, max(cell.kl or 0.0, 1e-6)
                error = 0.0 if math.isnan(cell.kl_error) else cell.kl_error
                arms = [[min(error, 0.99 * kl)], [error]]  # a logarithmic axis ends above zero
                panel.barh(y, kl, height, color=f"C{i}", xerr=arms, error_kw={"elinewidth": 0.6})
                panel.annotate(f" {cell.value:.1f}", (kl + error, y), fontsize=6, va="center")
    panel.set_yticks(range(len(rows)), list(rows), fontsize=7)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xscale("log")
    panel.grid(alpha=0.3, axis="x")
    panel.set_xlabel("KL(full || recipe), nats per token, and 95 % interval; perplexity beside the bars")
    figure.legend(fontsize=8, loc="outside right upper")
    return _titled(figure, results, f"{cells[0].task}: distance from the full cache's predictions")


def _slug(task: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", task).strip("-")


def _share(cell: Cell) -> float:
    return 100 * (cell.read if _selects(cell.recipe) else cell.held)


def _family(recipe: str) -> str:
    """A recipe without its sizes: what a line joins."""
    bare = re.sub(r"(budget|recent|sink|sparsity)=[^,()]*(,\s*)?", "", recipe)
    return re.sub(r",\s*\)", ")", bare).replace("()", "")


def _label(recipe: str, length: int) -> str:
    """A lone window is written in tokens, which differ between lengths: its share of them does not."""
    if not recipe.startswith("streaming_llm(") or "+" in recipe:
        return recipe
    window = Recipe.parse(recipe).evict
    assert isinstance(window, StreamingLLM)
    return f"streaming_llm, {100 * (window.sink + window.recent) / length:.3g} %"


def _selects(recipe: str) -> bool:
    """Whether a recipe reads less than it holds."""
    terms = [term.strip() for term in split(recipe, "+") if "=" not in term.split("(")[0]]
    methods = [registered().get(read_call(term, recipe)[0]) for term in terms]
    return any(method is not None and method.role == "select" for method in methods)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    return Figure(figsize=(width, height), layout="constrained")


def _titled(figure: Any, results: Results, title: str) -> Any:
    figure.suptitle(f"{title} ({results.settings.get('model')}, {results.settings.get('dtype')})", fontsize=11)
    caveat = "\n".join(textwrap.wrap(results.caveat, int(16 * figure.get_figwidth())))
    figure.text(0.005, -0.005, caveat, fontsize=6, va="top", color="dimgrey")
    return figure
