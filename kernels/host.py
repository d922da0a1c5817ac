"""Attention on the CPU in C++: a few query rows over dense or coded keys and values, read in place.

host.cpp is compiled for this processor when it is first needed, with whatever C++ compiler there is, and kept in the user's
cache folder.  Without a compiler `available` is false, and callers use PyTorch (`kvlib.kernels.attention`).

Scores, sums and outputs are fp32.  Work is cut into fixed pieces, so results have the same bits on any number of threads
(`torch.get_num_threads()`).  Query head h reads KV head h // (Hq / H).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("host.cpp")
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_FLAGS = f"-std=c++17 -O3 {_NATIVE} -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -shared -fPIC -w".split()
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 16}
_BITS = (2, 4, 8)
_CHUNK = 1024  # host.cpp's
_LEAST, _MOST = 16, 512  # a register of channels, and what its buffers hold
_CALL = struct.Struct("@55q2d")  # host.cpp's Call
_ATTEND, _SCORES, _SUM = range(3)
_NO_SIDE = (0,) * 12


class Codes(NamedTuple):
    """Keys or values as `kvlib.kernels.quantise` packs them: a value is code * scale + least.

    codes [B, H, T, d * bits / 8] uint8, bits 2, 4 or 8.  range fp16: with a span of 1 of each token, [B, H, T, 2, groups], for
    `groups` ranges of neighbouring channels; else, for keys only, of each channel over `span` neighbouring tokens,
    [B, H, T / span, 2, d].
    """

    codes: Tensor
    range: Tensor
    bits: int
    span: int = 1

    @property
    def size(self) -> int:
        """Channels d."""
        return self.codes.shape[-1] * 8 // self.bits


Side: TypeAlias = Tensor | Codes


class _Library(NamedTuple):
    run: Callable[[bytes], bool] | None
    read: Callable[[int, int, int], int] | None
    text: str


_lock = threading.Lock()
_found: _Library | None = None


def available() -> bool:
    """Whether there is a compiled library; the first call builds it."""
    return _library().run is not None


def describe() -> str:
    """What attention on the CPU is computed with, for reports."""
    return _library().text


def _library() -> _Library:
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _build()
    return _found


def _build() -> _Library:
    asked = shlex.split(os.environ.get("CXX", ""))
    paths = [shutil.which(name) for name in (asked[:1] or ("c++", "g++", "clang++"))]
    path = next(filter(None, paths), None)
    if path is None:
        return _Library(None, None, "torch (no C++ compiler found)")
    try:
        return _loaded([path, *asked[1:]])
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        warnings.warn(f"attention on the CPU runs in torch, more slowly: the C++ compiler failed: {reason}", stacklevel=4)
        return _Library(None, None, f"torch (the compiler failed: {reason.splitlines()[0]})")


def _loaded(compiler: list[str]) -> _Library:
    """The library, compiled unless the cache folder has it; other processes may be doing the same."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (_SOURCE.read_text(), " ".join(compiler + _FLAGS), version, _processor())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlib" / "host"
    path = folder / (hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + ".so")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / path.name
            subprocess.run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, text=True, check=True)
            os.replace(made, path)
    library = ctypes.CDLL(str(path))
    run, read, isa = library.kvlib_run, library.kvlib_read, library.kvlib_isa
    run.argtypes, run.restype = [ctypes.c_char_p], ctypes.c_bool
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], ctypes.c_uint32
    isa.restype = ctypes.c_char_p
    number = re.search(r"\d+(\.\d+)+", version)
    name = f"{Path(compiler[0]).name} {number[0] if number else ''}".strip()
    return _Library(run, read, f"C++ ({name}, {isa().decode()})")


