"""Results as rich tables."""

from __future__ import annotations

from rich.table import Table

from kvlib.eval.results import Cell, Results

_ORDER = ("aware", "agnostic", "")
ASKED = {"aware": "question seen when compressing", "agnostic": "question comes afterwards"}


def tables(results: Results) -> list[Table]:
    """One per length and kind of question, recipes down and tasks across; one per length of continuations."""
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in results.cells():
        groups.setdefault((cell.length, cell.question), []).append(cell)
    model = f"{results.settings.get('model')} ({results.settings.get('dtype')})"
    return [
        (_continuations if kind == "" else _scores)(f"{model}: {length:,} tokens", kind, cells)
        for (length, kind), cells in sorted(groups.items(), key=lambda item: (item[0][0], _ORDER.index(item[0][1])))
    ]


def _scores(title: str, kind: str, cells: list[Cell]) -> Table:
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    table = _table(f"{title}, {ASKED[kind]}; answers right, % [95 % interval]", tasks)
    for recipe, row in _by_recipe(cells).items():
        shown = {cell.task: f"{100 * cell.value:.0f} [{100 * cell.low:.0f}-{100 * cell.high:.0f}]" for cell in row}
        table.add_row(recipe, *_shares(row), *(shown.get(task, "") for task in tasks))
    return table


def _continuations(title: str, kind: str, cells: list[Cell]) -> Table:
    table = _table(f"{title} and their continuation", ["perplexity", "KL from full, nats", "same top token, %"])
    for recipe, row in _by_recipe(cells).items():
        for cell in row:
            table.add_row(
                recipe,
                *_shares(row),
                f"{cell.value:.2f} [{cell.low:.2f}-{cell.high:.2f}]",
                f"{cell.kl:.4f} ± {cell.kl_error:.4f}",
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


def _shares(row: list[Cell]) -> tuple[str, str]:
    held, read = (sum(getattr(cell, name) for cell in row) / len(row) for name in ("held", "read"))
    return f"{100 * held:.1f}", f"{100 * read:.1f}"
