"""Compiling without a GPU, in processes of their own: here kernels are interpreted."""

import json
import os
import subprocess
import sys

import pytest

from kvlib.kernels.aot import compiling
from kvlib.kernels.launch import INTERPRET


def run(code, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def test_a_spill_and_a_failed_compile_fail_the_check(tmp_path):
    code = (
        "import sys, typer, kvlib.kernels.check as c, tests.kernels.spilling as bad\n"
        "c.examples = lambda module, every: list(bad.examples())\n"
        "typer.run(c.main)"
    )
    done = run(code, "--only", "spilling", "--out", str(tmp_path / "table.json"))
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"greedy"} and all(row["spilled"] > 0 for row in rows)
    assert "CompilationError" in done.stdout and "4 failures" in done.stdout


def test_the_split_kernel_could_ask_for_more_than_memory_feeds():
    code = (
        "from kvlib.kernels.check import check, examples, FEEDS\n"
        "example = examples('decode', False)[0]\n"
        "needs = dict(check(example, 90))['decode_split']\n"
        "print(needs)\n"
        "assert needs.spilled == 0 and needs.registers <= 255\n"
        "assert needs.bytes_per_clock(example.tile['decode_split']) > 3 * FEEDS"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.skipif(not INTERPRET.value, reason="only interpreted kernels cannot be compiled")
def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), compiling(90):
        pass
