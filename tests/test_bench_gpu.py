"""The GPU benchmark on a CPU, at tiny shapes: what it writes, what it refuses, and that nothing stops it."""

import json

import pytest
import torch

from bench import bench_gpu
from bench.kernels import decode_lowrank, decode_q4, measure, report, selection
from bench.kernels.case import Shape
from bench.kernels.measure import Job, events
from bench.kernels.worker import isolated

CPU = torch.device("cpu")


def rows_of(*jobs):
    return [row for kind, _, row in events(jobs, CPU, 1) if kind == "row"]


def own(rows):
    return [row for row in rows if not row.get("peer")]


def test_a_quick_run_on_a_cpu(tmp_path, capsys):
    assert bench_gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("cpu-20") and path.with_suffix(".png").stat().st_size > 10_000
    found = json.loads(path.read_text())
    assert found["device"] == "cpu" and found["command"].startswith("python -m bench.bench_gpu --quick --device cpu")
    assert found["versions"]["torch"] == torch.__version__
    assert 1e8 < found["bus_bytes_per_s"] < found["copy_bytes_per_s"] < 1e13
    rows = found["rows"]
    timed = [row for row in own(rows) if "us" in row]
    assert {row["kernel"] for row in timed} == set(bench_gpu.KERNELS)
    assert len(timed) == len(own(rows))
    assert {(row["context"], row["batch"]) for row in timed} == {(128, 2), (256, 2), (None, 2)}
    for row in timed:
        assert row["us"] > 0 and row["off"] >= 0 and row["graph"] is False
        speed = found[f"{row['of']}_bytes_per_s"]
        assert row["share"] == pytest.approx(row["bytes"] / row["us"] * 1e6 / speed)
    peers = {row["variant"]: row for row in rows if row.get("peer") and row["kernel"] == "decode"}
    assert set(peers) == {"torch sdpa", "flex_attention", "flash-attn", "FlashInfer"}
    assert "us" in peers["torch sdpa"] and all({"us", "error", "left_out"} & set(row) for row in peers.values())
    said = capsys.readouterr().out
    assert "decode: torch sdpa" in said and "merge of up to 8 parts" in said
    path.with_suffix(".png").unlink()
    assert bench_gpu.main(["--draw", str(path)]) == 0
    assert path.with_suffix(".png").exists()


def test_nothing_is_written_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench_gpu.main(["--only", "merge", "--quick", "--device", "cpu"]) == 0
    assert not list(tmp_path.iterdir()) and "merge: 8 parts" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert bench_gpu.main([]) == 1
    assert "no GPU here" in capsys.readouterr().err


def moved(job, **sizes):
    """Bytes by variant of our own cases at Llama-3-8B's heads."""
    module = bench_gpu.import_module(f"bench.kernels.{job.kernel}")
    shape = Shape(job.batch, job.context, CPU, **sizes)
    return {case.variant: case.moved for case in module.cases(shape) if not case.peer}


