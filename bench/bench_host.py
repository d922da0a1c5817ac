"""Decode attention on the CPU in C++, beside the time to read the same bytes and beside torch: python -m bench.bench_host

Llama-3-8B's heads: batch 1, 32 query and 8 KV heads of 128.  Everything is measured in turn, again and again, and of each
the best time counts: a shared machine only adds to one.  Before each call other memory is read and a small call made, as
other layers do in a decode step: keys and values are in no cache then, and the interpreter's own memory is.  "Again" is a
call right after the same one, which finds in the caches what fits in them.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvlib.kernels import host
from kvlib.kernels.host import Codes
from kvlib.kernels.take import take
from kvlib.offload.transfer import host_empty

HEADS, GROUP, D, CHOSEN, RUN = 8, 4, 128, 2048, 16
OTHER = 128 << 20  # bytes read between two calls, several times a processor's caches
SCALE = D**-0.5


def by_products(q, k, v):
    """What torch does best: the group's rows in one product, softmax, another product."""
    s = torch.bmm(q.view(HEADS, GROUP, D), k[0].mT).float().mul_(SCALE)
    return torch.bmm(s.softmax(-1).to(v.dtype), v[0])


def stored(x):
    """x in memory such as a cache keeps it in."""
    return host_empty(tuple(x.shape), x.dtype, "cpu").copy_(x)


def cases(tokens, dense):
    """Functions to time, and the bytes that each reads."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS * GROUP, 1, D)
    found = {}
    for name, dtype in dense.items():
        k, v = (stored(torch.randn(1, HEADS, tokens, D).to(dtype)) for _ in "kv")
        ids = torch.stack([torch.randperm(tokens)[:CHOSEN] for _ in range(HEADS)])[None]
        first = torch.stack([torch.randperm(tokens // RUN)[: CHOSEN // RUN] for _ in range(HEADS)])[None] * RUN
        runs = (first.unsqueeze(-1) + torch.arange(RUN)).flatten(2)
        own = q.to(dtype)
        size = k.nbytes + v.nbytes
        found |= {
            f"read {name}": (lambda k=k, v=v: (host.read(k), host.read(v)), size),
            f"{name}": (lambda q=own, k=k, v=v: host.decode(q, k, v, SCALE), size),
            f"{name}, torch": (lambda q=own, k=k, v=v: by_products(q, k, v), size),
        }
        for where, listed in (("anywhere", ids), (f"in runs of {RUN}", runs)):
            found |= {
                f"{name}, {CHOSEN} {where}": (
                    lambda q=own, k=k, v=v, ids=listed: host.decode(q, k, v, SCALE, ids=ids),
                    size * CHOSEN // tokens,
                ),
                f"{name}, {CHOSEN} {where}, again": (
                    lambda q=own, k=k, v=v, ids=listed: host.decode(q, k, v, SCALE, ids=ids),
                    size * CHOSEN // tokens,
                ),
                f"{name}, {CHOSEN} {where}, torch": (
                    lambda q=own, k=k, v=v, ids=listed: by_products(q, *(take(x, ids, HEADS) for x in (k, v))),
                    size * CHOSEN // tokens,
                ),
            }
    forms = {"8 bit codes": (8, 0), "4 bit codes": (4, 0), "2 bit codes": (2, 0), "2 bits as kivi": (2, 32)}
    for name, (bits, group) in forms.items():
        codes = [stored(torch.randint(0, 256, (1, HEADS, tokens, D * bits // 8), dtype=torch.uint8)) for _ in "kv"]
        if group:  # keys per channel of 32 tokens, values per 32 channels of a token
            ranges = [torch.rand(1, HEADS, tokens // group, 2, D), torch.rand(1, HEADS, tokens, 2, D // group)]
        else:
            ranges = [torch.rand(1, HEADS, tokens, 2, 1) for _ in "kv"]
        k, v = (Codes(x, r.half(), bits, y) for x, r, y in zip(codes, ranges, (group or 1, 1), strict=True))
        size = sum(x.codes.nbytes + x.range.nbytes for x in (k, v))
        found[name] = (lambda k=k, v=v: host.decode_codes(q, k, v, SCALE), size)
        if bits == 8:
            found["read 8 bit codes"] = (
                lambda k=k, v=v: [host.read(x) for x in (k.codes, k.range, v.codes, v.range)],
                size,
            )
    return found


def best(functions, rounds):
    """The best time of each, ms, all measured in turn."""
    times = dict.fromkeys(functions, float("inf"))
    other, (q, k) = torch.zeros(OTHER, dtype=torch.uint8), (torch.randn(1, HEADS, n, D) for n in (GROUP, RUN))
    q = q.view(1, HEADS * GROUP, 1, D)
    ids = torch.arange(RUN).expand(1, HEADS, -1)
    for i in range(rounds + 1):
        for name, (run, _) in functions.items():
            host.read(other)
            if name.endswith("again"):
                run()
            else:
                host.decode(q, k, k, SCALE, ids=ids)
                by_products(q, *[take(k, ids, HEADS)] * 2)
            begin = time.perf_counter()
            run()
            if i:
                times[name] = min(times[name], 1e3 * (time.perf_counter() - begin))
    return times


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 25,
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
) -> None:
    """Print the table."""
    rows = []
    jobs = [(t, n) for t in map(int, threads.split(",")) for n in (8192, 32768, 131072)]
    for count, tokens in track(jobs, "measuring", console=Console(stderr=True), transient=True):
        torch.set_num_threads(count)
        dense = {"bf16": torch.bfloat16} | ({"fp32": torch.float32} if tokens <= 32768 else {})
        functions = cases(tokens, dense)
        for name, ms in best(functions, rounds).items():
            size = functions[name][1]
            rows.append({"threads": count, "tokens": tokens, "case": name, "ms": ms, "GB/s": size / ms / 1e6})
    table = Table("threads", "tokens", "case", "ms", "GB/s")
    for row in rows:
        table.add_row(str(row["threads"]), str(row["tokens"]), row["case"], f"{row['ms']:.2f}", f"{row['GB/s']:.1f}")
    Console().print(table)
    if out is not None:
        processor = next(
            (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
        )
        about = {
            "device": processor or platform.processor(),
            "versions": {"torch": torch.__version__, "host": host.describe()},
            "command": shlex.join(["python", "-m", "bench.bench_host", *sys.argv[1:]]),
            "method": f"best of {rounds} rounds, all in turn, {OTHER >> 20} MiB of other memory read before each",
        }
        out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
