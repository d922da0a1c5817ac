"""Results as rich tables."""

from __future__ import annotations

import math

from rich.table import Table

from kvlib.eval.results import Cell, Results

ASKED = {"aware": "question seen when compressing", "agnostic": "question comes afterwards"}
_ORDER = ("aware", "agnostic", "")


def tables(results: Results) -> list[Table]:
    """One per length and kind of question, recipes down and tasks across; one per length and kind of continuation."""
    groups: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in results.cells():
        groups.setdefault((cell.length, cell.question, cell.task if cell.question == "" else ""), []).append(cell)
    model = f"{results.settings.get('model')} ({results.settings.get('dtype')})"
    found = []
    for (length, kind, task), cells in sorted(groups.items(), key=lambda item: (item[0][0], _ORDER.index(item[0][1]))):
        title = f"{model}: {length:,} tokens, {ASKED.get(kind, task)}, {_samples(cells)}"
        found.append(_scores(title, cells) if kind else _continuations(title, cells))
    return found


def _scores(title: str, cells: list[Cell]) -> Table:
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    table = _table(f"{title}; answers right, % [95 % interval]", tasks)
    for recipe, row in _by_recipe(cells).items():
        shown = {cell.task: f"{100 * cell.value:.0f} [{100 * cell.low:.0f}-{100 * cell.high:.0f}]" for cell in row}
        table.add_row(recipe, *_shares(row), *(shown.get(task, "") for task in tasks))
    return table


def _continuations(title: str, cells: list[Cell]) -> Table:
    table = _table(title, ["perplexity", "KL from full, nats", "same top token, %"])
    for cell in cells:
        known = not math.isnan(cell.low)
        table.add_row(
            cell.recipe,
            *_shares([cell]),
            f"{cell.value:.2f}" + (f" [{cell.low:.2f}-{cell.high:.2f}]" if known else ""),
            f"{cell.kl:.4f}" + (f" ± {cell.kl_error:.4f}" if known else ""),
            f"{100 * (cell.agreement or 0):.1f}",
        )
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("recipe", overflow="fold", min_width=24)
    for column in ("bytes held, %", "read, %", *columns):
        table.add_column(column, justify="right")
    return table


def _by_recipe(cells: list[Cell]) -> dict[str, list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.recipe, []).append(cell)
    return rows


def _samples(cells: list[Cell]) -> str:
    least, most = min(cell.count for cell in cells), max(cell.count for cell in cells)
    return f"{most} samples" if least == most else f"{least} to {most} samples"


def _shares(row: list[Cell]) -> tuple[str, str]:
    held, read = (sum(getattr(cell, name) for cell in row) / len(row) for name in ("held", "read"))
    return f"{100 * held:.1f}", f"{100 * read:.1f}"
