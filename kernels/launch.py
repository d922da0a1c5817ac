"""What every Triton kernel here shares: products and casts that also hold in the interpreter, one step of softmax, sizes.

`TRITON_INTERPRET=1` before the first import runs all kernels on CPU tensors, in NumPy.  Its half-precision arithmetic is
not a GPU's: bf16 products and sums work on the bit patterns, and a cast to bf16 truncates.  Hence `dot` and `cast`, which
give there what a GPU gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    triton: Any
    tl: Any
elif find_spec("triton") is None:  # nobody can launch a kernel then, but the torch references beside them still serve

    class _Missing:
        @staticmethod
        def jit(function=None, **options):
            """Leave a kernel as the text it is."""
            return function if function is not None else lambda kernel: kernel

        constexpr = staticmethod(lambda value: value)

    triton = tl = _Missing
else:
    import triton
    import triton.language as tl

jit = triton.jit
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@jit
def dot(a, b, acc):
    """a b + acc (None: 0) in fp32; fp32 operands are not rounded to tf32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def cast(x, DT: tl.constexpr):
    """fp32 x as DT, rounded to nearest even."""
    if INTERPRET and DT == tl.bfloat16:
        b = x.to(tl.float32).to(tl.uint32, bitcast=True)
        r = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, r, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DT)


@jit
def softcapped(s, CAP: tl.constexpr):
    """CAP * tanh(s / CAP) of fp32 s, s itself where CAP is 0; in exponentials whose arguments are never positive."""
    if CAP > 0:
        e = tl.exp2(tl.abs(s) * (-2.8853900817779268 / CAP))
        t = CAP * (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0, -t, t)
    return s


@jit
def softmax_step(s, m, total):
    """One step of the online softmax in base 2: s [rows, tokens], -inf where hidden; returns p, alpha, m, total.

    A row hidden so far has m = -inf; subtracting 0 instead makes each of its terms exp2(-inf) = 0, not NaN.
    """
    top = tl.maximum(m, tl.max(s, axis=1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - safe[:, None])
    alpha = tl.exp2(m - safe)
    return p, alpha, top, total * alpha + tl.sum(p, axis=1)


@jit
def find_row(LENGTH, w, R, CHUNK: tl.constexpr, R_BLOCK: tl.constexpr):
    """Which row owns work item w, where each row of LENGTH [R] tokens has ceil(length / CHUNK) items: (row, place among
    the row's items); row is R past the last item.  Every program counts for itself: no plan is made or waited for."""
    offs = tl.arange(0, R_BLOCK)
    items = tl.cdiv(tl.load(LENGTH + offs, mask=offs < R, other=0), CHUNK)
    ends = tl.cumsum(items, 0)
    row = tl.sum(((ends <= w) & (offs < R)).to(tl.int32), axis=0)
    return row, w - tl.sum(tl.where(offs < row, items, 0), axis=0)


@jit
def first_item(LENGTH, row, CHUNK: tl.constexpr, R_BLOCK: tl.constexpr):
    """The first work item of a row; see `find_row`."""
    offs = tl.arange(0, R_BLOCK)
    items = tl.cdiv(tl.load(LENGTH + offs, mask=offs < row, other=0), CHUNK)
    return tl.sum(items, axis=0)


def power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


class Example(NamedTuple):
    """A launch that `kvlib.kernels.check` compiles: its name, the launch on CPU tensors, and for kernels whose speed is
    memory's the bytes that a round of the main loop reads, by kernel."""

    name: str
    launch: Callable[[], object]
    tile: dict[str, int] | None = None
