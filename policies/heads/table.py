"""Head tables: one gate per KV head saying how much full attention it needs, and the file they live in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "kvlib-head-table-1"


@dataclass(frozen=True)
class HeadTable:
    """Gates [layers, kv_heads] in [0, 1] (1: needs everything, 0: sinks and recent tokens do) and where they come from.

    The file is one line of JSON after `# `, then a line of tab-separated gates per layer.
    """

    gates: np.ndarray
    source: str
    header: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the table to `path`."""
        header = {"format": FORMAT, "source": self.source, "shape": list(self.gates.shape), **self.header}
        rows = ["\t".join(f"{gate:.6f}" for gate in layer) for layer in self.gates]
        Path(path).write_text("\n".join(["# " + json.dumps(header), *rows]) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadTable:
        """Read a table; raises FileNotFoundError, or ValueError naming the file and what is wrong with it."""
        first, *rows = Path(path).read_text().splitlines() or [""]
        try:
            header = json.loads(first.removeprefix("# "))
            gates = np.array([[float(x) for x in row.split("\t")] for row in rows if row.strip()])
        except ValueError as error:
            raise ValueError(f"{path} is no head table: {error}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"{path} is no head table: its first line must be '# ' and JSON with format {FORMAT!r}")
        if gates.ndim != 2 or not np.isfinite(gates).all():
            raise ValueError(f"{path}: give one line of finite gates per layer, all of one length")
        known = {"format", "source", "shape"}
        return cls(gates.clip(0, 1), str(path), {k: v for k, v in header.items() if k not in known})

    def streaming(self, sparsity: float, layers: np.ndarray | None = None) -> np.ndarray:
        """Mask [layers, kv_heads] of the round(sparsity * heads) lowest gates, ties by (layer, head); `layers` [layers]
        says which layers are to be counted and split, None all."""
        gates = self.gates if layers is None else np.where(layers[:, None], self.gates, np.inf)
        heads = self.gates.shape[1] * (len(gates) if layers is None else int(layers.sum()))
        mask = np.zeros(gates.size, dtype=bool)
        mask[gates.ravel().argsort(kind="stable")[: round(sparsity * heads)]] = True
        return mask.reshape(gates.shape)

    def implied_gate(self, streaming: np.ndarray) -> float:
        """Highest gate among the heads that stream; 0 where none does."""
        return float(self.gates[streaming].max()) if streaming.any() else 0.0
