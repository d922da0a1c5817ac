"""What an evaluation found: every answer as a JSON line, and what they come to."""

from __future__ import annotations

import gzip
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlib.eval.models import TINY_CAVEAT

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class Answer:
    """What one recipe did with one sample.

    question: "aware" (the question is part of the prompt when the recipe compresses), "agnostic" (it comes after), or ""
    where nothing is asked.  score: share of the references in the answer.  nll, kl, agreement: means over a continuation of
    the negative log-likelihood (nats), KL(full || recipe) (nats) and top-1 agreement with the full cache.
    nbytes, full_nbytes: bytes held at the end, and of all keys and values.  read: share of the tokens seen that a query
    attends.  prefill_s is shared by recipes that share a prompt.
    """

    recipe: str
    task: str
    length: int
    question: str
    sample: int
    nbytes: int
    full_nbytes: int
    read: float
    prefill_s: float
    decode_s: float
    answer: str = ""
    references: tuple[str, ...] = ()
    depths: tuple[float, ...] = ()
    score: float | None = None
    nll: float | None = None
    kl: float | None = None
    agreement: float | None = None

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What was asked, of whom."""
        return self.recipe, self.task, self.length, self.question, self.sample

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Answer:
        """Read one line."""
        known: dict[str, Any] = {f.name: row[f.name] for f in fields(cls) if f.name in row}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """One line."""
        return {k: v for k, v in asdict(self).items() if v is not None and v != ()}


@dataclass(frozen=True)
class Cell:
    """All answers of a recipe to one task at one length: a mean and its 95 % interval.

    value is the mean score, or the perplexity for a continuation, whose kl and agreement are means too.
    held, read: bytes held and tokens attended, as shares of those of the full cache.
    """

    recipe: str
    task: str
    length: int
    question: str
    count: int
    value: float
    low: float
    high: float
    held: float
    read: float
    kl: float | None = None
    kl_error: float = 0.0
    agreement: float | None = None


@dataclass
class Results:
    """An evaluation: `settings` that decide what was asked, `runs` (machine, versions, command) and `answers`."""

    settings: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def caveat(self) -> str:
        """What must be said wherever these results appear."""
        return TINY_CAVEAT if self.settings.get("language") == "Synthetic" else ""

    def cells(self) -> list[Cell]:
        """One cell per recipe, task, length and kind of question, in the order of their first answers."""
        groups: dict[tuple[str, str, int, str], list[Answer]] = {}
        for answer in self.answers:
            groups.setdefault(answer.key[:4], []).append(answer)
        return [_cell(found) for found in groups.values()]

    def tables(self) -> list[Table]:
        """Rich tables: one per length and kind of question, and one per length of continuations."""
        from kvlib.eval.tables import tables

        return tables(self)

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw what there is to see as PNGs: frontier, heat maps, KL; returns their paths."""
        from kvlib.eval.plots import plot

        return plot(self, Path(folder))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON lines, compressed where the name ends in .gz."""
        rows = [{"settings": self.settings}, *({"run": run} for run in self.runs), *(a.to_json() for a in self.answers)]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(gzip.compress(text, mtime=0) if Path(path).suffix == ".gz" else text)

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what `save` or an evaluation wrote; a last line that was cut off is left out.

        Raises ValueError for a file of another kind.
        """
        results = cls({})
        for i, line in enumerate(_whole_lines(Path(path))):
            row = json.loads(line)
            if i == 0 and row.get("settings", {}).get("format") != FORMAT:
                raise ValueError(f"{path} is not an evaluation of format {FORMAT}: give another path")
            if "settings" in row:
                results.settings = row["settings"]
            elif "run" in row:
                results.runs.append(row["run"])
            else:
                results.answers.append(Answer.from_json(row))
        return results


class Journal:
    """The file an evaluation writes while it runs, so that it can be interrupted and go on."""

    def __init__(self, path: Path, settings: dict[str, Any], run: dict[str, Any]):
        """Open `path`, or begin it.  Raises ValueError where it was written under other settings."""
        self.path = path
        if path.is_file() and _whole_lines(path):
            results = Results.load(path)
            _check(results.settings, settings, path)
            text = "".join(line + "\n" for line in _whole_lines(path))
            if text != path.read_text():  # a line was cut off
                path.write_text(text)
            self.results = results
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            self.results = Results(settings)
            self._write({"settings": settings})
        self._run = run

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers; the first of a run are preceded by what is known of the run."""
        found = list(answers)
        if found and self._run not in self.results.runs:
            self.results.runs.append(self._run)
            self._write({"run": self._run})
        self._write(*(answer.to_json() for answer in found))
        self.results.answers += found

    def _write(self, *rows: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


class Memory(Journal):
    """A journal that is not written anywhere."""

    def __init__(self, settings: dict[str, Any], run: dict[str, Any]):
        self.results, self._run = Results(settings), run

    def _write(self, *rows: dict[str, Any]) -> None:
        pass


def this_run(model: Any) -> dict[str, Any]:
    """Versions and machine."""
    import torch
    import transformers

    from kvlib._version import __version__

    machine = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        machine = names[0] if names else machine
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    versions = {"kvlib": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        **versions,
        "device": device,
        "machine": f"{machine}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson); for scores between 0 and 1 it is on the safe side."""
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _cell(found: Sequence[Answer]) -> Cell:
    first, count = found[0], len(found)
    recipe, task, length, question, _ = first.key
    held = sum(a.nbytes for a in found) / max(1, sum(a.full_nbytes for a in found))
    read = _mean([a.read for a in found])
    scores = [a.score for a in found if a.score is not None]
    if scores:
        value = _mean(scores)
        return Cell(recipe, task, length, question, count, value, *wilson(value, count), held, read)
    nll = [a.nll for a in found if a.nll is not None]
    kl = [a.kl for a in found if a.kl is not None]
    agreement = _mean([a.agreement for a in found if a.agreement is not None])
    middle, error = _mean(nll), _error(nll)
    value, low, high = (math.exp(x) for x in (middle, middle - error, middle + error))
    return Cell(recipe, task, length, question, count, value, low, high, held, read, _mean(kl), _error(kl), agreement)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by the normal approximation."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return 1.96 * math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def _whole_lines(path: Path) -> list[str]:
    text = path.read_bytes()
    return (gzip.decompress(text) if path.suffix == ".gz" else text).decode().split("\n")[:-1]


def _check(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{path} was written with {name}={old.get(name)!r}, this is {name}={new.get(name)!r}: give another folder, "
                "or the same settings to go on"
            )
