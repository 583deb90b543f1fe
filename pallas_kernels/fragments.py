"""What a lane loads of each weight format, and how it multiplies it by ``mma.sync``, for up to 16 rows of x.

A warp multiplies one *unit*, a row tile's chunk of C columns, by the columns x[0..7] (and x[8..15]) of the product's
other operand. `units(w)` gives the format's `Units`: which registers a lane loads (all in 16-byte pieces but for small
headers), and how it adds their product to its accumulators (`pallas_kernels.fragment_products`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.arrays import QuantizedArray
from pallas_kernels.fragment_products import (
    PLAIN_CHUNK,
    columns_of_groups,
    multiply_eq8_0,
    multiply_narrow_q4k,
    multiply_plain,
    multiply_q4k,
    multiply_q6k,
)
from pallas_kernels.lanes import Register, Registers
from pallas_kernels.packed import ROWS, PackedArray, PackedEQ8_0, PackedQ4K, PackedQ6K, Weight

MAX_ROWS = 16  # of x: two tiles of eight columns in the product

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
    constants: lane programs of four registers each that `multiply` wants, which the kernel runs once.
    mmas: tensor-core instructions of `multiply` for each 16 x 16 weights and tile of columns.
    warpgroups: of an SM that `multiply` leaves registers for: the assembler keeps 4 to 128 registers a lane, 3 to 168.
    """

    chunk: int
    planes: tuple[jax.Array, ...]
    pieces: tuple[tuple[int, Load], ...]
    multiply: Callable[..., list[Registers]]
    constants: tuple[Callable[[Any], Registers], ...] = ()
    mmas: float = 1
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
        pieces = header + codes
        if w.chunk == 64:
            constants = (_filled(-128), _filled(128))
            return Units(w.chunk, planes, pieces, multiply_narrow_q4k, constants, mmas=2)
        pairs = (functools.partial(columns_of_groups, first) for first in (0, 2))
        # 16 of products, eight for the sums of x, six that multiply these.
        mmas = (16 + 8 + 6) / 16
        return Units(w.chunk, planes, pieces, multiply_q4k, (*pairs, _filled(128)), mmas)
    if isinstance(w, PackedEQ8_0):
        header, codes = _headers(1, w.header.shape[-1]), _codes(0, w.chunk // 32)
        return Units(w.chunk, (w.codes, w.header), header + codes, multiply_eq8_0)
    if isinstance(w, PackedQ6K):
        pieces = (*_headers(2, 4), (1, _scales_of_row_pair), *_codes(1, 2), *_codes(0, 4))
        all_planes = (w.codes, w.high, w.header, w.d)
        return Units(w.chunk, all_planes, pieces, multiply_q6k, (_filled(-160),), 2, 3)
    assert not isinstance(w, QuantizedArray)
    chunks = w.shape[-1] // PLAIN_CHUNK
    return Units(PLAIN_CHUNK, (w,), _plain_pieces(chunks), multiply_plain)


def _filled(value: int) -> Callable[[Any], Registers]:
    """Four registers of `value` in bfloat16, twice each, which the assembler cannot know.

    It would otherwise make them anew for each use.
    """
    [half] = np.array([value], ml_dtypes.bfloat16).view(np.uint16).tolist()
    return lambda i: i.opaque(half << 16 | half)


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
    if w.shape[-2] % ROWS or w.shape[-1] % PLAIN_CHUNK:
        return f"w has shape {w.shape}: expected N a multiple of {ROWS} and K one of {PLAIN_CHUNK}"
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
    row_words = chunks * PLAIN_CHUNK // 2

    def load(group: int, half: int, i: Any, refs: Any, unit: Register, where: Any) -> Registers:
        tile, chunk = i.idiv(unit, i.u32(chunks)), i.irem(unit, i.u32(chunks))
        row = i.iadd(i.imul(tile, i.u32(ROWS)), i.shift_right(i.lane(), 2))
        column = i.shift_left(i.and_(i.lane(), 3), 2)
        column = i.iadd(i.imul(chunk, i.u32(PLAIN_CHUNK // 2)), column)
        first = i.iadd(i.imul(row, i.u32(row_words)), column)
        offset = half * 8 * row_words + 16 * group
        return i.load(refs[0], first, 4, offset=offset, where=where, streamed=True)

    return tuple(
        (4, functools.partial(load, group, half))
        for group in range(PLAIN_CHUNK // 32)
        for half in range(2)
    )
