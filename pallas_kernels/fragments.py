"""How a chunk of each weight format is multiplied by ``mma.sync``: lane programs for batches of up to 16 rows of x.

A warp multiplies one *unit*, a row tile's chunk of C columns, by the columns x[0..7] (and x[8..15]) of the product's
other operand. `units(w)` gives the format's `Units`: which registers a lane loads (all in 16-byte pieces but for small
headers), and how it adds their product to its accumulators.

Codes become bfloat16 without conversions: a 4- or 6-bit code in the low mantissa bits of 128 is the number 128 + q. The
128 goes away in the tensor core: the first product of a group has A = -128 everywhere, which also leaves
-128 sum(x), what the minimum of Q4K multiplies. A group's sum is exact products added up in float32; its scale multiplies
that sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.arrays import Weight
from pallas_kernels.lanes import Register, Registers
from pallas_kernels.packed import ROWS, PackedEQ8_0, PackedQ4K, PackedQ6K

MAX_ROWS = 16  # of x: two tiles of eight columns in the product

_MAGIC = 0x43004300  # a pair of bfloat16 128
_MINUS_128 = 0xC300C300
_MINUS_160 = 0xC320C320
_FLOAT_2_23 = 0x4B000000

# A lane's x: `x(tile, first, words)` are `words` 32-bit words, two elements each, of its column of x in column tile
# `tile`, from column `first` of the chunk on, moved by the lane's own share of that.
LoadX = Callable[[int, int, int], Registers]


@dataclasses.dataclass(frozen=True)
class Units:
    """A weight format to the kernels.

    chunk: C, columns of a unit.
    planes: the arrays to pass to the kernel.
    registers: how many 32-bit registers of a unit a lane holds.
    load: ``load(instructions, refs, unit, where)`` gives them; zeros, which stand for weights of 0, where false.
    multiply: ``multiply(instructions, registers, x, sums, columns)`` returns `sums` plus the unit's product. Sums are
        4 registers for each tile of columns, in the order of C; `columns` says which of each pair to compute.
    """

    chunk: int
    planes: tuple[jax.Array, ...]
    registers: int
    load: Callable[[Any, Sequence[Any], Register, Register | None], Registers]
    multiply: Callable[[Any, Registers, LoadX, list[Registers], tuple[int, ...]], list[Registers]]


def units(w: Weight) -> Units:
    """The `Units` of a packed array or of a bfloat16 matrix ``[N, K]`` (`why_no_units` is None).

    >>> import jax.numpy as jnp
    >>> units(jnp.zeros((16, 128), jnp.bfloat16)).registers
    32
    """
    if isinstance(w, PackedQ4K):
        words = w.chunk // 16
        header = w.header.shape[-1]
        return Units(
            w.chunk,
            (w.codes, w.header),
            words + 2 * header,
            lambda i, refs, unit, where: (
                _codes(i, refs[0], unit, words, where) + _header(i, refs[1], unit, header, where)
            ),
            _multiply_q4k,
        )
    if isinstance(w, PackedEQ8_0):
        words = w.chunk // 8
        header = w.header.shape[-1]
        return Units(
            w.chunk,
            (w.codes, w.header),
            words + 2 * header,
            lambda i, refs, unit, where: (
                _codes(i, refs[0], unit, words, where) + _header(i, refs[1], unit, header, where)
            ),
            _multiply_eq8_0,
        )
    if isinstance(w, PackedQ6K):
        return Units(
            w.chunk,
            (w.codes, w.high, w.header, w.d),
            16 + 8 + 8 + 1,
            lambda i, refs, unit, where: (
                _codes(i, refs[0], unit, 16, where)
                + _codes(i, refs[1], unit, 8, where)
                + _header(i, refs[2], unit, 4, where)
                + _one_per_row_pair(i, refs[3], unit, where)
            ),
            _multiply_q6k,
        )
    chunk = _PLAIN_CHUNK
    chunks = w.shape[-1] // chunk
    return Units(
        chunk,
        (w,),
        chunk // 2,
        lambda i, refs, unit, where: _plain(i, refs[0], unit, chunks, where),
        _multiply_plain,
    )


_PLAIN_CHUNK = 64


def why_no_units(w: Weight) -> str | None:
    """Why `w` cannot be read by lane programs, or None."""
    if isinstance(w, PackedQ4K | PackedEQ8_0 | PackedQ6K):
        return None
    if not isinstance(w, jax.Array | jax.ShapeDtypeStruct) and not hasattr(w, "aval"):
        return f"w is {type(w).__name__}: pack it first (pallas_kernels.pack_array)"
    if w.dtype.name != "bfloat16":
        return f"w has dtype {w.dtype}: expected bfloat16 or a packed array"
    if w.shape[-2] % ROWS or w.shape[-1] % _PLAIN_CHUNK:
        return f"w has shape {w.shape}: expected N a multiple of {ROWS} and K one of {_PLAIN_CHUNK}"
    return None


# --- loads ------------------------------------------------------------------------------------------------------------


def _codes(i: Any, ref: Any, unit: Register, words: int, where: Register | None) -> Registers:
    """`words` registers of fragment-ordered words, in pieces of four."""
    first = i.iadd(i.imul(unit, i.u32(32 * words)), i.shift_left(i.lane(), 2))
    out: Registers = []
    for piece in range(words // 4):
        word = i.iadd(first, i.u32(128 * piece))
        out += i.load(ref, word, 4, where=where, streamed=True)
    return out


def _header(i: Any, ref: Any, unit: Register, words: int, where: Register | None) -> Registers:
    """The `words` header words of row g, then those of row g + 8."""
    g = i.shift_right(i.lane(), 2)
    first = i.imul(i.iadd(i.imul(unit, i.u32(ROWS)), g), i.u32(words))
    second = i.iadd(first, i.u32(8 * words))
    return [
        *i.load(ref, first, words, where=where, streamed=True),
        *i.load(ref, second, words, where=where, streamed=True),
    ]


def _one_per_row_pair(i: Any, ref: Any, unit: Register, where: Register | None) -> Registers:
    word = i.iadd(i.imul(unit, i.u32(8)), i.shift_right(i.lane(), 2))
    return i.load(ref, word, 1, where=where, streamed=True)


def _plain(i: Any, ref: Any, unit: Register, chunks: int, where: Register | None) -> Registers:
    """Rows g and g + 8 of a bfloat16 matrix, 8 columns of every 32, as the packed formats have them."""
    row_words = chunks * _PLAIN_CHUNK // 2
    tile, chunk = i.idiv(unit, i.u32(chunks)), i.irem(unit, i.u32(chunks))
    row = i.iadd(i.imul(tile, i.u32(ROWS)), i.shift_right(i.lane(), 2))
    column = i.iadd(
        i.imul(chunk, i.u32(_PLAIN_CHUNK // 2)), i.shift_left(i.and_(i.lane(), 3), 2)
    )
    first = i.iadd(i.imul(row, i.u32(row_words)), column)
    out: Registers = []
    for group in range(_PLAIN_CHUNK // 32):
        for half in range(2):
            word = i.iadd(first, i.u32(half * 8 * row_words + 16 * group))
            out += i.load(ref, word, 4, where=where, streamed=True)
    return out


# --- products ---------------------------------------------------------------------------------------------------------


def _multiply_q4k(
    i: Any, registers: Registers, x: LoadX, sums: list[Registers], columns: tuple[int, ...]
) -> list[Registers]:
    """Adds, per row: d * sum_g sc_g * sum(q * x) - dmin * sum_g m_g * sum(x)."""
    wide = len(registers) > 16
    header = 4 if wide else 2
    codes, headers = registers[: -2 * header], registers[-2 * header :]
    rows = [headers[:header], headers[header:]]
    integers = [_wide_scales(i, row) if wide else _narrow_scales(i, row) for row in rows]
    tiles = len(sums)
    scaled = [_zeros(i) for _ in range(tiles)]
    minima = [_zeros(i) for _ in range(tiles)]
    for group in range(len(codes) // 2):
        a = [_fragment_of_nibbles(i, codes[2 * group + part]) for part in range(2)]
        factors = [[_float_of_byte(i, *where[group]) for where in row] for row in integers]
        for tile in range(tiles):
            words = x(tile, 32 * group, 4)
            b = (words[:2], words[2:])
            ones = i.mma([i.u32(_MINUS_128)] * 4, b[0], _zeros(i))
            ones = i.mma([i.u32(_MINUS_128)] * 4, b[1], ones)
            product = i.mma(a[1], b[1], i.mma(a[0], b[0], ones))
            for half, (sc, m) in enumerate(factors):
                for place in (2 * half + column for column in columns):
                    scaled[tile][place] = i.fma(sc, product[place], scaled[tile][place])
                    minima[tile][place] = i.fma(m, ones[place], minima[tile][place])
    d = [i.float_of_half(row[0], 0) for row in rows]
    # -128 sum(x) has the minimum's sign already.
    dmin = [i.fmul(i.float_of_half(row[0], 1), i.number(1 / 128)) for row in rows]
    return [
        _scaled_sums(i, dmin, minima[t], _scaled_sums(i, d, scaled[t], sums[t], columns), columns)
        for t in range(tiles)
    ]


def _wide_scales(i: Any, row: Registers) -> tuple[list[tuple[Register, int]], ...]:
    """Where the eight sc and the eight m of a row's chunk are: (register, byte)."""
    low, high, tops = row[1], row[2], row[3]
    sc = i.and_(low, 0x3F3F3F3F), i.and_or_register(
        i.shift_right(low, 2), 0x30303030, i.and_(tops, 0x0F0F0F0F)
    )
    m = i.and_(high, 0x3F3F3F3F), i.and_or_register(
        i.shift_right(high, 2), 0x30303030, i.and_(i.shift_right(tops, 4), 0x0F0F0F0F)
    )
    return tuple([(words[g // 4], g % 4) for g in range(8)] for words in (sc, m))


def _narrow_scales(i: Any, row: Registers) -> tuple[list[tuple[Register, int]], ...]:
    return [(row[1], 0), (row[1], 2)], [(row[1], 1), (row[1], 3)]


def _multiply_eq8_0(
    i: Any, registers: Registers, x: LoadX, sums: list[Registers], columns: tuple[int, ...]
) -> list[Registers]:
    """Adds, per row: sum_g scale_g * sum(q * x)."""
    groups = len(registers) // 5  # four words of codes a group, and a half word of scales for each of two rows
    codes, headers = registers[: 4 * groups], registers[4 * groups :]
    words_per_row = len(headers) // 2
    sums = [list(tile) for tile in sums]
    for group in range(groups):
        words = codes[4 * group : 4 * group + 4]
        a = [
            [_pair_of_bytes(i, words[2 * part + j], r) for j in range(2) for r in range(2)]
            for part in range(2)
        ]
        scale = [
            i.float_of_half(headers[half * words_per_row + group // 2], group % 2)
            for half in range(2)
        ]
        for tile, total in enumerate(sums):
            b = x(tile, 32 * group, 4)
            product = i.mma(a[1], b[2:], i.mma(a[0], b[:2], _zeros(i)))
            sums[tile] = _scaled_sums(i, scale, product, total, columns)
    return sums


def _multiply_q6k(
    i: Any, registers: Registers, x: LoadX, sums: list[Registers], columns: tuple[int, ...]
) -> list[Registers]:
    """Adds, per row: d * sum_g sc_g * sum((q - 32) * x) over groups of 16."""
    codes, tops, headers = registers[:16], registers[16:24], registers[24:32]
    tiles = len(sums)
    scaled = [_zeros(i) for _ in range(tiles)]
    for group in range(16):
        # tops: two pieces of 128 columns, each two 64s of two words; a word serves two groups.
        top = tops[4 * (group // 8) + group % 8 // 2]
        a = []
        for place in range(4):
            field = 4 * (group % 2) + place
            moved = (
                i.shift_left(top, 4 - 2 * field) if field < 2 else i.shift_right(top, 2 * field - 4)
            )
            low = i.and_or(i.shift_right(codes[group], 4 * place), 0x000F000F, _MAGIC)
            a.append(i.and_or_register(moved, 0x00300030, low))
        factors = [
            _float_of_signed_byte(i, headers[4 * half + group // 4], group % 4) for half in range(2)
        ]
        for tile in range(tiles):
            b = x(tile, 16 * group, 2)
            product = i.mma(a, b, i.mma([i.u32(_MINUS_160)] * 4, b, _zeros(i)))
            scaled[tile] = _scaled_sums(i, factors, product, scaled[tile], columns)
    d = [i.float_of_half(registers[32], half) for half in range(2)]
    return [_scaled_sums(i, d, scaled[t], sums[t], columns) for t in range(tiles)]


def _multiply_plain(
    i: Any, registers: Registers, x: LoadX, sums: list[Registers], columns: tuple[int, ...]
) -> list[Registers]:
    """Adds sum(w * x)."""
    del columns  # the tensor core adds them all
    sums = [list(tile) for tile in sums]
    for group in range(_PLAIN_CHUNK // 32):
        upper = registers[8 * group : 8 * group + 4]
        lower = registers[8 * group + 4 : 8 * group + 8]
        for tile, total in enumerate(sums):
            b = x(tile, 32 * group, 4)
            for part in (0, 2):
                a = [upper[part], lower[part], upper[part + 1], lower[part + 1]]
                total = i.mma(a, b[part : part + 2], total)
            sums[tile] = total
    return sums


def _fragment_of_nibbles(i: Any, word: Register) -> Registers:
    """a0 to a3, each two bfloat16 128 + q."""
    return [i.and_or(i.shift_right(word, 4 * place), 0x000F000F, _MAGIC) for place in range(4)]


def _pair_of_bytes(i: Any, word: Register, which: int) -> Register:
    """Bytes 2 `which` and the next, in two's complement, as two bfloat16: 128 + low seven bits, less 128 or 256."""
    spread = i.bytes_of(word, 0x43, 0x4342 if which else 0x4140)
    return i.subtract_bf16x2(i.and_(spread, 0xFF7FFF7F), i.and_(spread, 0xFF80FF80))


def _float_of_byte(i: Any, word: Register, byte: int) -> Register:
    """Exact: 2**23 + b, less 2**23."""
    return i.fadd(
        i.float_of_bits(i.bytes_of(word, _FLOAT_2_23, 0x7440 + byte)), i.number(-(2.0**23))
    )


def _float_of_signed_byte(i: Any, word: Register, byte: int) -> Register:
    """Exact: with the sign bit flipped, b + 128 is unsigned."""
    flipped = i.xor(word, 0x80808080)
    bits = i.bytes_of(flipped, _FLOAT_2_23, 0x7440 + byte)
    return i.fadd(i.float_of_bits(bits), i.number(-(2.0**23) - 128))


def _zeros(i: Any) -> Registers:
    return [i.number(0.0)] * 4


def _scaled_sums(
    i: Any,
    scale: Sequence[Register],
    product: Registers,
    sums: Registers,
    columns: tuple[int, ...],
) -> Registers:
    """sums + scale of the row * product, in the given columns of each pair."""
    out = list(sums)
    for half in range(2):
        for place in (2 * half + column for column in columns):
            out[place] = i.fma(scale[half], product[place], out[place])
    return out
