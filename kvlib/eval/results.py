"""What an evaluation found: every answer as a JSON line, and what they come to."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlib.eval.models import TINY_CAVEAT

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 2


@dataclass(frozen=True)
class Answer:
    """What one recipe did with one sample.

    prompt: a hash of the sample's ids.  run: which of the runs found it.
    question: "aware" (the question is part of the prompt when the recipe compresses), "agnostic" (it comes after), or ""
    where nothing is asked.  score: share of the references in the answer.  nll, kl, agreement: means over a continuation of
    the negative log-likelihood (nats), KL(full || recipe) (nats) and top-1 agreement with the full cache.
    nbytes, full_nbytes: bytes held at the end, and of all keys and values, in layers that kvlib keeps.  read: share of the
    tokens seen that a query attends there.  depths: where in the haystack the asked statements stand, 0..1.  read_s, own_s:
    seconds for reading the prompt, shared by recipes that share it, and for all that follows.
    """

    recipe: str
    task: str
    length: int
    question: str
    sample: int
    prompt: str
    nbytes: int
    full_nbytes: int
    read: float
    read_s: float
    own_s: float
    run: int = 0
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

    value is the mean score, or the perplexity for a continuation, whose kl and agreement are means too; the interval of a
    single continuation is nan.  held, read: bytes held and tokens attended, as shares of those of the full cache.
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
    """An evaluation: `settings` that decide the samples, `runs` (versions, machine, what was asked) and `answers`."""

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
        first, *rest = _whole_lines(Path(path)) or [""]
        if first.startswith('{"settings": {"format": '):
            results.settings = json.loads(first)["settings"]
        if results.settings.get("format") != FORMAT:
            raise ValueError(f"{path} is not an evaluation of format {FORMAT}: give another path")
        for line in rest:
            row = json.loads(line)
            if "recipe" in row:
                results.answers.append(Answer.from_json(row))
            else:
                results.runs.append(row["run"])
        return results


class Journal:
    """The file an evaluation writes while it runs, so that it can be interrupted and go on; without a path, memory."""

    def __init__(self, path: Path | None):
        """Read what `path` holds, if anything.  Raises ValueError where that is not an evaluation."""
        self.path = path
        self.results = Results({}) if path is None or not path.is_file() else Results.load(path)
        self._pending: list[dict[str, Any]] = []

    def begin(self, settings: dict[str, Any], run: dict[str, Any], sources: dict[str, str]) -> None:
        """A run begins; nothing is written before its first answers.

        sources: a hash of what each recipe does.  Raises ValueError where what is known was found under other settings or
        by recipes that have changed since.
        """
        known = self.results
        for name in {**known.settings, **settings} if known.answers else ():
            if known.settings.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} was written with {name}={known.settings.get(name)!r}, this is "
                    f"{name}={settings.get(name)!r}: give another folder, or the same settings to go on"
                )
        for earlier in known.runs:
            for recipe, source in earlier.get("sources", {}).items():
                if sources.get(recipe, source) != source:
                    raise ValueError(
                        f"{recipe} has changed since it answered in {self.path} (its code or a file it reads): give "
                        "another folder"
                    )
        if not known.answers:
            known.settings, known.runs = settings, []
        self._pending = [] if known.answers else [{"settings": settings}]
        self._pending.append({"run": {**run, "sources": sources}})

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers of the run that began."""
        if self._pending:
            known = self.results
            known.runs.append(self._pending[-1]["run"])
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                whole = sum(len(line.encode()) + 1 for line in _whole_lines(self.path)) if self.path.exists() else 0
                with self.path.open("ab") as file:  # what follows the last whole line was cut off
                    file.truncate(whole if known.answers else 0)
        numbered = [replace(answer, run=len(self.results.runs) - 1) for answer in answers]
        rows = [*self._pending, *(answer.to_json() for answer in numbered)]
        self._pending = []
        self.results.answers += numbered
        if self.path is not None:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))


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
    """Half of the 95 % interval of a mean, by the normal approximation; nan for a single value."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return 1.96 * math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def _whole_lines(path: Path) -> list[str]:
    text = path.read_bytes()
    return (gzip.decompress(text) if path.suffix == ".gz" else text).decode().split("\n")[:-1]
