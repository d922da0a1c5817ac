"""The repository's shape, and what importing kvlib does to others."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)


def test_kernels_stays_a_namespace_folder():
    """transformers probes for a package named `kernels`; an __init__.py would make a checkout shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = run("from transformers import LlamaForCausalLM", cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["policies", "offload", "kernels"])
def test_top_level_folders_are_the_package(folder):
    link = ROOT / "kvlib" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


def test_core_imports_without_transformers():
    code = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import importlib.metadata as m
real = m.version
m.version = lambda name: (_ for _ in ()).throw(m.PackageNotFoundError(name)) if name == "transformers" else real(name)
import kvlib, kvlib.layer, kvlib.recipe, kvlib.policies
print(kvlib.Recipe.parse("h2o(budget=64)"))
try:
    kvlib.Cache
except ImportError as error:
    print(error)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "h2o(budget=64)" in done.stdout
    assert "pip install 'transformers>=5.17'" in done.stdout


def test_importing_changes_nothing_in_transformers():
    code = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as layers
before = dict(functions.items()), dict(layers)
import kvlib
after = dict(functions.items())
assert after.pop("kvlib")
assert (after, dict(layers)) == before
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_imports_run_downward_only():
    """kernels and offload know nothing above them; layers and policies never see transformers."""
    for folder, allowed in {
        "kernels": ("kvlib.kernels",),
        "offload": ("kvlib.offload", "kvlib.kernels.gather_host"),  # which moves bytes and knows nothing else
        "policies": ("kvlib.policies", "kvlib.kernels", "kvlib.offload"),
    }.items():
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] == ["from"] or words[:1] == ["import"]:
                    module = words[1]
                    assert not module.startswith("transformers"), path
                    assert not module.startswith("kvlib") or module.startswith(allowed), (path, module)
    core = "segment candidates drafts group census layer recipe store token_ids model report"
    for name in core.split():
        for line in (ROOT / "kvlib" / f"{name}.py").read_text().splitlines():
            if line.startswith(("from ", "import ")):
                assert "transformers" not in line and "kvlib.hf" not in line, (name, line)
