"""Results as pictures: accuracy against memory, accuracy by length and depth, distance from the full cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from kvlib.eval.results import Cell, Results
from kvlib.eval.tables import ASKED
from kvlib.notation import read_call, split
from kvlib.policies.base import registered

DEPTHS = 5  # bands of a heat map


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw everything there is data for; returns the paths of the PNGs."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    cells = results.cells()
    drawn = []
    for kind in dict.fromkeys(cell.question for cell in cells if cell.question):
        drawn.append(
            _save(_frontier(results, [c for c in cells if c.question == kind], kind), folder / f"frontier-{kind}.png")
        )
        drawn += [_save(figure, folder / f"depth-{task}-{kind}.png") for task, figure in _heat_maps(results, kind)]
    continued = [cell for cell in cells if cell.kl is not None]
    if continued:
        drawn.append(_save(_distances(results, continued), folder / "kl.png"))
    return drawn


def _frontier(results: Results, cells: list[Cell], kind: str) -> Any:
    """Accuracy against bytes held: a panel per task and length, a line per method.  Selectors hold everything: they stand,
    hollow, where they read."""
    from matplotlib import pyplot as plt

    tasks, lengths = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("task", "length"))
    families = list(dict.fromkeys(_family(cell.recipe) for cell in cells if cell.recipe != "full"))
    size = (3.1 * len(tasks) + 2.6, 2.6 * len(lengths) + 1.1)
    figure, axes = plt.subplots(len(lengths), len(tasks), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for (row, column), panel in np.ndenumerate(axes):
        here = [c for c in cells if (c.length, c.task) == (lengths[row], tasks[column])]
        for cell in here:
            if cell.recipe == "full":
                panel.axhline(100 * cell.value, color="grey", linestyle="--", linewidth=1, label="full")
        for i, family in enumerate(families):
            line = sorted((c for c in here if _family(c.recipe) == family), key=_share)
            if line:
                _draw_line(panel, line, family, f"C{i % 10}", "os^vDP*Xph"[i // 10 % 10])
        panel.set_xscale("log", base=2)
        panel.set_xlim(3, 120)
        panel.set_xticks([6.25, 12.5, 25, 50, 100], ["6¼", "12½", "25", "50", "100"])
        panel.set_ylim(-4, 104)
        panel.grid(alpha=0.3)
        panel.set_title(f"{tasks[column]}, {lengths[row]:,} tokens", fontsize=9)
    figure.supxlabel("KV bytes held, % of full (hollow: tokens read, %)", fontsize=10)
    figure.supylabel("answers right, %, and 95 % interval", fontsize=10)
    handles = {
        label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return _titled(figure, results, f"What each recipe still knows: {ASKED[kind]}")


def _draw_line(panel: Any, line: list[Cell], label: str, color: str, marker: str) -> None:
    value = np.array([100 * cell.value for cell in line])
    error = np.array([[100 * (c.value - c.low) for c in line], [100 * (c.high - c.value) for c in line]]).clip(min=0)
    hollow = {"markerfacecolor": "white"} if _selects(line[0].recipe) else {}
    x = [_share(cell) for cell in line]
    panel.errorbar(
        x, value, error, color=color, marker=marker, markersize=5, linewidth=1.2, elinewidth=0.5, label=label, **hollow
    )


def _heat_maps(results: Results, kind: str) -> list[tuple[str, Any]]:
    """Accuracy by length and needle depth, a panel per recipe, for each task about a single statement."""
    from matplotlib import pyplot as plt

    found = []
    answers = [a for a in results.answers if a.question == kind and len(a.depths) == 1]
    for task in dict.fromkeys(a.task for a in answers):
        asked = [a for a in answers if a.task == task]
        lengths = sorted({a.length for a in asked})
        recipes = list(dict.fromkeys(a.recipe for a in asked))
        columns = min(5, len(recipes))
        rows = -(-len(recipes) // columns)
        size = (2.5 * columns + 1, 1.9 * rows + 0.9)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
        )
        for panel in axes.flat[len(recipes) :]:
            panel.set_visible(False)
        image = None
        for panel, recipe in zip(axes.flat, recipes, strict=False):
            grid = np.full((DEPTHS, len(lengths)), np.nan)
            for (band, column), _ in np.ndenumerate(grid):
                scores = [
                    a.score
                    for a in asked
                    if a.recipe == recipe
                    and a.length == lengths[column]
                    and min(DEPTHS - 1, int(a.depths[0] * DEPTHS)) == band
                ]
                grid[band, column] = np.mean([s for s in scores if s is not None]) if scores else np.nan
            image = panel.imshow(100 * grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            panel.set_title(recipe, fontsize=7)
            panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
            panel.set_yticks(range(DEPTHS), [f"{(2 * i + 1) * 50 // DEPTHS} %" for i in range(DEPTHS)], fontsize=7)
        figure.colorbar(image, ax=axes, label="answers right, %", shrink=0.8)
        figure.supxlabel("prompt tokens", fontsize=9)
        figure.supylabel("needle depth", fontsize=9)
        found.append((re.sub(r"\W+", "-", task).strip("-"), _titled(figure, results, f"{task}: {ASKED[kind]}")))
    return found


def _distances(results: Results, cells: list[Cell]) -> Any:
    """KL from the full cache's predictions, a bar per recipe and length, with the perplexity written beside it."""
    from matplotlib import pyplot as plt

    lengths = sorted({cell.length for cell in cells})
    recipes = list(dict.fromkeys(cell.recipe for cell in cells if cell.recipe != "full"))
    size = (9, 0.2 * len(recipes) * len(lengths) + 0.12 * len(recipes) + 1.8)
    figure, panel = plt.subplots(figsize=size, layout="constrained")
    height = 0.8 / len(lengths)
    for i, length in enumerate(lengths):
        full = [cell for cell in cells if cell.recipe == "full" and cell.length == length]
        for cell in (c for c in cells if c.length == length and c.recipe != "full"):
            y = recipes.index(cell.recipe) + (i - (len(lengths) - 1) / 2) * height
            kl = max(cell.kl or 0.0, 1e-6)
            panel.barh(y, kl, height, color=f"C{i}", xerr=min(cell.kl_error, 0.999 * kl), error_kw={"elinewidth": 0.6})
            panel.annotate(
                f" {cell.value:.1f}",
                (kl + cell.kl_error, y),
                fontsize=6,
                va="center",
                xytext=(2, 0),
                textcoords="offset points",
            )
        panel.barh(0, 0, color=f"C{i}", label=f"{length:,} tokens" + (f", full: {full[0].value:.1f}" if full else ""))
    panel.set_yticks(range(len(recipes)), recipes, fontsize=7)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.grid(alpha=0.3, axis="x")
    panel.set_xlabel("KL(full || recipe), nats per token, and 95 % interval; perplexity beside the bars")
    panel.legend(fontsize=8, loc="lower right")
    return _titled(figure, results, "Distance from the full cache's predictions")


def _share(cell: Cell) -> float:
    return 100 * (cell.read if _selects(cell.recipe) else cell.held)


def _family(recipe: str) -> str:
    """A recipe without its sizes: what a line joins."""
    bare = re.sub(r"(budget|recent|sink|sparsity)=[^,()]*(,\s*)?", "", recipe)
    return re.sub(r",\s*\)", ")", bare).replace("()", "")


def _selects(recipe: str) -> bool:
    """Whether a recipe reads less than it holds."""
    methods = [
        registered().get(read_call(term.strip(), recipe)[0]) for term in split(recipe, "+") if "=" not in term.split("(")[0]
    ]
    return any(method is not None and method.role == "select" for method in methods)


def _titled(figure: Any, results: Results, title: str) -> Any:
    figure.suptitle(f"{title} ({results.settings.get('model')}, {results.settings.get('dtype')})", fontsize=11)
    if results.caveat:
        figure.text(0.005, -0.005, results.caveat, fontsize=6, va="top", color="dimgrey")
    return figure


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path
