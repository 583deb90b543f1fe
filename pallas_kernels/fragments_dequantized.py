"""How a chunk of each weight format becomes bfloat16 fragments: lane programs for more rows of x than 16.

`dequantizer(w)` gives a lane program that turns the registers of a *unit* (`pallas_kernels.fragments.Units`, the same
loads as the decode kernel's) into A operands, 64 columns at a time. A weight is computed in float32 as the format's
equation says, with at most one rounding, and rounded to bfloat16 once: the bits are those of
``w.dequantize(jnp.bfloat16)``.

Tensor cores find the columns of a group permuted; `permuted` permutes x the same way, so that products meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.fragment_products import (
    MAGIC,
    Done,
    fragment_of_nibbles,
    narrow_scales,
    wide_scales,
)
from pallas_kernels.lanes import Register, Registers
from pallas_kernels.packed import PackedEQ8_0, PackedQ4K, PackedQ6K, Weight

PART = 64  # columns dequantized at a time: four fragments of 16

# ``dequantize(instructions, pieces, part, done)``: the 16 registers of columns 64 part to 64 part + 63 of a unit, a0 to
# a3 of each 16; `pieces` and `done` as in `Units.multiply`, with parts asked for in order.
Dequantize = Callable[[Any, list[Registers], int, Done], Registers]


def dequantizer(w: Weight) -> Dequantize:
    """The lane program for the format of `w`, packed or bfloat16."""
    if isinstance(w, PackedQ4K):
        return functools.partial(_q4k, w.chunk // PART)
    if isinstance(w, PackedEQ8_0):
        return functools.partial(_eq8_0, w.chunk // PART)
    return _q6k if isinstance(w, PackedQ6K) else _plain


def pairs_of_lane(w: Weight) -> int:
    """How many pairs of columns that lie side by side a lane holds: four of a group of 32, in Q6K two of 16."""
    return 2 if isinstance(w, PackedQ6K) else 4


def permuted(x: jax.Array, w: Weight) -> jax.Array:
    """x ``[M, K]`` with its columns in the order in which fragments of `w` have theirs.

    A lane t of four holds 8 t to 8 t + 7 of a group of 32 columns (4 t to 4 t + 3 of 16, in Q6K), and ``mma`` takes
    these for columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each 16: pairs of columns are transposed, 4 lanes by 4 (or 2)
    pairs.
    """
    m, k = x.shape
    return x.reshape(m, -1, 4, pairs_of_lane(w), 2).swapaxes(2, 3).reshape(m, k)


def _q4k(parts: int, i: Any, pieces: list[Registers], part: int, done: Done) -> Registers:
    """d * sc * q - dmin * m: exact products, one rounding of their difference."""
    rows, words = pieces[:2], pieces[2 + part]
    scale, minus_minimum = [], []
    for row in rows:
        sc, m = narrow_scales(i, row) if parts * PART == PART else wide_scales(i, row)
        d, minus_dmin = i.float_of_half(row[0], 0), i.fneg(i.float_of_half(row[0], 1))
        groups = (2 * part, 2 * part + 1)
        scale.append([i.fmul(d, _float_of_byte(i, *sc[group])) for group in groups])
        minus_minimum.append([i.fmul(minus_dmin, _float_of_byte(i, *m[group])) for group in groups])
    out = []
    for index, word in enumerate(words):
        for place, magic in enumerate(fragment_of_nibbles(i, word)):
            s, m = scale[place % 2][index // 2], minus_minimum[place % 2][index // 2]
            q = _floats(i, i.subtract_bf16x2(magic, i.u32(MAGIC)))
            out.append(i.bf16x2_of_floats(*(i.fma(value, s, m) for value in q)))
    done(2 + part)
    if part == parts - 1:
        done(0)
        done(1)
    return out


def _eq8_0(parts: int, i: Any, pieces: list[Registers], part: int, done: Done) -> Registers:
    """scale * q, exact."""
    out = []
    for group in (2 * part, 2 * part + 1):
        scale = [i.float_of_half(row[group // 2], group % 2) for row in pieces[:2]]
        # Codes plus 128 are bytes.
        words = [i.xor(word, 0x80808080) for word in pieces[2 + group]]
        for first in (0, 2):
            for place in range(4):
                column, row = divmod(place, 2)
                q = [
                    _float_of_byte(i, words[first + column], 2 * row + h, zero=128)
                    for h in range(2)
                ]
                out.append(i.bf16x2_of_floats(*(i.fmul(value, scale[row]) for value in q)))
        done(2 + group)
    if part == parts - 1:
        done(0)
        done(1)
    return out


def _q6k(i: Any, pieces: list[Registers], part: int, done: Done) -> Registers:
    """d * sc * (q - 32): an exact scale, one rounding of its product with q - 32."""
    rows, both, tops, codes = pieces[:2], pieces[2], pieces[3 + part // 2], pieces[5 + part]
    d = [i.float_of_half(both[0], half) for half in range(2)]
    # Scales plus 128 are bytes.
    bytes_of_scales = [i.xor(row[part], 0x80808080) for row in rows]
    out = []
    for group, word in enumerate(codes):
        scale = [
            i.fmul(d[half], _float_of_byte(i, bytes_of_scales[half], group, zero=128))
            for half in range(2)
        ]
        top = tops[(4 * part + group) % 8 // 2]
        for place, magic in enumerate(fragment_of_nibbles(i, word)):
            field = 4 * (group % 2) + place
            moved = (
                i.shift_left(top, 4 - 2 * field) if field < 2 else i.shift_right(top, 2 * field - 4)
            )
            codes_plus_128 = i.and_or_register(moved, 0x00300030, magic)
            q = _floats(i, i.subtract_bf16x2(codes_plus_128, i.u32(MAGIC + 0x00200020)))
            s = scale[place % 2]
            out.append(i.bf16x2_of_floats(*(i.fmul(value, s) for value in q)))
    done(5 + part)
    if part % 2:
        done(3 + part // 2)
    if part == 3:
        for piece in range(3):
            done(piece)
    return out


def _plain(i: Any, pieces: list[Registers], part: int, done: Done) -> Registers:
    """The weights as they are: of every 32 columns a piece of row g and one of row g + 8."""
    del part  # of one
    out = []
    for upper, lower in (pieces[:2], pieces[2:]):
        for first in (0, 2):
            out += [upper[first], lower[first], upper[first + 1], lower[first + 1]]
    for piece in range(4):
        done(piece)
    return out


def _floats(i: Any, pair: Register) -> tuple[Register, Register]:
    """Two bfloat16 as float32, the low one first."""
    low, high = i.shift_left(pair, 16), i.and_(pair, 0xFFFF0000)
    return i.float_of_bits(low), i.float_of_bits(high)


def _float_of_byte(i: Any, word: Register, place: int, zero: int = 0) -> Register:
    """Byte `place` less `zero`, by way of the float32 2**23 + byte: conversions run at a quarter of this speed."""
    bits = i.bytes_of(word, 0x7440 | place, 0x4B000000)
    return i.fadd(i.float_of_bits(bits), i.number(-(2.0**23 + zero)))
