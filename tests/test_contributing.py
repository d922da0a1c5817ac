"""The pages of the documentation do what they say."""

import re
from pathlib import Path

import pytest

import kvlib
from kvlib.policies.base import _METHODS
from kvlib.testing import check_policy

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _registry():
    before = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(before)


def test_the_first_method_of_a_newcomer_passes():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert "knorm" in [row["name"] for row in kvlib.methods()]
    check_policy("duo_attention(sparsity=0.5, sink=4, recent=16) + knorm(budget=0.25)")


def test_the_first_selector_of_a_newcomer_passes():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "selectors.md").read_text(), re.DOTALL):
        if "class" in block:
            exec(block, names)
    check_policy("mean_pages(budget=64)")
    check_policy("duo_attention(sparsity=0.5, sink=4, recent=16) + mean_pages(budget=64) @ host")


def test_recipes_in_the_documentation_parse():
    methods = "|".join(row["name"] for row in kvlib.methods() if row["role"] != "tier")
    found = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in page.read_text().splitlines():
            if "raise" in line or ">>>" in line:
                continue
            for text in re.findall(rf'[`"]((?:{methods})(?:\([^`]*?\)[^`"]*| @ [^`"]*))[`"]', line):
                if "$" in text or "mean_pages" in text:  # filled in by a shell, or defined on the page
                    continue
                kvlib.Recipe.parse(text)
                found += 1
    assert found >= 10


def test_links_between_pages_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
