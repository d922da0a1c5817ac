"""Attention on the CPU in C++: a few query rows over dense or coded keys and values, read in place.

host.cpp, and host_unpack.cpp with it, is compiled for this processor when it is first needed, by $CXX or what C++ compiler
there is, and kept in the user's cache folder.  Where there is none, `serves` is false and callers use PyTorch
(`kvlib.kernels.attention`).

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
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kvlib.kernels.ran import note

_SOURCES = [Path(__file__).with_name(name) for name in ("host.cpp", "host_unpack.cpp")]
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_FLAGS = f"-std=c++17 -O3 {_NATIVE} -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -shared -fPIC -w".split()
_CALL = struct.Struct("@55q2d")  # host.cpp's Call
_CHUNK = 512  # slots of a partial result, as in host.cpp
_ATTEND, _SCORES, _SUM = range(3)
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 16}


class Codes(NamedTuple):
    """Keys or values as `kvlib.kernels.quantise` packs them: a value is code * scale + least.

    codes [B, H, T, d * bits / 8] uint8 of 2, 4 or 8 bits.  range fp16, scale and least value: with a span of 1 of each
    token, [B, H, T, 2, groups] for `groups` groups of neighbouring channels; else, for keys only, of each channel over
    `span` neighbouring tokens, [B, H, T / span, 2, d].
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


def _missing(*given: object) -> Any:
    raise RuntimeError(f"there is no compiled library: {describe()}")


class Library(NamedTuple):
    """The compiled functions, if there are any, and what is to be said of them."""

    text: str
    found: bool = False
    run: Callable[[bytes], bool] = _missing
    read: Callable[[int, int, int], int] = _missing
    unpack: Callable[[bytes], None] = _missing
    expand: Callable[[bytes], None] = _missing


_lock = threading.Lock()
_found: Library | None = None


def available() -> bool:
    """Whether there is a compiled library; the first call may compile it."""
    return library().found


def describe() -> str:
    """What computes attention over tensors on the CPU, for reports."""
    return library().text


def read(x: Tensor) -> int:
    """Read contiguous x once and add it up, as 32-bit words: nothing that reads as many bytes can be faster."""
    return library().read(x.data_ptr(), x.nbytes, torch.get_num_threads())


def library() -> Library:
    """What there is; the first call may compile it."""
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _build()
    return _found


def _build() -> Library:
    asked = shlex.split(os.environ.get("CXX", ""))
    path = next(filter(None, map(shutil.which, asked[:1] or ("c++", "g++", "clang++"))), None)
    if path is None:
        return Library("torch (no C++ compiler found)")
    try:
        return _loaded(path, asked[1:])
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(f"attention on the CPU is left to torch, as the C++ compiler failed: {reason}", stacklevel=2)
        return Library(f"torch (the compiler failed: {reason.splitlines()[0]})")


