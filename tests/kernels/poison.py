"""What every kernel's test shares: where kernels run, memory that says so when it was not written, and float64."""

import contextlib

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU kernels are interpreted
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@contextlib.contextmanager
def poisoned():
    """Fresh memory inside holds NaN, or the largest integers."""
    empty, new_empty, like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poison(x):
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max) if x.numel() else x

    torch.empty = lambda *a, **k: poison(empty(*a, **k))
    torch.empty_like = lambda *a, **k: poison(like(*a, **k))
    torch.Tensor.new_empty = lambda self, *a, **k: poison(new_empty(self, *a, **k))
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = empty, like, new_empty


def error(a, b):
    """How far a is from b, as a share of b's norm."""
    a, b = a.cpu().double(), b.cpu().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def close(found, out, lse, dtype):
    """Whether (out, lse) are those of float64, dead rows (0, -inf) included."""
    found_out, found_lse = (x.cpu().double() for x in found)
    dead = lse == float("-inf")
    assert found_out.isfinite().all()
    assert (found_lse[dead] == float("-inf")).all() and (found_out[dead] == 0).all()
    assert error(found_out, out) <= ERROR[dtype]
    if not dead.all():
        assert (found_lse - lse)[~dead].abs().max() < 5e-3
