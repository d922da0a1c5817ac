"""A page shrinks by coding its exponents against their channel's mean; signs and mantissas are kept as they are.

Neighbouring values of a cache have like magnitudes, while their signs and mantissas are close to random.  Rotated left by
one bit, a value has its sign lowest and its exponent in the top byte (fp16: five bits of exponent, three of mantissa).  The
top bytes, less the mean of their channel over the page's tokens, go through zstandard, set to look for hardly any
repetition, which leaves its entropy coder; the means go with them, each less the one before.  The coder knows all 256
bytes, so every bit pattern comes back.  The other bytes are stored as they are, plane by plane.

Coding the exponents alone is DFloat11's idea (arXiv 2504.11651).  That is a codec for weights, Huffman-coded for a GPU,
which cannot hold infinities, NaNs and the largest values; its transfer to keys and values, the means and the format are
ours.  A page, little-endian: 32 bytes of header, 8 for each dimension, the body.
"""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from math import prod

import numpy as np
import torch
import zstandard
from torch import Tensor

_MAGIC, _VERSION = b"kvpage\r\n", 1
_HEADER = struct.Struct("<8s4BQQ")  # magic, version, dtype, dimensions, mode, bytes of the values, bytes of the body
_CHECKSUM = struct.Struct("<I")  # the last 4 bytes of the header
_FIXED = _HEADER.size + _CHECKSUM.size
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_RAW, _CODED = 0, 1
# Matches of at least 7 bytes, found by chance in a table of 64: runs of a constant shrink to nothing, all else is left to
# the entropy coder.  The usual levels find many among exponents, at the cost of up to 4 % of a page.
_CODER = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, min_match=7, window_log=17, hash_log=6, chain_log=6, search_log=1
)


def pack(x: Tensor) -> Tensor:
    """x, bf16, fp16 or fp32 [..., tokens, channels] on any device, as a page: uint8 [bytes] in host memory.

    Other shapes will do, down to none.  Where coding saves less than 1/64 of its bytes, x is stored as it is; the page is
    then 32 + 8 * x.ndim bytes larger than x.  Raises ValueError for other dtypes.
    """
    bits = _bits(x)
    plain, frame = _code(bits, x.shape)
    mode, size = (_CODED if frame else _RAW), plain.nbytes + len(frame)
    header = _HEADER.pack(_MAGIC, _VERSION, _DTYPES.index(x.dtype), x.ndim, mode, bits.nbytes, size)
    shape = struct.pack(f"<{x.ndim}q", *x.shape)
    checksum = _CHECKSUM.pack(_checksum(header + shape, frame, bits))
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray().join([header, checksum, shape, plain.data, frame]), dtype=torch.uint8)


def unpack(page: Tensor) -> Tensor:
    """What was packed, bit for bit, with its dtype and shape, contiguous on the CPU; never an inference tensor.

    page uint8 [bytes] on the CPU.  Raises ValueError where that is no page, one of another version, or a damaged one: its
    lengths are checked before anything is allocated, its content against a checksum before it is handed out.
    """
    dtype, shape, signed, checksum, plain, frame = _open(page)
    words = np.dtype(f"u{dtype.itemsize}")
    if frame:
        planes = np.frombuffer(plain, np.uint8).reshape(dtype.itemsize - 1, -1)
        bits = _join([*planes, _decode(frame, shape)], words)
    else:
        bits = np.frombuffer(plain, words).copy()
    found = _checksum(signed, frame, bits)
    if found != checksum:
        raise _damaged(f"checksum {found:08x}, expected {checksum:08x}")
    with torch.inference_mode(False):
        return torch.from_numpy(bits).view(dtype).reshape(shape)


def bound(x: Tensor) -> float:
    """Bytes that x [..., tokens, channels] takes by Shannon's bound: those stored as they are, and the entropy of those
    that are coded, taken as independent of each other.  A page of x has a header besides; it can be smaller only where
    exponents repeat or change their distribution along the page.  Raises ValueError for dtypes that `pack` refuses."""
    planes = _split(_bits(x))
    counts = np.bincount(_residue(planes[-1], x.shape).ravel()) if planes.size else np.empty(0)
    counts = counts[counts > 0]
    return planes[:-1].nbytes + float((counts * np.log2(counts.sum() / counts)).sum()) / 8


