"""What answers depend on is told apart, and nothing else is."""

import numpy as np
import torch

import kvlib
from kvlib.eval.provenance import fingerprint, source_of
from kvlib.policies import HeadTable
from kvlib.policies.base import _METHODS
from kvlib.testing import tiny_model

WRITTEN = """
from dataclasses import dataclass
from typing import ClassVar
from kvlib.policies import BudgetedEvictor, register

@register
@dataclass(frozen=True)
class Mine(BudgetedEvictor):
    "Keep something."

    name: ClassVar[str] = "mine"

    def score(self, view):
        return view.positions.float() * {factor}
"""


def test_recipes_are_known_by_their_code_and_files(tmp_path):
    parse = kvlib.Recipe.parse
    assert source_of(parse("h2o(budget=64)")) == source_of(parse("h2o(budget=32)"))
    assert (
        len(
            {source_of(parse(text)) for text in ("full", "h2o", "snapkv", "oracle", "duo_attention", "duo_attention + h2o")}
        )
        == 6
    )
    path = tmp_path / "heads.tsv"
    found = []
    for gate in (0.25, 0.75, 0.25):
        HeadTable(np.full((2, 2), gate), "by hand").save(path)
        found.append(source_of(parse(f"duo_attention(heads='{path}')")))
    assert found[0] == found[2] != found[1]


def test_methods_written_at_a_prompt_are_known_by_what_they_do():
    found = []
    for factor in (1, -1, 1):
        exec(WRITTEN.format(factor=factor), {})
        found.append(source_of(kvlib.Recipe.parse("mine(budget=64)")))
        del _METHODS["mine"]
    assert found[0] == found[2] != found[1]


def test_models_are_known_by_their_weights():
    one, same, other = tiny_model(seed=0), tiny_model(seed=0), tiny_model(seed=1)
    assert (
        fingerprint(one) == fingerprint(same) == fingerprint(one.to(torch.float64).to(torch.float32)) != fingerprint(other)
    )
