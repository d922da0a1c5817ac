"""Tiles of codes in registers: what the kernels that attend codes of 2, 4 or 8 bits where they lie share.

Tokens are the rows of a program's matrix products and query rows their 8 or 16 columns, so that the few query heads of a
KV head waste little.  A code costs from half an instruction to one and a half:

* Bytes of keys, and words of two bytes of values, are planes of neighbouring channels (`kvlib.kernels.quantise`), which a
  mask takes apart.  What it leaves in the low bits of a half is a subnormal fp16 number, code * 2^-24 or a little more;
  matrix units multiply those exactly (Fasi et al. 2021, doi 10.7717/peerj-cs.330), and one factor in the end makes up.
* A range of a token is a factor and an addend of its product with the query, or of its softmax weight.  A range of a
  channel is applied to the key, which is rounded once, to fp16, as a dense cache would have rounded it.
"""

from __future__ import annotations

from kvlib.kernels.launch import INTERPRET, dot, find_row, jit, tl


def _instructions(bits: int, words: bool, exact: bool) -> str:
    """PTX that takes one register apart: four bytes of keys, or two words of values, into halves plane by plane.

    With `exact` a plane at bit k is set under the exponent of 2^(10 - k), which is subtracted: the code itself.
    """
    mask = 2**bits - 1
    planes = 8 // bits
    outputs = 2 * planes
    text = "{ .reg .b32 x, y, t, c; "
    if words:
        text += f"mov.b32 x, ${outputs}; shr.b32 y, x, 8; "
    else:
        text += f"prmt.b32 x, ${outputs}, 0, 0x4140; prmt.b32 y, ${outputs}, 0, 0x4342; "
    for i in range(outputs):
        plane, half = (i % planes, i // planes) if words else divmod(i, 2)
        source, taken = "xy"[half], mask << bits * plane
        if exact:
            power_of_two = 25 - bits * plane << 10
            text += f"lop3.b32 t, {source}, {taken * 65537}, {power_of_two * 65537}, 0xEA; "
            text += f"mov.b32 c, {(power_of_two | 32768) * 65537}; add.rn.f16x2 ${i}, t, c; "
        else:
            text += f"and.b32 ${i}, {source}, {taken * 65537}; "
    return text + "}"


_BITS = (2, 4, 8)
_EXACT = tl.constexpr(tuple(_instructions(bits, False, True) for bits in _BITS))
_BYTES = tl.constexpr(tuple(_instructions(bits, False, False) for bits in _BITS))
_WORDS = tl.constexpr(tuple(_instructions(bits, True, False) for bits in _BITS))
_REGISTERS = tl.constexpr(tuple("=r," * (16 // bits) + "r" for bits in _BITS))


@jit
def code_planes(x, BITS: tl.constexpr, SHIFT: tl.constexpr, EXACT: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT planes of x from bit SHIFT on, as the interpreter can: codes, or without EXACT code * 2^(BITS * i - 24)."""
    planes = ()
    for i in tl.static_range(COUNT):
        code = (x >> (SHIFT + BITS * i)) & (2**BITS - 1)
        if EXACT:
            planes = planes + (code.to(tl.float16),)
        else:
            planes = planes + ((code << (BITS * i)).to(tl.int16).to(tl.float16, bitcast=True),)
    return planes


@jit
def key_planes(x, BITS: tl.constexpr, EXACT: tl.constexpr):
    """Bytes as 8 / BITS fp16 tensors, plane i the codes of channels from i * d * BITS / 8 on: the codes themselves, or
    without EXACT times 2^(BITS * i - 24)."""
    if INTERPRET:
        return code_planes(x, BITS, 0, EXACT, 8 // BITS)
    texts: tl.constexpr = _EXACT if EXACT else _BYTES
    return tl.inline_asm_elementwise(
        texts[BITS // 4], _REGISTERS[BITS // 4], [x], dtype=(tl.float16,) * (8 // BITS), is_pure=True, pack=4
    )


@jit
def value_planes(x, BITS: tl.constexpr):
    """Words of two bytes as 16 / BITS fp16 tensors, times 2^(BITS * i - 24): those of even channels, then of odd ones."""
    if INTERPRET:
        return code_planes(x, BITS, 0, False, 8 // BITS) + code_planes(x, BITS, 8, False, 8 // BITS)
    return tl.inline_asm_elementwise(
        _WORDS[BITS // 4], _REGISTERS[BITS // 4], [x], dtype=(tl.float16,) * (16 // BITS), is_pure=True, pack=2
    )


@jit
def scaled(x, scale, least):
    """x * scale + least in fp16, rounded once."""
    if INTERPRET:
        return (x.to(tl.float32) * scale.to(tl.float32) + least.to(tl.float32)).to(tl.float16)
    text: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(text, "=r,r,r,r", [x, scale, least], dtype=tl.float16, is_pure=True, pack=2)


@jit
def half(word, UPPER: tl.constexpr):
    """The lower or upper fp16 half of an int32 word, as fp32."""
    return (word >> (16 * UPPER)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def of_head(X, steps, b, h):
    """Where a sequence and head begin in X, whose strides are `steps`."""
    return X + b * steps[0] + h * steps[1]


@jit
def find_chunk(LENGTH, w, rows, most, CHUNK: tl.constexpr, WHOLE: tl.constexpr, R_BLOCK: tl.constexpr):
    """Work item w: its list (`rows`: none), its first token and where it ends."""
    if WHOLE:
        row = w
        chunk = 0
    elif LENGTH is None:
        row = w // tl.cdiv(most, CHUNK)
        chunk = w % tl.cdiv(most, CHUNK)
    else:
        row, chunk = find_row(LENGTH, w, rows, CHUNK, R_BLOCK)
    tokens = most
    if LENGTH is not None:
        tokens = tl.load(LENGTH + row, mask=row < rows, other=0)
    return row, chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tokens)


@jit
def load(at, offsets, c, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What stands at + offsets + c, where c counts BLOCK channels of which only WIDTH exist: the others are 0."""
    if BLOCK == WIDTH:
        x = tl.load(at + (offsets + c))
    else:
        x = tl.load(at + (offsets + c), mask=c < WIDTH, other=0)
    return x


@jit
def load_queries(
    at, offsets, mine, factor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr
):
    """Rows q * factor in fp16 as COUNT operands [BLOCK, rows] of WIDTH channels each, the i-th times 2^(-STEP * i)."""
    c = tl.arange(0, BLOCK)[None, :]
    operands = ()
    for i in tl.static_range(COUNT):
        q = tl.load(at + (offsets[:, None] + (c + i * WIDTH)), mask=mine[:, None] & (c < WIDTH), other=0.0).to(tl.float32)
        operands = operands + (tl.trans((q * factor * 2.0 ** (-STEP * i)).to(tl.float16)),)
    return operands


@jit
def query_sums(q, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Sums over all channels of such operands, fp32 [rows]."""
    total = tl.sum(q[0].to(tl.float32), axis=0)
    for i in tl.static_range(1, COUNT):
        total += tl.sum(q[i].to(tl.float32), axis=0) * 2.0 ** (STEP * i)
    return total


@jit
def channel_rows(
    at, offsets, KEYS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """Channels [ROWS, BLOCK], of SIZE bytes each, of the rows at + offsets [ROWS, 1], or BY "span" the one row at [1, 1].

    That one is read as often as gives each thread the four bytes that are the least that can be fetched ahead.
    """
    c = tl.arange(0, BLOCK)[None, :]
    TIMES: tl.constexpr = max(1, 128 // (BLOCK * SIZE)) if KEYS == "span" else 1
    x = load(at, offsets + tl.zeros([TIMES, 1], tl.int32), c, WIDTH, BLOCK)
    if TIMES > 1:
        x = tl.reshape(tl.broadcast_to(x[None, :, :], [ROWS // TIMES, TIMES, BLOCK]), [ROWS, BLOCK])
    return x


@jit
def channel_keys(
    k, at, offsets, BITS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Keys of bytes k [ROWS, BLOCK] as 8 / BITS fp16 tensors; at + offsets are rows of 2 D halves, the scales of channels
    and then their least values: KEYS "entry", of each token, offsets [ROWS, 1], or "span", of all, [1, 1]."""
    WIDTH: tl.constexpr = D * BITS // 8
    planes = key_planes(k, BITS, True)
    keys = ()
    for i in tl.static_range(8 // BITS):
        scale = channel_rows(at + i * WIDTH, offsets, KEYS, ROWS, WIDTH, BLOCK, 2)
        least = channel_rows(at + (i * WIDTH + D), offsets, KEYS, ROWS, WIDTH, BLOCK, 2)
        keys = keys + (scaled(planes[i], scale, least),)
    return keys


@jit
def products(keys, q, s, COUNT: tl.constexpr):
    """s plus keys times queries, of COUNT operands each."""
    for i in tl.static_range(COUNT):
        s = dot(keys[i], q[i], s)
    return s


@jit
def token_scores(k, at, q, q_sum, s, BITS: tl.constexpr):
    """Products of queries with keys of bytes k [tokens, BLOCK], whose ranges are the words at [tokens]."""
    word = tl.load(at)
    s = products(key_planes(k, BITS, False), q, s, 8 // BITS)
    return s * (half(word, 0) * 16777216.0)[:, None] + half(word, 1)[:, None] * q_sum[None, :]


@jit
def softmax_rows(s, top, total):
    """One step of the online softmax in base 2 over tokens, the rows of s; returns p, alpha, top, total.

    `total` is kept for each token of a tile, and summed once in the end.
    """
    new = tl.maximum(top, tl.max(s, axis=0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[None, :])
    alpha = tl.exp2(top - safe)
    return p, alpha, new, total * alpha[None, :] + p


@jit
def group_weights(p, alpha, lows, at, offsets, GROUPS: tl.constexpr):
    """Weights p times the scale of each group of channels, in fp16, and lows * alpha + p times its least value.

    At at + offsets each token has GROUPS words: scale and least value, or scales in pairs and then least values in pairs.
    """
    weights = ()
    sums = ()
    for g in tl.static_range(GROUPS):
        if GROUPS == 1:
            word = tl.load(at + offsets)
            scale = half(word, 0)
            least = half(word, 1)
        else:
            scale = half(tl.load(at + (offsets + g // 2)), g % 2)
            least = half(tl.load(at + (offsets + (GROUPS + g) // 2)), g % 2)
        weights = weights + ((p * scale[:, None]).to(tl.float16),)
        sums = sums + (lows[g] * alpha[None, :] + p * least[:, None],)
    return weights, sums


@jit
def add_values(
    acc,
    alpha,
    weights,
    at,
    offsets,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """acc * alpha plus weighted values, whose words are at at + offsets [tokens]: for each block of words of the same
    groups, and each of its planes, a tensor [BLOCK, rows]."""
    PLANES: tl.constexpr = 8 // BITS
    BLOCKS: tl.constexpr = max(1, GROUPS // PLANES)
    WIDTH: tl.constexpr = D * BITS // 16 // BLOCKS
    c = tl.arange(0, BLOCK)[:, None]
    new = ()
    for b in tl.static_range(BLOCKS):
        planes = value_planes(load(at + b * WIDTH, offsets[None, :], c, WIDTH, BLOCK), BITS)
        for i in tl.static_range(2 * PLANES):
            weight = weights[i % PLANES * GROUPS // PLANES + b]
            new = new + (dot(planes[i], weight, acc[b * 2 * PLANES + i] * alpha[None, :]),)
    return new


@jit
def store_rows(
    OUT,
    LSE,
    first,
    m,
    mine,
    top,
    total,
    acc,
    lows,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write the rows m of a chunk whose rows begin at `first`: softmax-normalised output, and log-sum-exp in base 2, or
    natural where the row is whole."""
    PLANES: tl.constexpr = 8 // BITS
    BLOCKS: tl.constexpr = max(1, GROUPS // PLANES)
    WIDTH: tl.constexpr = D * BITS // 16 // BLOCKS
    total = tl.sum(total, axis=0)
    dead = total == 0.0
    safe = tl.where(dead, 1.0, total)
    share = 1.0 / safe
    lse = tl.where(dead, float("-inf"), top + tl.log2(safe))
    if WHOLE:
        lse = lse * 0.6931471805599453
    tl.store(LSE + first + m, lse, mask=mine)
    c = tl.arange(0, BLOCK)
    for b in tl.static_range(BLOCKS):
        for i in tl.static_range(2 * PLANES):
            low = tl.sum(lows[i % PLANES * GROUPS // PLANES + b], axis=0)
            out = (acc[b * 2 * PLANES + i] * 2.0 ** (24 - BITS * (i % PLANES)) + low[None, :]) * share[None, :]
            channel = i % PLANES * (D * BITS // 8) + i // PLANES + 2 * (c + b * WIDTH)
            at = OUT + (first + m)[None, :] * D + channel[:, None]
            tl.store(at, out, mask=mine[None, :] & (c < WIDTH)[:, None])


@jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors of zeros."""
    many = ()
    for _ in tl.static_range(COUNT):
        many = many + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return many