def test_bytes_that_must_move():
    """8 heads of 128 in bf16, two sequences of 4,096 tokens: 512 bytes per token and head."""
    rows = 2 * 8 * 4096
    job = Job("decode", 4096, 2)
    assert moved(job) == {
        "range": rows * 512,
        "2048 tokens": rows // 2 * 512,
        "2048 tokens in pages of 16": rows // 2 * 512,
    }
    assert moved(job._replace(kernel="decode_q4")) == {
        "4 bits, range per 128 tokens of a channel": rows * (128 + 4 + 4),
        "4 bits, range per token": rows * (128 + 4 + 4),
        "8 bits, range per token": rows * (256 + 8),
    }
    assert decode_q4.coded(Shape(2, 4096, CPU), 4, 64) == rows * (128 + 8 + 4)
    # Factors of rank 4 for key and value, 16 bytes; two outliers of 3 bytes for each; ranges and factors of 16 segments.
    segment = 128 * 4 + 2 * 128 * 4 * 2
    assert moved(job._replace(kernel="decode_gear", context=131072))["gear_l, 4 bits"] == 16 * (131072 * 148 + 16 * segment)
    assert moved(job._replace(kernel="decode_gear")) == {
        "gear, 4 bits": rows * (128 + 4 + 16 + 12) + 16 * segment,
        "gear_l, 4 bits": rows * (128 + 4 + 16) + 16 * segment,
    }
    assert moved(job._replace(kernel="decode_lowrank")) == {"2048 tokens, rank 160": rows // 2 * (320 + 256)}
    # A box per 16 tokens, 32 bytes per token, and 2,043 of 4,096 tokens.
    assert moved(job._replace(kernel="selection")) == {"Quest, 2048 tokens in pages of 16": rows * 32 + 2 * 8 * 2043 * 512}
    assert moved(job._replace(kernel="bounds"))["boxes of pages of 16"] == rows * 32 + 2 * 32 * 256 * 4
    assert moved(job._replace(kernel="pack")) == {"keys, span 128": rows * (256 + 64 + 4), "values": rows * (256 + 64 + 4)}
    # What is packed is read, and vectors of 256 bytes written; of 128 entries 39 are kept.
    assert moved(job._replace(kernel="unpack")) == {
        "keys, span 128": rows * (64 + 4 + 256),
        "values": rows * (64 + 4 + 256),
    }
    assert moved(job._replace(kernel="expand")) == {"39 of 128": rows * (16 + 78 + 256)}
    assert moved(Job("gather_host", 0, 2))["tokens"] == 2 * 8 * 2048 * 256
    assert moved(Job("merge", 0, 2))["8 parts"] == 2 * 32 * 9 * (128 + 1) * 4
    assert moved(Job("decode", 131072, 1))["range"] == 2**29  # 125 us at 4.3 TB/s


def test_several_sets_of_inputs_where_one_would_stay_in_the_cache():
    shape = Shape(1, 8192, CPU, cache=60 << 20)
    assert shape.dense == 32 << 20
    assert (shape.copies(shape.dense), shape.copies(1 << 30), shape.copies(1)) == (4, 1, 64)
    assert Shape(1, 8192, CPU).copies(1) == 1
    small = Shape(1, 128, CPU, cache=1 << 17, q_heads=4, heads=2, d=32, listed=64)
    sets = next(selection.cases(small)).make()
    assert len(sets) == 16 and len({given[1].data_ptr() for given in sets}) == 16


def spoilt(kernel):
    """The same with the last sequence's results a little off."""

    def change(x):
        if isinstance(x, (tuple, list)):
            return type(x)(*map(change, x)) if hasattr(x, "_fields") else type(x)(map(change, x))
        x = x.clone()
        x[-1:] = x[-1:] * 1.1 if x.is_floating_point() else (x[-1:].long() + 1) % (x.long().max() + 1)
        return x

    def run(*given, **options):
        found = kernel(*given, **options)
        return None if found is None else change(found)

    return run


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("decode", "decode"),
        ("decode_q4", "decode_q4"),
        ("decode_gear", "decode_gear"),
        ("decode_lowrank", "decode_lowrank"),
        ("bounds", "bounds"),
        ("rank", "rank"),
        ("selection", "bounds"),
        ("selection", "rank"),
        ("selection", "cut"),
        ("selection", "decode"),
        ("listing", "cut"),
        ("pack", "pack_codes"),
        ("unpack", "unpack_codes"),
        ("expand", "expand"),
        ("column_mass", "column_mass"),
        ("prefill_sparse", "prefill_sparse"),
        ("kmeans", "assign"),
        ("merge", "merge_parts"),
        ("steady", "Steady.step"),
    ],
)
def test_a_wrong_kernel_gets_no_time(monkeypatch, kernel, name):
    place = f"bench.kernels.{kernel}.{name}"
    right = rows_of(Job(kernel, 128, 2))
    module = bench_gpu.import_module(f"bench.kernels.{kernel}")
    wrong = module
    for part in name.split("."):
        wrong = getattr(wrong, part)
    monkeypatch.setattr(place, spoilt(wrong))
    rows = rows_of(Job(kernel, 128, 2))
    refused = [row for row in own(rows) if "is off by" in row.get("error", "")]
    assert refused and not any("us" in row for row in refused)
    assert all("us" in row for row in own(right))
    peers = [[row["variant"] for row in found if row.get("peer") and "us" in row] for found in (right, rows)]
    assert peers[0] == peers[1]


def test_a_copy_that_copies_nothing_gets_no_time(monkeypatch):
    monkeypatch.setattr("bench.kernels.gather_host.gather_host", lambda *given: None)
    assert all("is off by" in row["error"] for row in rows_of(Job("gather_host", 0, 1)))