def _open(page: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes, int, memoryview, memoryview]:
    """Dtype, shape, what else the checksum covers, the checksum; all planes but the top one, or all of the values, as they
    are; the coded rest, or nothing."""
    if page.dtype != torch.uint8 or page.dim() != 1 or page.device.type != "cpu":
        raise ValueError(f"a page is uint8 [bytes] on the CPU, not {page.dtype} {list(page.shape)} on {page.device}")
    data = page.contiguous().numpy().data
    if len(data) < _FIXED:
        raise _damaged(f"{len(data)} bytes, and the header alone has {_FIXED}")
    magic, version, code, dims, mode, raw, size = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(f"not a page: it begins with {magic!r}, not {_MAGIC!r}; the block must be computed again")
    if version != _VERSION:
        raise ValueError(f"page of version {version}, only {_VERSION} can be read; the block must be computed again")
    start = _FIXED + 8 * dims
    if len(data) != start + size:
        raise _damaged(f"{len(data)} bytes, expected {start + size}")
    if code >= len(_DTYPES) or mode not in (_RAW, _CODED):
        raise _damaged(f"dtype {code} and mode {mode} are unknown")
    dtype, shape = _DTYPES[code], struct.unpack_from(f"<{dims}q", data, _FIXED)
    count = prod(shape)
    if min(shape, default=0) < 0 or raw != count * dtype.itemsize:
        raise _damaged(f"{raw} bytes of values are not {list(shape)} of {dtype}")
    end = start + (raw if mode == _RAW else raw - count)
    if len(data) < end or (len(data) > end) != (mode == _CODED):
        raise _damaged(f"a body of {size} bytes does not hold {list(shape)} of {dtype}")
    signed = bytes(data[: _HEADER.size]) + bytes(data[_FIXED:start])
    return dtype, shape, signed, _CHECKSUM.unpack_from(data, _HEADER.size)[0], data[start:end], data[end:]


def _damaged(what: str) -> ValueError:
    return ValueError(f"page is damaged: {what}; the block must be computed again")


def _checksum(signed: bytes, frame: bytes | memoryview, bits: np.ndarray) -> int:
    """Of the values, so that it vouches for the decoder too, and of all that could change without changing them."""
    return zlib.crc32(bits.data, zlib.crc32(frame, zlib.crc32(signed)))


def _bits(x: Tensor) -> np.ndarray:
    if x.dtype not in _DTYPES:
        raise ValueError(f"cannot pack {x.dtype}, only {', '.join(map(str, _DTYPES))}")
    flat = x.cpu().resolve_neg().reshape(-1).contiguous()
    bits: np.ndarray = flat.view(torch.uint16 if x.itemsize == 2 else torch.uint32).numpy()
    return bits


def _split(bits: np.ndarray) -> np.ndarray:
    """Bits [n] as planes uint8 [bytes per value, n], that of the exponents last."""
    width = 8 * bits.itemsize
    rotated = bits << 1 | bits >> (width - 1)
    return np.stack([(rotated >> shift).astype(np.uint8) for shift in range(0, width, 8)])


def _join(planes: list[np.ndarray], words: np.dtype) -> np.ndarray:
    rotated = planes[-1].astype(words)
    for plane in reversed(planes[:-1]):
        rotated <<= 8
        rotated |= plane
    return rotated >> 1 | rotated << (8 * words.itemsize - 1)


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    dims = len(shape)
    return (1, prod(shape), 1) if dims < 2 else (prod(shape[:-2]), shape[-2], shape[-1])


def _code(bits: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, bytes]:
    """What is to be stored as it is, and the coded rest: nothing where that would not pay."""
    if bits.size:
        planes = _split(bits)
        frame = zstandard.ZstdCompressor(compression_params=_CODER).compress(_residue(planes[-1], shape).data)
        if planes[:-1].nbytes + len(frame) < bits.nbytes * (1 - 1 / 64):
            return planes[:-1], frame
    return bits, b""


def _decode(frame: memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """What `_residue` was made from: the top bytes [n]."""
    outer, tokens, channels = _grid(shape)
    size = outer * (1 + tokens) * channels
    with suppress(zstandard.ZstdError):
        if zstandard.frame_content_size(frame) == size:  # which is what the decoder allocates
            decoded = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
            residue = np.frombuffer(decoded, np.uint8).reshape(outer, 1 + tokens, channels)
            top: np.ndarray = residue[:, 1:] + residue[:, :1].cumsum(dtype=np.uint8).reshape(outer, 1, channels)
            return top.ravel()
    raise _damaged(f"its exponents cannot be decoded to {size} bytes")


def _residue(top: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Top bytes [n], not empty, as the bytes to code [outer, 1 + tokens, channels]: the means, then what exceeds them."""
    outer, tokens, channels = _grid(shape)
    top = top.reshape(outer, tokens, channels)
    means = (top.sum(1, dtype=np.uint32, keepdims=True) // tokens).astype(np.uint8)
    return np.concatenate([np.diff(means.ravel(), prepend=np.uint8(0)).reshape(means.shape), top - means], 1)
