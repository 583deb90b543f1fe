"""How a chunk of each weight format is multiplied by ``mma.sync``: lane programs for batches of up to 16 rows of x.

A warp multiplies one *unit*, a row tile's chunk of C columns, by the columns x[0..7] (and x[8..15]) of the product's
other operand. `units(w)` gives the format's `Units`: which registers a lane loads (all in 16-byte pieces but for small
headers), and how it adds their product to its accumulators.

Codes become bfloat16 without conversions: a 4- or 6-bit code in the low mantissa bits of 128 is the number 128 + q.
The 128 goes away in the tensor core: the first product of a group has A = -128 everywhere, which also leaves -128
sum(x), what the minimum of Q4K multiplies. A group's sum is exact products added up in float32; its scale multiplies
that sum.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.arrays import QuantizedArray
from pallas_kernels.lanes import Register, Registers
from pallas_kernels.packed import ROWS, PackedArray, PackedEQ8_0, PackedQ4K, PackedQ6K, Weight

MAX_ROWS = 16  # of x: two tiles of eight columns in the product

MAGIC = 0x43004300  # a pair of bfloat16 128
_MINUS_128 = 0xC300C300
_MINUS_160 = 0xC320C320

# A lane's x: `x(tile, first, words)` are `words` 32-bit words, two elements each, of its column of x in column tile
# `tile`, from column `first` of the chunk on, moved by the lane's own share of that.
LoadX = Callable[[int, int, int], Registers]
Done = Callable[[int], None]


# `load(instructions, refs, unit, where)`: the registers of one piece of a unit; where `where` is false something that
# stands for weights of 0.
Load = Callable[[Any, Sequence[Any], Register, Register], Registers]


@dataclasses.dataclass(frozen=True)
class Units:
    """A weight format to the kernels.

    chunk: C, columns of a unit.
    planes: the arrays to pass to the kernel, in the order of `Load`'s refs.
    pieces: a unit's pieces and how many registers each takes in a lane.
    multiply: ``multiply(instructions, pieces, done, constants, x, sums, columns)`` returns `sums` plus the unit's
        product. It calls ``done(p)`` when it has no more use for piece p: the kernel then loads that of the next unit
        into the registers that are free. Sums are 4 registers for each tile of columns, in the order of C; `columns`
        says which of each pair to compute.
    constants: the words of which `multiply` wants an A operand full, which the kernel makes once.
    warpgroups: of an SM that `multiply` leaves registers for: the assembler keeps 4 to 128 registers a lane, 3 to 168.
    """

    chunk: int
    planes: tuple[jax.Array, ...]
    pieces: tuple[tuple[int, Load], ...]
    multiply: Callable[..., list[Registers]]
    constants: tuple[int, ...] = ()
    warpgroups: int = 4

    @property
    def registers(self) -> int:
        """How many registers of a lane hold a unit."""
        return sum(count for count, _ in self.pieces)

    def split(self, registers: Registers) -> list[Registers]:
        """A lane's registers by piece."""
        ends = list(itertools.accumulate(count for count, _ in self.pieces))
        return [
            registers[end - count : end] for end, (count, _) in zip(ends, self.pieces, strict=True)
        ]