def _processor() -> str:
    """The processor's model and what it can do: a home folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))


def serves(q: Tensor, k: Side, v: Side) -> bool:
    """Whether the functions below take these; else use PyTorch.

    They take CPU tensors whose last axis is contiguous, fp32, bf16 or fp16, of head sizes that are multiples of 8 from 16 to
    512, and codes whose rows have at least 16 bytes; with several ranges per token these must be of multiples of 16 channels,
    and so must d * bits / 8.  Nothing that needs a gradient.
    """
    if torch.compiler.is_compiling() or (q.requires_grad and torch.is_grad_enabled()):
        return False
    d = k.size if isinstance(k, Codes) else k.shape[-1]
    dense = [x for x in (q, k, v) if isinstance(x, Tensor)]
    coded = [x for x in (k, v) if isinstance(x, Codes)]
    return (
        q.shape[-1] == d
        and (isinstance(v, Tensor) or v.span == 1)
        and all(_dense_fits(x) for x in dense)
        and all(_codes_fit(x) for x in coded)
        and available()
    )


def _dense_fits(x: Tensor) -> bool:
    size = x.shape[-1]
    whole = _LEAST <= size <= _MOST and size % 8 == 0
    return whole and x.dtype in _FORMATS and x.stride(-1) == 1 and x.device.type == "cpu"


def _codes_fit(x: Codes) -> bool:
    codes, found, d = x.codes, x.range, x.size
    whole = x.bits in _BITS and codes.shape[-1] >= _LEAST and d <= _MOST and d % 8 == 0
    typed = codes.dtype == torch.uint8 and found.dtype == torch.float16 and codes.device.type == found.device.type == "cpu"
    dense = codes.stride(-1) == 1 and found.stride(-1) == 1 and found.stride(-2) == found.shape[-1]
    groups = found.shape[-1] if x.span == 1 else 1
    return whole and typed and dense and (groups == 1 or not (d // groups % 16 or codes.shape[-1] % 16))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    ids: Tensor | None = None,
    start: Tensor | None = None,
    length: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    probabilities: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of q [B, Hq, n, d] over k [B, H, T, d], v [B, H, T, dv]: out [B, Hq, n, dv], lse [B, Hq, n] natural, both fp32.

    Row b sees keys start[b] <= t < length[b] (int64 [B], or None: 0 and T) and with `causal` query row i only t <= T - n + i.
    With ids int64 [B, H', m], H' being 1, H or Hq, it sees keys ids[b, h, j] with j < length[b] (or length [B, H']) instead,
    twice where they come twice.  Logits are q.k * scale, then softcap * tanh(logit / softcap), then plus bias fp32
    [B, 1, H or Hq, T or m], which may be -inf where the key is finite.  With `probabilities`, for n = 1, also p [B, Hq, T or m]
    fp32, 0 where hidden.  A row that sees no key gives (0, -inf).  What lies outside of start and length is never read.
    Raises ValueError where shapes do not fit or ids name no key, RuntimeError where there is no library.
    """
    if probabilities and q.shape[2] != 1:
        raise ValueError(f"probabilities are of one query row: q has {q.shape[2]}")
    if ids is not None and (start is not None or causal):
        raise ValueError("ids say which keys are seen: give no start and no causal with them")
    call = _Call(q, k, v, ids)
    out, lse = call.outputs()
    p = q.new_empty((call.batch, call.q_heads, call.slots), dtype=torch.float32) if probabilities else None
    call.run(_ATTEND, scale, softcap or 0.0, out, lse, p, start=start, length=length, causal=causal, bias=bias)
    return out, lse, p