def _loaded(compiler: str, options: list[str]) -> Library:
    """The library, compiled unless the cache folder has it; other processes may do the same at the same time."""
    command = [compiler, *_FLAGS, *options]
    version = _output(compiler, *options, "--version")
    made_of = "\0".join([*(source.read_text() for source in _SOURCES), *command, version, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlib" / "host"
    path = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _output(*command, *map(str, _SOURCES), "-o", f"{work}/host.so")
            os.replace(f"{work}/host.so", path)
    found = ctypes.CDLL(str(path))
    run, read, isa = found.kvlib_run, found.kvlib_read, found.kvlib_isa
    run.argtypes, run.restype = [ctypes.c_char_p], ctypes.c_bool
    for function in (found.kvlib_unpack, found.kvlib_expand):
        function.argtypes, function.restype = [ctypes.c_char_p], None
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], ctypes.c_uint32
    isa.restype = ctypes.c_char_p
    number = re.search(r"\d+(\.\d+)+", version)
    name = Path(compiler).name + (f" {number[0]}" if number else "")
    return Library(f"C++ ({name}, {isa().decode()})", True, run, read, found.kvlib_unpack, found.kvlib_expand)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _processor() -> str:
    """The processor's model and what it can do: several may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}))


def serves(q: Tensor | None, k: Side | None, v: Side | None) -> bool:
    """Whether the functions below take these; else use PyTorch.

    They take CPU tensors with a contiguous last axis, fp32, bf16 or fp16, of head sizes that are multiples of 8 from 16 to
    512; and codes whose rows have 16 bytes or more, with one range per token, or one per 16 k channels where rows have 16 j
    bytes, or per channel.  Nothing that needs a gradient, nothing under torch.compile.
    """
    if torch.compiler.is_compiling():
        return False
    dense = [x for x in (q, k, v) if isinstance(x, Tensor)]
    coded = [x for x in (k, v) if isinstance(x, Codes)]
    return (
        all(_fits(x) for x in dense)
        and all(_codes_fit(x) for x in coded)
        and (q is None or k is None or q.shape[-1] == _size(k))
        and (not isinstance(v, Codes) or v.span == 1)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in dense))
        and available()
    )


def _fits(x: Tensor) -> bool:
    size = x.shape[-1]
    whole = 16 <= size <= 512 and not size % 8
    return whole and x.is_cpu and x.dtype in _FORMATS and x.stride(-1) == 1


def _codes_fit(x: Codes) -> bool:
    codes, found = x.codes, x.range
    row, size, groups = codes.shape[-1], x.size, found.shape[-1]
    whole = x.bits in (2, 4, 8) and row >= 16 and size <= 512 and not size % 8
    if x.span > 1:
        whole &= groups == size and found.shape[2] * x.span >= codes.shape[2]
    else:
        whole &= (
            found.shape[2] == codes.shape[2]
            and not size % groups
            and (groups == 1 or not (size // groups % 16 or row % 16))
        )
    typed = codes.dtype == torch.uint8 and found.dtype == torch.float16 and codes.is_cpu and found.is_cpu
    dense = codes.stride(-1) == 1 and (groups == 1 or found.stride(-1) == 1) and found.stride(-2) == groups
    return whole and typed and dense and found.shape[:2] == codes.shape[:2] and found.shape[3] == 2


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
    """Attention of q [B, Hq, n, d] over k [B, H, T, d], v [B, H, T, dv]: out [B, Hq, n, dv] and lse [B, Hq, n], both fp32.

    Row b sees keys start[b] <= t < length[b] (int64 [B]; None: 0 and T), with `causal` query row i only t <= T - n + i.
    With ids int64 [B, H', m], H' being 1, H or Hq, it sees keys ids[b, h, j] instead, j < length[b] (or length [B, H']),
    twice where they come twice.  Logits are q.k * scale, then softcap * tanh(logit / softcap), then plus bias fp32
    [B, 1 or H or Hq, T or m], which may be -inf where keys and values are finite; lse is natural.  With `probabilities`, of
    a single row, also p [B, Hq, T or m] fp32, 0 where hidden.  A row that sees no key gives (0, -inf).  Slots outside of
    start and length may hold anything.

    Raises ValueError where shapes do not fit or ids name no key, RuntimeError where there is no library.
    """
    if ids is not None and (start is not None or causal):
        raise ValueError("ids say which keys are seen: give no start and no causal with them")
    return _Call(q, k, v, ids).attend(scale, softcap, probabilities, start, length, causal, bias)


def decode_codes(
    q: Tensor,
    k: Side,
    v: Side,
    scale: float,
    *,
    length: Tensor | None = None,
    ids: Tensor | None = None,
    softcap: float | None = None,
    probabilities: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`decode` over keys and values of which either may be `Codes`."""
    return _Call(q, k, v, ids).attend(scale, softcap, probabilities, None, length)


def scores(q: Tensor, k: Codes, ids: Tensor | None = None) -> Tensor:
    """Products q.k of q [B, Hq, n, d] with all keys, or those of ids [B, H', m]: [B, Hq, n, T or m] fp32."""
    call = _Call(q, k, None, ids)
    out = q.new_empty((*q.shape[:3], call.slots), dtype=torch.float32)
    call.run(_SCORES, 1.0, 0.0, out)
    return out


def weighted_sum(p: Tensor, v: Codes, ids: Tensor | None = None) -> Tensor:
    """Values under weights p [B, Hq, n, T or m] fp32, of all tokens or those of ids [B, H', m]: [B, Hq, n, dv] fp32."""
    call = _Call(p, None, v, ids)
    if not p.is_cpu or p.dtype != torch.float32 or p.shape[3] != call.slots or (p.stride(3) != 1 and call.slots > 1):
        raise ValueError(f"p must be float32 for {call.slots} tokens and contiguous there, got {p.dtype} {tuple(p.shape)}")
    out = p.new_empty((*p.shape[:3], v.size))
    call.run(_SUM, 1.0, 0.0, out)
    return out


class _Call:
    """A call's tensors, checked, and its sizes."""

    def __init__(self, q: Tensor, k: Side | None, v: Side | None, ids: Tensor | None):
        self.q, self.k, self.v, self.ids = q, k, v, ids
        self.batch, self.q_heads, self.n, d = q.shape
        shapes = [(x.codes if isinstance(x, Codes) else x).shape[:3] for x in (k, v) if x is not None]
        self.heads, self.keys = shapes[0][1:]
        if shapes[0] != shapes[-1] or shapes[0][0] != self.batch or self.q_heads % self.heads:
            raise ValueError(
                f"q {tuple(q.shape)} does not fit keys and values of [B, H, T] = {', '.join(map(str, map(tuple, shapes)))}"
            )
        if k is not None and (d != _size(k) or not _fits(q)):
            raise ValueError(f"q of {q.dtype} {tuple(q.shape)} does not fit keys of {_size(k)} channels")
        self.lists, self.slots = self.heads, self.keys
        if ids is not None:
            if not ids.is_cpu or ids.dtype != torch.int64 or ids.dim() != 3 or (ids.shape[2] > 1 and ids.stride(2) != 1):
                raise ValueError(
                    f"ids must be int64 [B, H', m], the last axis contiguous, got {ids.dtype} {tuple(ids.shape)}"
                )
            if ids.shape[0] != self.batch or ids.shape[1] not in (1, self.heads, self.q_heads):
                raise ValueError(
                    f"ids {tuple(ids.shape)} do not fit {self.batch} rows of {self.heads} or {self.q_heads} heads"
                )
            self.lists, self.slots = max(self.heads, ids.shape[1]), ids.shape[2]

    def attend(
        self,
        scale: float,
        softcap: float | None,
        probabilities: bool,
        start: Tensor | None,
        length: Tensor | None,
        causal: bool = False,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """out, lse and p."""
        assert self.v is not None
        if probabilities and self.n != 1:
            raise ValueError(f"probabilities are of one query row: q has {self.n}")
        p = self.q.new_empty((self.batch, self.q_heads, self.slots), dtype=torch.float32) if probabilities else None
        out = self.q.new_empty((self.batch, self.q_heads, self.n, _size(self.v)), dtype=torch.float32)
        lse = out.new_empty((self.batch, self.q_heads, self.n))
        seen = (*self._start(start), *self._length(length), *self._bias(bias))
        self.run(_ATTEND, scale, softcap or 0.0, out, lse, p, seen, causal)
        return out, lse, p

    def run(
        self,
        what: int,
        scale: float,
        softcap: float,
        out: Tensor,
        lse: Tensor | None = None,
        p: Tensor | None = None,
        seen: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0, 1),
        causal: bool = False,
    ) -> None:
        """Fill out, lse and p."""
        note("codes" if isinstance(self.k, Codes) or isinstance(self.v, Codes) else "decode", describe())
        q, ids, item = self.q, self.ids, self.q.element_size()
        by_row, by_head, by_query, _ = q.stride()
        parts = -(-self.slots // _CHUNK) * (0 if self.v is None else _size(self.v) + 2)
        work = out.new_empty(self.batch * self.q_heads * self.n * parts)
        call = _CALL.pack(
            *_packed(self.k),
            *_packed(self.v),
            *(q.data_ptr(), _FORMATS[q.dtype], by_row * item, by_head * item, by_query * item),
            *((0, 0, 0) if ids is None else (ids.data_ptr(), ids.stride(0), _step(ids))),
            *seen,
            *(0 if p is None else p.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), work.data_ptr()),
            *(self.batch, self.heads, self.q_heads, self.lists, self.n, self.keys, self.slots, causal, what),
            *(torch.get_num_threads(), scale, softcap),
        )
        if not library().run(call):
            assert ids is not None
            raise ValueError(f"ids reach from {int(ids.min())} to {int(ids.max())}, but there are {self.keys} keys")

    def _start(self, start: Tensor | None) -> tuple[int, int]:
        if start is None:
            return 0, 0
        if not start.is_cpu or start.dtype != torch.int64 or start.shape != (self.batch,):
            raise ValueError(f"start must be int64 [{self.batch}], got {start.dtype} {tuple(start.shape)}")
        return start.data_ptr(), start.stride(0)

    def _length(self, length: Tensor | None) -> tuple[int, int, int]:
        if length is None:
            return 0, 0, 0
        fits = tuple(length.shape) in ((self.batch,), (self.batch, 1), (self.batch, self.lists))
        if not length.is_cpu or length.dtype != torch.int64 or not fits:
            want = f"int64 [{self.batch}] or [{self.batch}, {self.lists}]"
            raise ValueError(f"length must be {want}, got {length.dtype} {tuple(length.shape)}")
        return length.data_ptr(), length.stride(0), _step(length) if length.dim() == 2 else 0

    def _bias(self, bias: Tensor | None) -> tuple[int, int, int, int]:
        if bias is None:
            return 0, 0, 0, 1
        heads = bias.shape[1] if bias.dim() == 3 and bias.shape[1] in (1, self.heads, self.q_heads) else 0
        whole = tuple(bias.shape) == (self.batch, heads, self.slots) and (self.slots == 1 or bias.stride(2) == 1)
        if not bias.is_cpu or bias.dtype != torch.float32 or not whole:
            want = f"float32 [{self.batch}, 1 or {self.heads} or {self.q_heads}, {self.slots}], the last axis contiguous"
            raise ValueError(f"bias must be {want}, got {bias.dtype} {tuple(bias.shape)}")
        return bias.data_ptr(), bias.stride(0), _step(bias), heads


def _packed(side: Side | None) -> tuple[int, ...]:
    """host.cpp's Side."""
    if side is None:
        return (0,) * 12
    if isinstance(side, Tensor):
        if not _fits(side):
            raise ValueError(f"keys and values of {side.dtype} {tuple(side.shape)} are not served")
        row, head, token, _ = side.stride()
        item = side.element_size()
        return side.data_ptr(), _FORMATS[side.dtype], side.shape[3], row * item, head * item, token * item, 0, 0, 0, 0, 1, 1
    codes, found, bits, span = side
    if not _codes_fit(side):
        shapes = f"{tuple(codes.shape)} of {bits} bits with ranges {tuple(found.shape)} over {span} tokens"
        raise ValueError(f"codes {shapes} are not served")
    groups = found.shape[4] if span == 1 else 1
    return codes.data_ptr(), bits, side.size, *codes.stride()[:3], found.data_ptr(), *found.stride()[:3], groups, span


def _size(side: Side) -> int:
    return side.size if isinstance(side, Codes) else side.shape[-1]


def _step(x: Tensor) -> int:
    """The stride of axis 1; 0 where one entry serves all."""
    return x.stride(1) if x.shape[1] > 1 else 0
