"""The command, run on a model and a text of the tests."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "data" / "tiny_retriever"


def kvlib(*arguments):
    environment = {**os.environ, "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kvlib.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file in the tiny model's own language."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(MODEL / "tokenizer.json")).get_vocab()
    words = [word for word, i in vocabulary.items() if 388 <= i < 900]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=4000)))
    return path


def test_methods_are_listed():
    done = kvlib("methods")
    assert done.returncode == 0, done.stderr
    for word in ("h2o", "snapkv", "streaming_llm", "duo_attention", "2410.10819", "full"):
        assert word in done.stdout


def test_demo_runs_on_a_given_model_text_and_recipe(tmp_path, text):
    done = kvlib(
        *("demo", "--model", MODEL, "--text", text, "--length", 300, "--samples", 2, "--dtype", "float32"),
        *("--recipe", "full", "--recipe", "snapkv(budget=0.25)", "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "snapkv(budget=0.25)" in done.stdout
    assert (tmp_path / "memory-against-accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_heads_are_identified_and_used(tmp_path, text):
    table = tmp_path / "heads.tsv"
    arguments = ("--steps", 3, "--length", 200, "--passkeys", 2, "--words", 4, "--out", table)
    done = kvlib("heads", "identify", "--model", MODEL, "--text", text, *arguments)
    assert done.returncode == 0, done.stderr
    assert "8 heads" in done.stdout
    done = kvlib(
        *("demo", "--model", MODEL, "--text", text, "--length", 300, "--samples", 1, "--dtype", "float32"),
        *("--recipe", f"duo_attention(heads='{table}', sink=4, recent=32)", "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--recipe", "h20(budget=4)"), ["h2o"]),
        (("demo", "--model", "no/such/folder"), ["no/such/folder", "smollm2"]),
        (("demo", "--model", MODEL, "--text", "missing.txt"), ["missing.txt"]),
        (("demo", "--model", MODEL, "--length", 100), ["more text"]),
        (("demo", "--model", MODEL, "--dtype", "int3"), ["int3", "bfloat16"]),
        (("heads", "identify", "--model", MODEL, "--length", 30), ["greater length"]),
    ],
)
def test_bad_input_names_the_value_and_the_remedy(arguments, words):
    done = kvlib(*arguments)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
