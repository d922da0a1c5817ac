"""Kernels that must not pass: one needs more registers than there are, one does not compile."""

import torch

from kvlib.kernels.launch import Example, jit, tl


@jit
def greedy(X, Y, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(X + n)
    tl.store(Y + n, x / tl.sum(x))


@jit
def broken(X, N: tl.constexpr):
    tl.store(X + tl.arange(0, N), tl.arange(0, 2 * N))


def examples():
    x = torch.empty(4096)
    yield Example("one warp", lambda: greedy[(1,)](x, x, 4096, num_warps=1, maxnreg=32))
    yield Example("shapes", lambda: broken[(1,)](x, 16))