def units(w: Weight) -> Units:
    """The `Units` of a packed array or of a bfloat16 matrix ``[N, K]`` (`why_no_units` is None).

    >>> import jax.numpy as jnp
    >>> units(jnp.zeros((16, 128), jnp.bfloat16)).registers
    16
    """
    if isinstance(w, PackedQ4K):
        header, codes = _headers(1, w.header.shape[-1]), _codes(0, w.chunk // 64)
        planes = (w.codes, w.header)
        return Units(w.chunk, planes, header + codes, _multiply_q4k, (_MINUS_128,))
    if isinstance(w, PackedEQ8_0):
        header, codes = _headers(1, w.header.shape[-1]), _codes(0, w.chunk // 32)
        return Units(w.chunk, (w.codes, w.header), header + codes, _multiply_eq8_0)
    if isinstance(w, PackedQ6K):
        pieces = (*_headers(2, 4), (1, _scales_of_row_pair), *_codes(1, 2), *_codes(0, 4))
        all_planes = (w.codes, w.high, w.header, w.d)
        return Units(w.chunk, all_planes, pieces, _multiply_q6k, (_MINUS_160,), warpgroups=3)
    assert not isinstance(w, QuantizedArray)
    chunks = w.shape[-1] // _PLAIN_CHUNK
    return Units(_PLAIN_CHUNK, (w,), _plain_pieces(chunks), _multiply_plain)


_PLAIN_CHUNK = 64


def why_no_units(w: Weight) -> str | None:
    """Why `w` cannot be read by lane programs, or None."""
    if isinstance(w, PackedArray):
        return None
    if isinstance(w, QuantizedArray):
        return (
            f"w is {type(w).__name__} in the order of its rows: pack it (pallas_kernels.pack_array)"
        )
    if w.dtype.name != "bfloat16":
        return f"w has dtype {w.dtype}: expected bfloat16 or a packed array"
    if w.shape[-2] % ROWS or w.shape[-1] % _PLAIN_CHUNK:
        return f"w has shape {w.shape}: expected N a multiple of {ROWS} and K one of {_PLAIN_CHUNK}"
    return None


# --- loads ------------------------------------------------------------------------------------------------------------


def _codes(plane: int, pieces: int) -> tuple[tuple[int, Load], ...]:
    """Words in fragment order: four a piece, 512 bytes apart."""

    def load(piece: int, i: Any, refs: Any, unit: Register, where: Register) -> Registers:
        first = i.iadd(i.imul(unit, i.u32(128 * pieces)), i.shift_left(i.lane(), 2))
        # Any codes will do where the header's scales are 0.
        offset = 128 * piece
        return i.load(
            refs[plane], first, 4, offset=offset, where=where, otherwise=None, streamed=True
        )

    return tuple((4, functools.partial(load, piece)) for piece in range(pieces))


def _headers(plane: int, words: int) -> tuple[tuple[int, Load], ...]:
    """The header of row g, and that of row g + 8."""

    def load(half: int, i: Any, refs: Any, unit: Register, where: Register) -> Registers:
        row = i.iadd(i.imul(unit, i.u32(ROWS)), i.shift_right(i.lane(), 2))
        first, offset = i.imul(row, i.u32(words)), 8 * words * half
        return i.load(refs[plane], first, words, offset=offset, where=where, streamed=True)

    return tuple((words, functools.partial(load, half)) for half in range(2))


def _scales_of_row_pair(i: Any, refs: Any, unit: Register, where: Register) -> Registers:
    word = i.iadd(i.imul(unit, i.u32(8)), i.shift_right(i.lane(), 2))
    return i.load(refs[3], word, 1, where=where, streamed=True)


def _plain_pieces(chunks: int) -> tuple[tuple[int, Load], ...]:
    """Of every 32 columns those that the packed formats give a lane, of row g and of row g + 8."""
    row_words = chunks * _PLAIN_CHUNK // 2

    def load(group: int, half: int, i: Any, refs: Any, unit: Register, where: Any) -> Registers:
        tile, chunk = i.idiv(unit, i.u32(chunks)), i.irem(unit, i.u32(chunks))
        row = i.iadd(i.imul(tile, i.u32(ROWS)), i.shift_right(i.lane(), 2))
        column = i.shift_left(i.and_(i.lane(), 3), 2)
        column = i.iadd(i.imul(chunk, i.u32(_PLAIN_CHUNK // 2)), column)
        first = i.iadd(i.imul(row, i.u32(row_words)), column)
        offset = half * 8 * row_words + 16 * group
        return i.load(refs[0], first, 4, offset=offset, where=where, streamed=True)

    return tuple(
        (4, functools.partial(load, group, half))
        for group in range(_PLAIN_CHUNK // 32)
        for half in range(2)
    )


# --- products ---------------------------------------------------------------------------------------------------------


def _multiply_q4k(
    i: Any,
    pieces: list[Registers],
    done: Done,
    constants: list[Registers],
    x: LoadX,
    sums: list[Registers],
    columns: tuple[int, ...],
) -> list[Registers]:
    """Adds, per row: d * sum_g sc_g * sum(q * x) - dmin * sum_g m_g * sum(x)."""
    rows, codes = pieces[:2], pieces[2:]
    wide = len(codes) == 4
    integers = [wide_scales(i, row) if wide else narrow_scales(i, row) for row in rows]
    d = [i.float_of_half(row[0], 0) for row in rows]
    # -128 sum(x) has the minimum's sign already.
    dmin = [i.fmul(i.float_of_half(row[0], 1), i.number(1 / 128)) for row in rows]
    done(0)
    done(1)
    # d and dmin multiply the sums of all groups. Two tiles of columns leave no registers for such sums: there they
    # multiply each group's scales, 11 by 6 bits and so exact, and both sums are the total.
    apart = len(sums) == 1
    scaled = [_zeros(i)] if apart else [list(tile) for tile in sums]
    minima = [_zeros(i)] if apart else scaled
    for group in range(2 * len(codes)):
        words = codes[group // 2][group % 2 * 2 :]
        a = [fragment_of_nibbles(i, words[part]) for part in range(2)]
        if group % 2:
            done(2 + group // 2)
        sc, m = ([i.float_of_byte(*row[which][group]) for row in integers] for which in range(2))
        if not apart:
            sc = [i.fmul(*pair) for pair in zip(d, sc, strict=True)]
            m = [i.fmul(*pair) for pair in zip(dmin, m, strict=True)]
        for tile in range(len(sums)):
            b = x(tile, 32 * group, 4)
            ones = i.mma(constants[0], b[2:], i.mma(constants[0], b[:2], _zeros(i)))
            product = i.mma(a[1], b[2:], i.mma(a[0], b[:2], ones))
            scaled[tile] = _scaled_sums(i, sc, product, scaled[tile], columns)
            minima[tile] = _scaled_sums(i, m, ones, minima[tile], columns)
    if not apart:
        return scaled
    total = _scaled_sums(i, d, scaled[0], sums[0], columns)
    return [_scaled_sums(i, dmin, minima[0], total, columns)]


def wide_scales(i: Any, row: Registers) -> tuple[list[tuple[Register, int]], ...]:
    """Where the eight sc and the eight m of a row's chunk are: (register, byte)."""
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
    return tuple([(words[g // 4], g % 4) for g in range(8)] for words in (sc, m))


def narrow_scales(i: Any, row: Registers) -> tuple[list[tuple[Register, int]], ...]:
    return [(row[1], 0), (row[1], 2)], [(row[1], 1), (row[1], 3)]


def _multiply_eq8_0(
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


def _multiply_q6k(
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


def _multiply_plain(
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
    for group in range(_PLAIN_CHUNK // 32):
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


def fragment_of_nibbles(i: Any, word: Register) -> Registers:
    """a0 to a3, each two bfloat16 128 + q."""
    return [i.and_or(i.shift_right(word, 4 * place), 0x000F000F, MAGIC) for place in range(4)]


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
