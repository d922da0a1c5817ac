"""The command, run on a model and a text of the tests."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvlib.policies.select.channels import ChannelTable

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


def test_demo_runs_on_a_given_model_and_recipe(tmp_path):
    done = kvlib(
        *("demo", "--model", MODEL, "--length", 300, "--samples", 2, "--dtype", "float32"),
        *("--recipe", "full", "--recipe", "snapkv(budget=0.25)", "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "snapkv(budget=0.25)" in done.stdout
    assert (tmp_path / "frontier-aware.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "demo.jsonl").read_text().splitlines()) == 2 + 4
    assert not (tmp_path / "answers.jsonl").exists()


def test_eval_measures_draws_and_goes_on(tmp_path):
    command = ("eval", "--model", "tiny", "--recipe", "h2o(budget=0.25)", "--lengths", "200,300", "--out", tmp_path)
    tasks = ("--tasks", "niah, continuation(tokens=4)")
    done = kvlib(*command, *tasks, "--samples", 2)
    assert done.returncode == 0, done.stderr
    assert "oracle(budget=0.25)" in done.stdout and "random(budget=0.25)" in done.stdout
    assert "no attention sink" in done.stdout.replace("\n", " ")
    for name in ("frontier-aware", "frontier-agnostic", "depth-niah-aware", "depth-niah-agnostic", "kl"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "answers.jsonl").read_text()
    assert len(before.splitlines()) == 2 + 2 * 2 * (2 + 1) * 5
    done = kvlib(*command, *tasks, "--samples", 3, "--aware", "--no-baselines")
    assert done.returncode == 0, done.stderr
    after = (tmp_path / "answers.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 1 + 2 * (1 + 1)
    assert kvlib(*command, *tasks, "--seed", 1).returncode == 2


def test_tasks_are_listed():
    done = kvlib("tasks")
    assert done.returncode == 0, done.stderr
    for word in ("niah", "multikey(keys=4)", "multivalue", "multiquery", "vt(hops=2)", "copy", "continuation"):
        assert word in done.stdout


def test_an_interrupted_eval_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "kvlib.cli", "eval", "--model", "tiny", "--lengths", "2048", "--out", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    answers = tmp_path / "answers.jsonl"
    while not answers.exists() or len(answers.read_text().splitlines()) < 3:
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command goes on from there" in out.replace("\n", " ")


def test_heads_are_identified_and_used(tmp_path, text):
    table = tmp_path / "heads.tsv"
    arguments = ("--steps", 3, "--length", 200, "--passkeys", 2, "--words", 4, "--out", table)
    done = kvlib("heads", "identify", "--model", MODEL, "--text", text, *arguments)
    assert done.returncode == 0, done.stderr
    assert "8 heads" in done.stdout
    done = kvlib(
        *("demo", "--model", MODEL, "--length", 300, "--samples", 1, "--dtype", "float32"),
        *("--recipe", f"duo_attention(heads='{table}', sink=4, recent=32)", "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr


def test_channels_are_identified(tmp_path):
    path = tmp_path / "channels.tsv"
    done = kvlib("channels", "identify", "--model", "tiny", "--blocks", 3, "--length", 64, "--out", path)
    assert done.returncode == 0, done.stderr
    table = ChannelTable.load(path)
    layers, kv_heads, d = table.order.shape
    assert f"{layers} layers of {kv_heads} KV heads; {d // 4} of {d} channels carry" in done.stdout.replace("\n", " ")
    assert table.header["blocks"] == 3 and table.header["length"] == 64
    assert (table.weight > 0).all()
    done = kvlib("channels", "identify", "--model", "tiny", "--text", __file__, "--out", tmp_path / "other.tsv")
    assert done.returncode == 2 and "leave the text out" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "other.tsv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--recipe", "h20(budget=4)"), ["h2o"]),
        (("demo", "--model", "no/such/folder"), ["no/such/folder", "smollm2"]),
        (("demo", "--model", MODEL, "--text", "missing.txt"), ["missing.txt"]),
        (("demo", "--model", MODEL, "--length", 15), ["length 15", "give"]),
        (("demo", "--model", "tiny", "--text", __file__), ["leave the text out"]),
        (("eval", "--model", "tiny", "--lengths", "1k"), ["--lengths 1k", "1024,2048"]),
        (("eval", "--model", "tiny", "--depth", "0.9,0.1"), ["the lower one first"]),
        (("eval", "--model", "tiny", "--depth", "0.9"), ["two numbers"]),
        (("eval", "--model", "tiny", "--tasks", "needle"), ["no task 'needle'"]),
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
