"""A GPU's way through the code: on a real one where there is one, else CPU tensors that are taken for its own."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import torch

from kvlib.kernels import fused, ops

REAL = torch.cuda.is_available()
DEVICE = "cuda" if REAL else "cpu"


@contextmanager
def as_gpu(monkeypatch):
    """Operators launch their kernels, without a GPU in Triton's interpreter, and are counted by name."""
    launched = Counter()
    with monkeypatch.context() as patch, nullcontext() if REAL else _played(patch):
        for name, launch in ops.LAUNCHES.items():
            patch.setitem(ops.LAUNCHES, name, _counted(launched, name, launch))
        yield launched


@contextmanager
def _played(patch):
    """CPU tensors say that they are a GPU's, and operators believe them."""
    library = torch.library.Library("kvlib", "IMPL")
    for name in ops.LAUNCHES:
        library.impl(name, lambda *x, name=name, **more: ops.LAUNCHES[name](*x, **more), "CPU", allow_override=True)
    multiply = torch.bmm

    def bmm(a, b, out_dtype=None):  # a CPU does not know of other output types
        return multiply(a, b) if out_dtype is None else multiply(a.to(out_dtype), b.to(out_dtype))

    patch.setattr(torch, "bmm", bmm)
    patch.setattr(torch.Tensor, "is_cuda", True)
    patch.setattr(torch.Tensor, "is_cpu", False)
    patch.setattr(fused, "serves", lambda *_: False)  # other people's kernels do not run here
    try:
        yield
    finally:
        library._destroy()


def _counted(launched, name, launch):
    def run(*arguments, **options):
        launched[name] += 1
        return launch(*arguments, **options)

    return run