def test_nan_is_refused(monkeypatch):
    monkeypatch.setattr("bench.kernels.bounds.bounds", lambda q, *rest: q.new_full((2, 4, 8), float("nan")))
    (row,) = rows_of(Job("bounds", 128, 2))
    assert "is off by inf" in row["error"]


def test_a_case_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    whole = bench_gpu.import_module("bench.kernels.decode").decode

    def decode(*given, page=1, **options):
        if page > 1:
            raise RuntimeError("no pages today")
        return whole(*given, **options)

    monkeypatch.setattr("bench.kernels.decode.decode", decode)
    command = ["--only", "nowhere,decode,bounds", "--contexts", "128", "--batches", "1", "--device", "cpu"]
    assert bench_gpu.main([*command, "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    rows = {(row["kernel"], row["variant"]): row for row in json.loads(path.read_text())["rows"]}
    assert "No module named 'bench.kernels.nowhere'" in rows["nowhere", ""]["error"]
    assert rows["decode", "64 tokens in pages of 16"]["error"] == "RuntimeError: no pages today"
    assert all(
        "us" in rows[key] for key in (("decode", "range"), ("decode", "torch sdpa"), ("bounds", "boxes of pages of 16"))
    )
    assert "no pages today" in capsys.readouterr().out


def test_time_that_runs_out_is_said(tmp_path):
    command = ["--only", "merge,bounds", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path)]
    assert bench_gpu.main(command) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"merge", "bounds"}
    assert all(row["left_out"] == "0 minutes were over" for row in rows)


FRAGILE = """
import os, time
from bench.kernels.case import Case

def case(variant, run):
    return Case("fragile", variant, lambda: [()], run, lambda given, found: 0.0, 0.0, 1000)

def cases(s):
    yield case("before", lambda: None)
    yield case("crash", lambda: os._exit(7))
    yield case("between", lambda: None)
    yield case("hang", lambda: time.sleep(600))
    yield case("after", lambda: None)
"""


def test_a_process_that_dies_or_hangs_takes_one_case_with_it(monkeypatch, tmp_path):
    folder = tmp_path / "bench" / "kernels"
    folder.mkdir(parents=True)
    (folder / "fragile.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [row for kind, _, row in isolated([Job("fragile", 128, 1)], "cpu", 1, patience=3) if kind == "row"]
    assert [row["variant"] for row in rows] == ["before", "crash", "between", "hang", "after"]
    died, hung = "the process ended with code 7", "nothing came for 3 seconds"
    assert [row.get("error") for row in rows] == [None, died, None, hung, None]


def test_targets():
    def row(kernel, variant, context, us, **more):
        return {"kernel": kernel, "variant": variant, "context": context, "batch": 8, "us": us, "graph": True} | more

    rows = [
        row("decode", "range", 8192, 10, share=0.5),
        row("decode", "range", 131072, 1000, share=0.9),
        row("decode", "torch sdpa", 131072, 5000, share=0.1, peer=True),
        row("decode_q4", "4 bits, range per token", 131072, 390),
        row("decode_q4", "8 bits, range per token", 131072, 100),
        row("selection", "Quest", 131072, 130),
        row("merge", "8 parts", None, 4.0),
        row("steady", "full", 8192, 1.0),
    ]
    assert [target.met for target in report.targets(rows)] == [True, True, False, True, True]
    rows.append(row("decode", "range", 32768, 300, share=0.8))
    rows.append({"kernel": "steady", "variant": "quest", "context": 8192, "batch": 8, "error": "no"})
    assert [target.met for target in report.targets(rows)] == [False, True, False, True, False]
    assert {target.met for target in report.targets(rows[:1])} == {None}


def test_a_row_says_what_is_too_much(monkeypatch):
    assert "more than" in rows_of(Job("decode", 1 << 20, 32))[0]["left_out"]
    tiny = measure.shape_of(Job("decode_lowrank", 128, 1), CPU)
    (case,) = decode_lowrank.cases(tiny)
    assert case.held == 128 * (8 + 2 * 32) * 2 > case.moved


def test_entries_of_a_list_are_different():
    ids = Shape(3, 128, CPU, heads=2).chosen(100, 30)
    assert ids.shape == (3, 2, 30) and int(ids.min()) >= 0 and int(ids.max()) < 100
    assert all(len(set(row)) == 30 for row in ids.flatten(0, 1).tolist())
    assert len({tuple(row) for row in ids.flatten(0, 1).tolist()}) == 6
