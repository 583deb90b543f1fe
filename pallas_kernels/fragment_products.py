"""How a unit of each weight format is multiplied by up to 16 columns on ``mma.sync``: lane programs.

Each is `pallas_kernels.fragments.Units.multiply` of a format. Codes become bfloat16 without conversions: a 4- or 6-bit
code in the low mantissa bits of 128 is the number 128 + q. The 128 goes away in the tensor core: with a product of
A = -128 everywhere, which also leaves -128 sum(x), what the minimum of Q4K multiplies; or, where a chunk has eight
groups, for all of them in one product of scales and sums of x. A group's sum is exact products added up in float32;
its scale multiplies that sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.lanes import Register, Registers

MAGIC = 0x43004300  # a pair of bfloat16 128
_MINUS_128 = 0xC300C300
_SQUARE_OF_128 = 0x46804680

PLAIN_CHUNK = 64  # columns of a unit of plain bfloat16

# A lane's x: `x(tile, first, words)` are `words` 32-bit words, two elements each, of its column of x in column tile
# `tile`, from column `first` of the chunk on, moved by the lane's own share of that.
LoadX = Callable[[int, int, int], Registers]
Done = Callable[[int], None]


def multiply_q4k(
    i: Any,
    pieces: list[Registers],
    done: Done,
    constants: list[Registers],
    x: LoadX,
    sums: list[Registers],
    columns: tuple[int, ...],
) -> list[Registers]:
    """Adds, per row: sum_g d sc_g sum((128 + q) x) - sum_g (128 d sc_g + dmin m_g) sum(x).

    The second term is a product of scales and sums of x, 16 rows by 8 groups by the columns, and is left to the tensor
    core, too: sums of x come from it where it wants them as B operand, in float32, and go back as three bfloat16 that
    add up to them. So nothing is rounded but float32 sums, and a group's share of them is of its 128 + q.
    """
    rows, codes = pieces[:2], pieces[2:]
    sc, m = zip(*(wide_words(i, row) for row in rows), strict=True)
    d = [i.float_of_half(row[0], 0) for row in rows]
    minus_128_d = [i.fmul(value, i.number(-128.0)) for value in d]
    minus_dmin = [i.fneg(i.float_of_half(row[0], 1)) for row in rows]
    done(0)
    done(1)
    # -128 (128 + sc) + 128 * 128, of eight bits.
    minus_128_sc = [
        i.fma_bf16x2(_codes_of_lane(i, words), i.u32(_MINUS_128), i.u32(_SQUARE_OF_128))
        for words in sc
    ]
    minima = [i.subtract_bf16x2(_codes_of_lane(i, words), i.u32(MAGIC)) for words in m]
    magic = constants[2][0]
    sums = list(sums)
    sums_of_x = [[_zeros(i), _zeros(i)] for _ in sums]  # of even and odd groups
    for group in range(2 * len(codes)):
        words = codes[group // 2][group % 2 * 2 :]
        a = [fragment_of_nibbles(i, words[part], magic) for part in range(2)]
        if group % 2:
            done(2 + group // 2)
        scale = [
            _scale_of_byte(i, (sc[r][group // 4], group % 4), magic, d[r], minus_128_d[r])
            for r in range(2)
        ]
        one_hot = constants[group // 4][group // 2 % 2 * 2 :][:2]
        for tile in range(len(sums)):
            b = x(tile, 32 * group, 4)
            # All of x's group as A: half of its columns in the place of row g, half in that of row g + 8.
            sums_of_x[tile][group % 2] = i.mma(b, one_hot, sums_of_x[tile][group % 2])
            product = i.mma(a[1], b[2:], i.mma(a[0], b[:2], _zeros(i)))
            sums[tile] = _scaled_sums(i, scale, product, sums[tile], columns)
    for tile, (even, odd) in enumerate(sums_of_x):
        parts = _in_three_bf16x2(i, i.fadd(even[0], even[2]), i.fadd(odd[0], odd[2]))
        for a, factor in ((minus_128_sc, d), (minima, minus_dmin)):
            product = _zeros(i)
            for part in parts:
                product = i.mma(a, [part], product)
            sums[tile] = _scaled_sums(i, factor, product, sums[tile], columns)
    return sums


def columns_of_groups(first_pair: int, i: Any) -> Registers:
    """B operands that put the sums of groups 2 p and 2 p + 1 into columns 2 p and 2 p + 1: of p = `first_pair` and the
    next, each two registers of ones for lanes of these columns. A lane t so has those of groups 2 t and 2 t + 1.
    """
    zeros = i.opaque(0)
    pair = i.shift_right(i.lane(), 3)
    ones = [
        i.select(i.equal(pair, i.u32(first_pair + n)), i.u32(0x3F803F80), i.u32(0)) for n in (0, 1)
    ]
    return [i.or_(zeros[n], ones[n // 2]) for n in range(4)]


def multiply_narrow_q4k(
    i: Any,
    pieces: list[Registers],
    done: Done,
    constants: list[Registers],
    x: LoadX,
    sums: list[Registers],
    columns: tuple[int, ...],
) -> list[Registers]:
    """Adds, per row: sum_g d sc_g sum(q x) - sum_g dmin m_g sum(x), the 128 of a group taken from its sum."""
    rows, [codes] = pieces[:2], pieces[2:]
    sc, m = zip(*(narrow_scales(i, row) for row in rows), strict=True)
    d = [i.float_of_half(row[0], 0) for row in rows]
    minus_128_d = [i.fmul(value, i.number(-128.0)) for value in d]
    # -128 sum(x) has the minimum's sign already.
    dmin = [i.float_of_half(row[0], 1) for row in rows]
    factor = [i.fmul(value, i.number(1 / 128)) for value in dmin]
    minus_dmin = [i.fneg(value) for value in dmin]
    done(0)
    done(1)
    minus_128, [magic, *_] = constants
    sums = list(sums)
    for group in range(2):
        a = [fragment_of_nibbles(i, codes[2 * group + part], magic) for part in range(2)]
        scale, minimum = (
            [_scale_of_byte(i, words[r][group], magic, f[r], offset[r]) for r in range(2)]
            for words, f, offset in ((sc, d, minus_128_d), (m, factor, minus_dmin))
        )
        for tile in range(len(sums)):
            b = x(tile, 32 * group, 4)
            minus_128_x = i.mma(minus_128, b[2:], i.mma(minus_128, b[:2], _zeros(i)))
            product = i.mma(a[1], b[2:], i.mma(a[0], b[:2], minus_128_x))
            total = _scaled_sums(i, scale, product, sums[tile], columns)
            sums[tile] = _scaled_sums(i, minimum, minus_128_x, total, columns)
    done(2)
    return sums


def _scale_of_byte(
    i: Any, byte: tuple[Register, int], magic: Register, factor: Register, minus_128: Register
) -> Register:
    """factor * byte, exact: (word, place) is at most 127, and `minus_128` is -128 factor. Two instructions."""
    word, place = byte
    code = i.bytes_of_two(word, magic, 0x5044 | place << 8)  # 128 + byte as float32
    return i.fma(i.float_of_bits(code), factor, minus_128)


def _codes_of_lane(i: Any, words: Sequence[Register]) -> Register:
    """Bytes 2 t and 2 t + 1 of eight, each a code of six bits, as two bfloat16 128 + code."""
    selector = i.iadd(i.imul(i.and_(i.lane(), 3), i.u32(0x0202)), i.u32(0x0100))
    return i.and_or(i.bytes_at(*words, selector), 0x003F003F, MAGIC)


def _in_three_bf16x2(i: Any, a: Register, b: Register) -> Registers:
    """Pairs of bfloat16, a's low, that add up to the 24 bits of a and of b: eight of them each."""
    out = []
    for _ in range(3):
        bits = [i.bits_of_float(value) for value in (a, b)]
        out.append(i.bytes_of_two(*bits, 0x7632))
        tops = [i.float_of_bits(i.and_(word, 0xFFFF0000)) for word in bits]
        a, b = i.fsub(a, tops[0]), i.fsub(b, tops[1])
    return out