def decode_codes(
    q: Tensor,
    k: Side,
    v: Side,
    scale: float,
    *,
    length: Tensor | None = None,
    ids: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` over keys and values of which either may be `Codes`: out and lse."""
    call = _Call(q, k, v, ids)
    out, lse = call.outputs()
    call.run(_ATTEND, scale, softcap or 0.0, out, lse, None, length=length)
    return out, lse


def scores(q: Tensor, k: Codes, ids: Tensor | None = None) -> Tensor:
    """Products q.k of q [B, Hq, n, d] with all keys, or those of ids [B, H', m]: [B, Hq, n, T or m] fp32."""
    call = _Call(q, k, None, ids)
    out = q.new_empty((*q.shape[:3], call.slots), dtype=torch.float32)
    call.run(_SCORES, 1.0, 0.0, out)
    return out


def weighted_sum(p: Tensor, v: Codes, ids: Tensor | None = None) -> Tensor:
    """Values under weights p [B, Hq, n, T or m] fp32, of all tokens or those of ids [B, H', m]: [B, Hq, n, dv] fp32."""
    if p.dtype != torch.float32 or p.stride(-1) != 1:
        raise ValueError(f"p must be float32 with a contiguous last axis, got {p.dtype} with strides {p.stride()}")
    call = _Call(p, None, v, ids)
    if p.shape[3] != call.slots:
        raise ValueError(f"p has weights for {p.shape[3]} tokens, but there are {call.slots}")
    out = p.new_empty((*p.shape[:3], v.size))
    call.run(_SUM, 1.0, 0.0, out)
    return out


class _Call:
    """The tensors of a call, checked, and its sizes."""

    def __init__(self, q: Tensor, k: Side | None, v: Side | None, ids: Tensor | None):
        self.q, self.k, self.v, self.ids = q, k, v, ids
        self.batch, self.q_heads, self.n, d = q.shape
        data = [x.codes if isinstance(x, Codes) else x for x in (k, v) if x is not None]
        _, self.heads, self.keys, _ = data[0].shape
        sides = [tuple(x.shape[:3]) for x in data]
        if any(shape != (self.batch, self.heads, self.keys) for shape in sides) or self.q_heads % self.heads:
            raise ValueError(f"q of {tuple(q.shape)} does not fit keys and values of [B, H, T] = {sides}")
        if k is not None and d != _size(k):
            raise ValueError(f"q has {d} channels, k has {_size(k)}")
        self.lists, self.slots = self.heads, self.keys
        if ids is not None:
            if ids.dtype != torch.int64 or ids.dim() != 3 or (ids.stride(-1) != 1 and ids.shape[-1] > 1):
                raise ValueError(
                    f"ids must be int64 [B, H', m] with a contiguous last axis, got {ids.dtype} {tuple(ids.shape)}"
                )
            if ids.shape[0] != self.batch or ids.shape[1] not in (1, self.heads, self.q_heads):
                raise ValueError(
                    f"ids of {tuple(ids.shape)} do not fit {self.batch} rows of {self.heads} or {self.q_heads} heads"
                )
            self.lists, self.slots = max(self.heads, ids.shape[1]), ids.shape[2]

    def outputs(self) -> tuple[Tensor, Tensor]:
        """out and lse, to be filled."""
        assert self.v is not None
        shape = (self.batch, self.q_heads, self.n)
        return self.q.new_empty((*shape, _size(self.v)), dtype=torch.float32), self.q.new_empty(shape, dtype=torch.float32)

    def run(
        self,
        what: int,
        scale: float,
        softcap: float,
        out: Tensor,
        lse: Tensor | None = None,
        p: Tensor | None = None,
        *,
        start: Tensor | None = None,
        length: Tensor | None = None,
        causal: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        """Fill out, lse and p."""
        library = _library()
        if library.run is None:
            raise RuntimeError(f"attention in C++ is not to be had here: {library.text}")
        q, ids, item = self.q, self.ids, self.q.element_size()
        rows = self.batch * self.q_heads * self.n
        size = 0 if self.v is None else _size(self.v)
        work = out.new_empty(rows * -(-self.slots // _CHUNK) * (size + 2)) if size else None
        call = _CALL.pack(
            *(_NO_SIDE if self.k is None else self._side(self.k)),
            *(_NO_SIDE if self.v is None else self._side(self.v)),
            *(q.data_ptr(), _FORMATS[q.dtype], q.stride(0) * item, q.stride(1) * item, q.stride(2) * item),
            *((0, 0, 0) if ids is None else (ids.data_ptr(), ids.stride(0), _step(ids))),
            *self._start(start),
            *self._length(length),
            *self._bias(bias),
            *(0 if x is None else x.data_ptr() for x in (p, out, lse, work)),
            *(self.batch, self.heads, self.q_heads, self.lists, self.n, self.keys, self.slots, causal, what),
            *(torch.get_num_threads(), scale, softcap),
        )
        if not library.run(call):
            assert ids is not None
            raise ValueError(f"ids reach from {int(ids.min())} to {int(ids.max())}, but there are {self.keys} keys")

    def _side(self, side: Side) -> tuple[int, ...]:
        if isinstance(side, Tensor):
            if not _dense_fits(side):
                raise ValueError(f"keys and values of {side.dtype} {tuple(side.shape)} are not served")
            item = side.element_size()
            strides = (side.stride(0) * item, side.stride(1) * item, side.stride(2) * item)
            return side.data_ptr(), _FORMATS[side.dtype], side.shape[3], *strides, *(0, 0, 0, 0, 1, 1)
        codes, found, _, span = side
        groups = found.shape[-1] if span == 1 else 1
        spans = -(-self.keys // span)
        fits = found.shape[:2] == codes.shape[:2] and found.shape[2] >= spans and found.shape[3] == 2
        if not fits or side.size % found.shape[4] or (span > 1 and found.shape[4] != side.size) or not _codes_fit(side):
            raise ValueError(
                f"codes {tuple(codes.shape)} of {side.bits} bits with ranges {tuple(found.shape)} over {span} tokens"
                " are not served"
            )
        strides = (codes.stride(0), codes.stride(1), codes.stride(2))
        ranges = (found.data_ptr(), found.stride(0), found.stride(1), found.stride(2))
        return codes.data_ptr(), side.bits, side.size, *strides, *ranges, groups, span

    def _start(self, start: Tensor | None) -> tuple[int, int]:
        if start is None:
            return 0, 0
        if start.dtype != torch.int64 or start.shape != (self.batch,):
            raise ValueError(f"start must be int64 [{self.batch}], got {start.dtype} {tuple(start.shape)}")
        return start.data_ptr(), start.stride(0)

    def _length(self, length: Tensor | None) -> tuple[int, int, int]:
        if length is None:
            return 0, 0, 0
        lists = length.shape[1] if length.dim() == 2 else 1
        if length.dtype != torch.int64 or length.shape[:1] != (self.batch,) or lists not in (1, self.lists):
            want = f"int64 [{self.batch}] or [{self.batch}, {self.lists}]"
            raise ValueError(f"length must be {want}, got {length.dtype} {tuple(length.shape)}")
        return length.data_ptr(), length.stride(0), _step(length) if length.dim() == 2 else 0

    def _bias(self, bias: Tensor | None) -> tuple[int, int, int, int]:
        if bias is None:
            return 0, 0, 0, 1
        heads = bias.shape[1]
        fits = bias.shape == (self.batch, heads, self.slots) and heads in (1, self.heads, self.q_heads)
        if bias.dtype != torch.float32 or not fits or bias.stride(-1) != 1:
            want = f"float32 [{self.batch}, 1, {self.heads} or {self.q_heads}, {self.slots}], its last axis contiguous"
            raise ValueError(f"bias must be {want}; got {bias.dtype} {tuple(bias.shape)}")
        return bias.data_ptr(), bias.stride(0), _step(bias), heads


def _size(side: Side) -> int:
    return side.size if isinstance(side, Codes) else side.shape[-1]


def _step(x: Tensor) -> int:
    """The stride of axis 1, 0 where one entry serves all."""
    return x.stride(1) if x.shape[1] > 1 else 0
