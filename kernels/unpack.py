"""Codes as vectors again, in one pass: for what no kernel attends where it lies.

Reads d * bits / 8 bytes and ranges per token and writes d values: what is chosen, a piece, or a prompt's worth at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlib.kernels import host_unpack
from kvlib.kernels.launch import Example, cast, jit, power, tl
from kvlib.kernels.ops import register
from kvlib.kernels.quantise import decode, unpack
from kvlib.kernels.ran import note

_TILE = 4096  # elements of a program


@jit
def _planes(X, t, c, step, D: tl.constexpr, BITS: tl.constexpr, inside):
    """Codes int32 of tokens t [M, 1] and channels c [1, N], of 1, 2, 4 or 8 bits in byte planes from X on."""
    BYTES: tl.constexpr = D * BITS // 8
    byte = tl.load(X + t * step + c % BYTES, mask=inside, other=0).to(tl.int32)
    return (byte >> (c // BYTES * BITS)) & (2**BITS - 1)


@jit
def _codes(X, t, c, step, D: tl.constexpr, BITS: tl.constexpr, inside):
    """The same; 3 bits are two and then one."""
    if BITS == 3:
        return _planes(X, t, c, step, D, 2, inside) | (_planes(X + D // 4, t, c, step, D, 1, inside) << 2)
    return _planes(X, t, c, step, D, BITS, inside)


@jit(do_not_specialize=["heads", "tokens", "span"])
def unpack_rows(
    CODES,
    UPPER,
    RANGE,
    LEVELS,
    OUT,
    heads,
    tokens,
    span,  # tokens that share a row of ranges
    code_steps,  # strides of sequences, heads, tokens
    upper_steps,
    range_steps,  # and between scale and least value
    D: tl.constexpr,
    BITS: tl.constexpr,
    MORE: tl.constexpr,  # bits of UPPER
    GROUP: tl.constexpr,  # channels that share a range
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some tokens of one (sequence, head)."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) // tiles
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    t = ((tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    live = t < tokens
    inside = live & (c < D)
    place = t.to(tl.int64)
    code = _codes(CODES + b * code_steps[0] + h * code_steps[1], place, c, code_steps[2], D, BITS, inside)
    if UPPER is not None:
        upper = _codes(UPPER + b * upper_steps[0] + h * upper_steps[1], place, c, upper_steps[2], D, MORE, inside)
        code = code | (upper << BITS)
    if LEVELS is None:
        x = code.to(tl.float32)
    else:
        x = tl.load(LEVELS + code)
    at = RANGE + b * range_steps[0] + h * range_steps[1] + (t // span).to(tl.int64) * range_steps[2]
    if GROUP == D:
        x = x * tl.load(at, mask=live, other=0.0).to(tl.float32)
    else:
        x = x * tl.load(at + c // GROUP, mask=inside, other=0.0).to(tl.float32)
    if LEAST:
        at = at + range_steps[3]
        if GROUP == D:
            x = x + tl.load(at, mask=live, other=0.0).to(tl.float32)
        else:
            x = x + tl.load(at + c // GROUP, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + (row.to(tl.int64) * tokens + place) * D + c, cast(x, OUT.dtype.element_ty), mask=inside)


def launched(
    codes: Tensor,
    found: Tensor,
    bits: int,
    span: int = 1,
    upper: Tensor | None = None,
    levels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Launch `unpack_rows`; arguments as of `unpack_codes`."""
    note("codes", "Triton")
    out = _empty(codes, found, bits, span, upper, levels, dtype)
    batch, heads, m, d = out.shape
    if out.numel() == 0:
        return out
    if found.stride(4) != 1:
        found = found.contiguous()
    block_d = power(d)
    block_m = max(1, _TILE // block_d)
    unpack_rows[(batch * heads * -(-m // block_m),)](
        codes,
        upper,
        found,
        levels,
        out,
        heads,
        m,
        m if found.shape[2] == 1 else span,
        codes.stride()[:3],
        None if upper is None else upper.stride()[:3],
        found.stride()[:4],
        D=d,
        BITS=bits,
        MORE=0 if upper is None else upper.shape[3] * 8 // d,
        GROUP=d // found.shape[4],
        LEAST=found.shape[3] == 2,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def unpacked(
    codes: Tensor,
    found: Tensor,
    bits: int,
    span: int = 1,
    upper: Tensor | None = None,
    levels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in torch; arguments as of `unpack_codes`."""
    note("codes", "torch")
    batch, heads, m, d = _empty(codes, found, bits, span, upper, levels, dtype).shape
    x = unpack(codes, bits)
    if upper is not None:
        x = x | (unpack(upper, upper.shape[3] * 8 // d) << bits)
    values = x.float() if levels is None else levels.index_select(0, x.flatten().int()).view(x.shape)
    rows, groups = max(1, found.shape[2]), found.shape[4]
    members = values.view(batch, heads, rows, m // rows, groups, d // groups)
    scale, *least = (part.float().unsqueeze(3).unsqueeze(5) for part in found.unbind(3))
    members = decode(members, scale, *least) if least else members * scale
    return members.view(batch, heads, m, d).to(dtype)


def _on_cpu(
    codes: Tensor,
    found: Tensor,
    bits: int,
    span: int = 1,
    upper: Tensor | None = None,
    levels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    if found.dtype not in (torch.float16, torch.float32) or not host_unpack.serves(
        codes.shape[3] * 8 // bits, codes, found, upper, levels
    ):
        return unpacked(codes, found, bits, span, upper, levels, dtype)
    out = _empty(codes, found, bits, span, upper, levels, torch.float32)
    return host_unpack.unpack(codes, found, bits, span, upper, levels, out).to(dtype)


def _empty(
    codes: Tensor,
    found: Tensor,
    bits: int,
    span: int = 1,
    upper: Tensor | None = None,
    levels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    batch, heads, m, width = codes.shape
    d, rows = width * 8 // bits, found.shape[2]
    if (rows != 1 and rows * span != m) or d % found.shape[4] or width * 8 % bits:
        raise ValueError(f"{m} tokens of {d} channels do not make whole groups of the ranges {tuple(found.shape)}")
    above = 0 if upper is None else upper.shape[3] * 8
    if above and (above % d or above + bits * d > 8 * d):
        raise ValueError(f"{above} bits of {d} channels are not as many for each, or with {bits} below them more than 8")
    return codes.new_empty((batch, heads, m, d), dtype=dtype)


unpack_codes = register(
    "unpack(Tensor codes, Tensor found, int bits, int span=1, Tensor? upper=None, Tensor? levels=None, "
    "ScalarType dtype=float) -> Tensor",
    cpu=_on_cpu,
    cuda=launched,
    fake=_empty,
)
"""The vectors [B, H, m, d] in `dtype` (float: fp32) of codes [B, H, m, d * bits / 8] uint8 of 2, 3, 4 or 8 bits as
`kvlib.kernels.quantise.pack` packs them, any strides but of bytes.  A value is code * scale + least.

found:  fp16 or fp32 ranges [B, H, m / span, 2, groups], scale and least value of `groups` blocks of neighbouring channels,
        of a single token, of `span` neighbouring tokens, or in one row of all; or [B, H, m / span, 1, groups]: scales only.
upper:  codes whose bits come above those of `codes`, as wide or not, 8 bits together at most; None: there are none.
levels: fp32 [2^bits], all bits counted, what codes stand for; None: for themselves.

Raises ValueError where groups or codes would not be whole.
"""


def examples() -> Iterator[Example]:
    """Launches to compile: kv4's values first, then ranges of channels, 3 bits, two planes, levels, other types."""
    for kind, bits, groups, span, dtype, d in (
        ("a range per token", 4, 1, 1, torch.float16, 128),
        ("32 channels", 2, 4, 1, torch.float16, 128),
        ("ranges of channels", 4, 128, 128, torch.bfloat16, 128),
        ("ranges of channels", 4, 128, 1, torch.float16, 128),
        ("a range per token", 3, 1, 1, torch.float16, 128),
        ("two planes", 4, 128, 128, torch.float16, 128),
        ("levels", 4, 1, 1, torch.float16, 128),
        ("levels", 3, 1, 1, torch.float32, 96),
        ("a range per token", 8, 1, 1, torch.float32, 256),
    ):
        codes = torch.empty(1, 8, 4096, d * bits // 8, dtype=torch.uint8)
        found = torch.empty(1, 8, 4096 // span, 1 if kind == "levels" else 2, groups, dtype=torch.float16)
        upper = codes if kind == "two planes" else None
        levels = torch.empty(2**bits) if kind == "levels" else None

        def launch(
            codes: Tensor = codes,
            found: Tensor = found,
            bits: int = bits,
            span: int = span,
            upper: Tensor | None = upper,
            levels: Tensor | None = levels,
            dtype: torch.dtype = dtype,
        ) -> object:
            return launched(codes, found, bits, span, upper, levels, dtype)

        yield Example(f"{bits} bits, {kind}, span {span}, {str(dtype)[6:]}, d {d}", launch)
