"""Compile Triton kernels for GPUs that are not there, and read off what they would need.

Inside `compiling(80)` or `compiling(90)` a launch on ordinary CPU tensors compiles for that compute capability instead of
running: the wrappers, their specialisation of arguments and their options are those of a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a block may use


class _Absent:
    """A driver for a device that is not there."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self._capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Turn launches into compilations for a compute capability; gives the list of (kernel's name, compiled kernel) that
    they add to.  Raises RuntimeError under TRITON_INTERPRET, where there is nothing to compile."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    found: list[tuple[str, Any]] = []
    stock, active = JITFunction.run, driver.__dict__.get("_active")

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self.device_caches.clear()  # they are kept by device, which is the same one for every capability
        kernel = stock(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        found.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(_Absent(capability))
    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = stock
        driver._active = active


@contextmanager
def naming() -> Iterator[list[str]]:
    """Let launches do nothing but add their kernels' names to the list given."""
    names: list[str] = []
    stock = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> None:
        names.append(self.fn.__name__)

    JITFunction.run = run
    try:
        yield names
    finally:
        JITFunction.run = stock


@dataclass(frozen=True)
class Needs:
    """What a compiled kernel takes: registers per thread, bytes spilled per thread, bytes of shared memory per block, warps
    per block, blocks that fit a multiprocessor, and instructions in its longest loop."""

    registers: int
    spilled: int
    shared: int
    warps: int
    blocks: int
    loop: int

    def bytes_per_clock(self, tile: int) -> float:
        """Bytes per clock that a multiprocessor can take in if each of its four schedulers issues one instruction a clock
        and a round of the loop consumes `tile` bytes: a bound whatever the memory does.  An H200's memory feeds 16.5."""
        return tile / (self.loop * self.warps / 4)


def needs(kernel: Any, capability: int) -> Needs:
    """Read a compiled kernel's needs off its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        registers = int(_found(r"REG:(\d+)", usage))
        ptxas, arch = nvidia.get_ptxas(capability).path, nvidia.sm_arch_from_capability(capability)
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", str(ptx), "-o", str(Path(folder, "out"))],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        spilled = int(_found(r"(\d+) bytes spill stores", said)) + int(_found(r"(\d+) bytes spill loads", said))
        code = _tool("cuobjdump", "-sass", str(cubin))
    shared, warps = int(kernel.metadata.shared), int(kernel.metadata.num_warps)
    fits = min(65536 // (max(registers, 16) * 32 * warps), SHARED[capability] // (shared + 1024), 64 // warps)
    return Needs(registers, spilled, shared, warps, fits, _loop(code))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern} in what a CUDA tool printed: {text[:200]!r}")
    return match.group(1)


def _loop(code: str) -> int:
    """Instructions between the two ends of the longest backward branch; 0 where there is none."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    at = [int(place, 16) for place, _ in lines]
    longest = 0
    for here, (_, text) in zip(at, lines, strict=True):
        match = re.search(r"\bBRA(?:\.\w+)*\s+.*?0x([0-9a-f]+)", text)
        if match and int(match.group(1), 16) < here:
            longest = max(longest, sum(int(match.group(1), 16) <= x <= here for x in at))
    return longest
