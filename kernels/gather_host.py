"""Rows of page-locked host memory straight into device slots: the kernel reads over the bus what the device wants, so that
the host need not know what that is.

About a hundred programs keep the bus busy, and leave the multiprocessors to whoever computes meanwhile.
Source: arXiv 2410.21465 (ShadowKV) fetches misses so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels.launch import Example, jit, power, tl
from kvlib.kernels.ops import register

_PROGRAMS = 128
_TILE = 1024  # words that a program moves at once
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


@jit(do_not_specialize=["entries", "asked", "rows", "slots"])
def gather_rows(
    SOURCE,
    TARGET,
    WANTED,
    PLACE,
    entries,
    asked,  # entries of a list
    rows,
    slots,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Every so many tiles of entries x words of a row."""
    PIECES: tl.constexpr = (WORDS + BLOCK_W - 1) // BLOCK_W
    for tile in range(tl.program_id(0), tl.cdiv(entries, BLOCK_N) * PIECES, tl.num_programs(0)):
        entry = tile // PIECES * BLOCK_N + tl.arange(0, BLOCK_N)
        word = tile % PIECES * BLOCK_W + tl.arange(0, BLOCK_W)
        wanted = tl.load(WANTED + entry, mask=entry < entries, other=-1).to(tl.int64)
        some = wanted >= 0
        place = tl.load(PLACE + entry, mask=some, other=0).to(tl.int64)
        own = (entry // asked).to(tl.int64)
        source = SOURCE + ((own * rows + wanted) * WORDS)[:, None] + word[None, :]
        target = TARGET + ((own * slots + place) * WORDS)[:, None] + word[None, :]
        moving = some[:, None] & (word < WORDS)[None, :]
        tl.store(target, tl.load(source, mask=moving), mask=moving)


def launched(source: Tensor, target: Tensor, wanted: Tensor, place: Tensor) -> None:
    """Launch `gather_rows`; arguments as of `gather_host`."""
    width = source.shape[2] * source.itemsize
    if not wanted.numel() or not width:
        return
    size, dtype = next((size, dtype) for size, dtype in _WORDS if width % size == 0)
    words = width // size
    block_w = min(power(words), _TILE)
    block_n = _TILE // block_w
    entries = wanted.numel()
    tiles = -(-entries // block_n) * -(-words // block_w)
    gather_rows[(min(tiles, _PROGRAMS),)](
        source.view(dtype),
        target.view(dtype),
        wanted.contiguous(),
        place.contiguous(),
        entries,
        wanted.shape[1],
        source.shape[1],
        target.shape[1],
        WORDS=words,
        BLOCK_N=block_n,
        BLOCK_W=block_w,
        num_warps=4,
    )


def copied(source: Tensor, target: Tensor, wanted: Tensor, place: Tensor) -> None:
    """The same in torch; arguments as of `gather_host`."""
    own, entry = (wanted >= 0).nonzero(as_tuple=True)
    rows = torch.add(wanted[own, entry], own, alpha=source.shape[1])
    slots = torch.add(place[own, entry], own, alpha=target.shape[1])
    target.flatten(0, 1).index_copy_(0, slots, source.flatten(0, 1).index_select(0, rows))


gather_host = register(
    "gather_host(Tensor source, Tensor(a!) target, Tensor wanted, Tensor place) -> ()",
    cpu=copied,
    cuda=launched,  # also where the source is on the CPU: of several devices, the dispatcher takes the GPU
    fake=lambda source, target, wanted, place: None,
)
"""Copy rows wanted [L, n] of source [L, rows, w] to slots place [L, n] of target [L, slots, w], each list for itself.

source and target are contiguous and of one dtype, any: bits are moved.  Where target is on a GPU, source is page-locked and
must neither be written nor be freed for other uses before the kernel is done: see `kvlib.offload.transfer`.  wanted and
place are int64 on target's device; a negative entry of `wanted` asks for nothing, the slots of the others are distinct.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: rows of one token, of a run, of a run longer than a tile, of ranges, of odd bytes."""
    for words, dtype in (
        (128, torch.bfloat16),
        (8 * 128, torch.bfloat16),
        (64 * 128, torch.bfloat16),
        (2 * 5, torch.float16),
        (3, torch.bfloat16),
        (5, torch.uint8),
    ):
        source, target = torch.empty(8, 4096, words, dtype=dtype), torch.empty(8, 512, words, dtype=dtype)
        ids = torch.zeros(8, 256, dtype=torch.int64)

        def launch(source: Tensor = source, target: Tensor = target, ids: Tensor = ids) -> None:
            launched(source, target, ids, ids)

        yield Example(f"rows of {words} {str(dtype)[6:]}", launch)
