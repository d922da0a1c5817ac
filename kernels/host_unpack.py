"""Codes and pruned vectors as vectors again, on the CPU in C++ where there is a compiler: for `unpack` and `expand`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from kvlib.kernels import host
from kvlib.kernels.ran import note

_UNPACK, _EXPAND = struct.Struct("@26q"), struct.Struct("@17q")  # host_unpack.cpp's
_MOST = 1024  # channels of a vector, as there
_NOTHING = (0,) * 5


def serves(d: int, *parts: Tensor | None) -> bool:
    """Whether the functions below take such parts of vectors of d channels: on the CPU, the last axis contiguous."""
    if torch.compiler.is_compiling() or d > _MOST:
        return False
    given = [x for x in parts if x is not None]
    return all(x.is_cpu and x.stride(-1) == 1 and not x.requires_grad for x in given) and host.available()


def unpack(
    codes: Tensor, found: Tensor, bits: int, span: int, upper: Tensor | None, levels: Tensor | None, out: Tensor
) -> Tensor:
    """Fill `out` [B, H, m, d] fp32; the other arguments as of `kvlib.kernels.unpack.unpack_codes`."""
    note("codes", host.describe())
    batch, heads, m, d = out.shape
    call = _UNPACK.pack(
        *_planes(codes, bits),
        *(_NOTHING if upper is None else _planes(upper, upper.shape[3] * 8 // d)),
        *(found.data_ptr(), found.dtype == torch.float32, *found.stride()[:4], found.shape[4]),
        *(max(1, m) if found.shape[2] == 1 else span, found.shape[3] == 2),
        *(0 if levels is None else levels.data_ptr(), out.data_ptr()),
        *(batch, heads, m, d, torch.get_num_threads()),
    )
    host.library().unpack(call)
    return out


def expand(bitmap: Tensor, kept: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [B, H, m, d], of the type of `kept`; the other arguments as of `kvlib.kernels.expand.expand`."""
    note("codes", host.describe())
    item = kept.element_size()
    call = _EXPAND.pack(
        *_planes(bitmap, 1),
        *(kept.data_ptr(), item, *(item * step for step in kept.stride()[:3]), kept.shape[3], out.data_ptr()),
        *(*out.shape, torch.get_num_threads()),
    )
    host.library().expand(call)
    return out


def _planes(x: Tensor, bits: int) -> tuple[int, ...]:
    """host_unpack.cpp's Planes."""
    return x.data_ptr(), bits, *x.stride()[:3]