def wide_words(i: Any, row: Registers) -> tuple[tuple[Register, Register], ...]:
    """The eight sc and the eight m of a row's chunk, a byte each: two words of them."""
    low, high, tops = row[1], row[2], row[3]
    sc = (
        i.and_(low, 0x3F3F3F3F),
        i.and_or_register(i.shift_right(low, 2), 0x30303030, i.and_(tops, 0x0F0F0F0F)),
    )
    m = (
        i.and_(high, 0x3F3F3F3F),
        i.and_or_register(
            i.shift_right(high, 2), 0x30303030, i.and_(i.shift_right(tops, 4), 0x0F0F0F0F)
        ),
    )
    return sc, m


def wide_scales(i: Any, row: Registers) -> tuple[list[tuple[Register, int]], ...]:
    """Where the eight sc and the eight m of a row's chunk are: (register, byte)."""
    return tuple([(words[g // 4], g % 4) for g in range(8)] for words in wide_words(i, row))


def narrow_scales(i: Any, row: Registers) -> tuple[list[tuple[Register, int]], ...]:
    """As `wide_scales`, of a chunk of two groups."""
    return [(row[1], 0), (row[1], 2)], [(row[1], 1), (row[1], 3)]


def multiply_eq8_0(
    i: Any,
    pieces: list[Registers],
    done: Done,
    constants: list[Registers],
    x: LoadX,
    sums: list[Registers],
    columns: tuple[int, ...],
) -> list[Registers]:
    """Adds, per row: sum_g scale_g * sum(q * x)."""
    del constants
    rows, codes = pieces[:2], pieces[2:]
    sums = [list(tile) for tile in sums]
    for group, words in enumerate(codes):
        a = [
            [_pair_of_bytes(i, words[2 * part + j], r) for j in range(2) for r in range(2)]
            for part in range(2)
        ]
        done(2 + group)
        scale = [i.float_of_half(row[group // 2], group % 2) for row in rows]
        if group == len(codes) - 1:
            done(0)
            done(1)
        for tile, total in enumerate(sums):
            b = x(tile, 32 * group, 4)
            product = i.mma(a[1], b[2:], i.mma(a[0], b[:2], _zeros(i)))
            sums[tile] = _scaled_sums(i, scale, product, total, columns)
    return sums


def multiply_q6k(
    i: Any,
    pieces: list[Registers],
    done: Done,
    constants: list[Registers],
    x: LoadX,
    sums: list[Registers],
    columns: tuple[int, ...],
) -> list[Registers]:
    """Adds, per row: d * sum_g sc_g * sum((q - 32) * x) over groups of 16."""
    rows, both, tops, codes = pieces[:2], pieces[2], pieces[3:5], pieces[5:]
    tiles = len(sums)
    scaled = [_zeros(i) for _ in range(tiles)]
    d = [i.float_of_half(both[0], half) for half in range(2)]
    done(2)
    for group in range(16):
        top = tops[group // 8][group % 8 // 2]
        a = []
        for place in range(4):
            field = 4 * (group % 2) + place
            moved = (
                i.shift_left(top, 4 - 2 * field) if field < 2 else i.shift_right(top, 2 * field - 4)
            )
            low = i.and_or(
                i.shift_right(codes[group // 4][group % 4], 4 * place), 0x000F000F, MAGIC
            )
            a.append(i.and_or_register(moved, 0x00300030, low))
        factors = [i.float_of_byte(row[group // 4], group % 4, signed=True) for row in rows]
        for piece, last in ((5 + group // 4, 4), (3 + group // 8, 8), (0, 16), (1, 16)):
            if group % last == last - 1:
                done(piece)
        for tile in range(tiles):
            b = x(tile, 16 * group, 2)
            product = i.mma(a, b, i.mma(constants[0], b, _zeros(i)))
            scaled[tile] = _scaled_sums(i, factors, product, scaled[tile], columns)
    return [_scaled_sums(i, d, scaled[t], sums[t], columns) for t in range(tiles)]


def multiply_plain(
    i: Any,
    pieces: list[Registers],
    done: Done,
    constants: list[Registers],
    x: LoadX,
    sums: list[Registers],
    columns: tuple[int, ...],
) -> list[Registers]:
    """Adds sum(w * x)."""
    del constants, columns  # the tensor core adds all columns
    sums = [list(tile) for tile in sums]
    for group in range(PLAIN_CHUNK // 32):
        upper, lower = pieces[2 * group : 2 * group + 2]
        for tile, total in enumerate(sums):
            b = x(tile, 32 * group, 4)
            for part in (0, 2):
                a = [upper[part], lower[part], upper[part + 1], lower[part + 1]]
                total = i.mma(a, b[part : part + 2], total)
            sums[tile] = total
        done(2 * group)
        done(2 * group + 1)
    return sums


def fragment_of_nibbles(i: Any, word: Register, magic: Register | None = None) -> Registers:
    """a0 to a3, each two bfloat16 128 + q; `magic` is a register that holds `MAGIC`, if there is one."""
    magic = i.u32(MAGIC) if magic is None else magic
    return [i.and_or_register(i.shift_right(word, 4 * n), 0x000F000F, magic) for n in range(4)]


def _pair_of_bytes(i: Any, word: Register, which: int) -> Register:
    """Bytes 2 `which` and the next, in two's complement, as two bfloat16: 128 + low seven bits, less 128 or 256."""
    spread = i.bytes_of(word, 0x4342 if which else 0x4140)
    low, high = i.and_or(spread, 0x007F007F, MAGIC), i.and_or(spread, 0x00800080, MAGIC)
    return i.subtract_bf16x2(low, high)


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
