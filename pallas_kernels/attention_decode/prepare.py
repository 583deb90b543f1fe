"""Lane programs before the first block: norms, RoPE, the queries into shared memory, keys and values into the cache.

A warp takes a head at a time: lane l has columns ``n l .. n l + n - 1`` of each piece of its lower half and those that
RoPE pairs with them in its upper half. All loads of up to four heads are on their way before the first is used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.attention_decode.schedule import BLOCK
from pallas_kernels.attention_decode.shape import Shape
from pallas_kernels.lanes import WARPS, Register, Registers

_HEADS_AT_A_TIME = 4


@dataclasses.dataclass(frozen=True)
class _Head:
    """A head that this warp prepares: where it lies, its weights or None, its query or None, where it goes."""

    source: Register
    exists: Register
    weights: str | None
    table: Register | None
    target: str
    word: Register


class Prepare:
    """The program's refs by name: qkv, q_norm, k_norm, cos, sin, positions, pages, keys, values, q_smem."""

    def __init__(self, shape: Shape, names: tuple[str, ...]) -> None:
        self.shape, self.names = shape, names

    def __call__(self, i: Any, refs: Any, _: Any, scalars: Any) -> list[Registers]:
        """Scalars: batch row, KV head, tile, first block and one past the last of this CTA's run."""
        ref = dict(zip(self.names, refs, strict=True))
        heads = self._heads(i, ref, scalars)
        for first in range(0, len(heads), _HEADS_AT_A_TIME):
            some = heads[first : first + _HEADS_AT_A_TIME]
            loaded = [self._load(i, ref, head) for head in some]
            for head, halves in zip(some, loaded, strict=True):
                self._finish(i, ref, head, halves)
        i.synchronize()
        return []

    def _heads(self, i: Any, ref: dict[str, Any], scalars: Any) -> list[_Head]:
        shape = self.shape
        batch, head, tile, first, end = scalars
        first_row = i.imul(batch, i.u32(shape.queries))
        projected = shape.heads + shape.key_heads + shape.value_heads

        def source(query: Any, which: Any) -> Register:
            row = i.imul(i.iadd(first_row, query), i.u32(projected))
            return i.imul(i.iadd(row, which), i.u32(shape.head_dim))

        def table(query: Any) -> Register:
            return i.imul(i.iadd(first_row, query), i.u32(shape.head_dim // 2))

        out, news = [], []
        for turn in range(-(-shape.queries // WARPS) if shape.key_heads else 0):
            query = i.iadd(i.warp(), i.u32(WARPS * turn))
            inside = i.less(query, i.u32(shape.queries))
            [position] = i.load(
                ref["positions"],
                i.iadd(first_row, query),
                1,
                where=inside,
                otherwise=0xFFFFFFFF,
            )
            slot = i.irem(position, i.u32(shape.slots))
            block = i.idiv(slot, i.u32(BLOCK))
            is_position = i.less(position, i.u32(1 << 31))
            in_run = i.both(i.less(block, end), i.less(first, i.iadd(block, i.u32(1))))
            exists = i.both(is_position, in_run)
            # Of a block of the run, where this one is none of it: a row of pages has that block.
            row = shape.block_row(i, ref["pages"], batch, i.select(in_run, block, first))
            row = i.iadd(row, i.irem(slot, i.u32(BLOCK)))
            word = shape.cache_word(i, row, head)
            k = i.iadd(head, i.u32(shape.heads))
            v = i.iadd(k, i.u32(shape.value_heads))  # k's own where K = V
            news += [
                _Head(source(query, k), exists, "k_norm", table(query), "keys", word),
                _Head(source(query, v), exists, None, None, "values", word),
            ]
        for turn in range(-(-shape.tile_rows // WARPS)):
            row = i.iadd(i.warp(), i.u32(WARPS * turn))
            query, of_group, exists = shape.row_of(i, tile, row)
            exists = i.both(exists, i.less(row, i.u32(shape.tile_rows)))
            which = i.iadd(i.imul(head, i.u32(shape.group)), of_group)
            word = i.imul(row, i.u32(shape.q_words))
            out.append(_Head(source(query, which), exists, "q_norm", table(query), "q_smem", word))
        return [*news, *out]

    def _columns(self, i: Any, piece: int) -> Register:
        n = self.shape.vector
        return i.iadd(i.imul(i.lane(), i.u32(n)), i.u32(32 * n * piece))

    def _load(self, i: Any, ref: dict[str, Any], head: _Head) -> list[list[Registers]]:
        """By piece: lower and upper half of the head, and cosines and sines where it has them."""
        n, half = self.shape.vector, self.shape.head_dim // 2
        out = []
        for piece in range(self.shape.pieces):
            column = self._columns(i, piece)
            word = i.iadd(head.source, column)
            words = [i.load(ref["qkv"], word, n, offset=o, where=head.exists) for o in (0, half)]
            if head.table is not None:
                word = i.iadd(head.table, column)
                words += [i.load(ref[name], word, n, where=head.exists) for name in ("cos", "sin")]
            out.append([[i.float_of_bits(w) for w in four] for four in words])
        return out

    def _finish(
        self, i: Any, ref: dict[str, Any], head: _Head, loaded: list[list[Registers]]
    ) -> None:
        shape = self.shape
        total = i.number(0.0)
        for low, high, *_ in loaded:
            for x in (*low, *high):
                total = i.fma(x, x, total)
        for distance in (1, 2, 4, 8, 16):
            total = i.fadd(total, i.shuffle_xor(total, distance))
        mean = i.fma(total, i.number(1 / shape.head_dim), i.number(shape.eps))
        scale = i.reciprocal_root(mean)
        for piece, (low, high, *table) in enumerate(loaded):
            column = self._columns(i, piece)
            halves = [[i.fmul(x, scale) for x in half] for half in (low, high)]
            if head.weights is not None:
                for n, half in enumerate(halves):
                    weights = self._weights(i, ref[head.weights], column, n * shape.head_dim // 2)
                    halves[n] = [i.fmul(x, w) for x, w in zip(half, weights, strict=True)]
            if table:
                halves = _rotated(i, *halves, *table)
            word = i.iadd(head.word, i.shift_right(column, 1))
            for n, half in enumerate(halves):
                pairs = [i.bf16x2_of_floats(*half[c : c + 2]) for c in range(0, shape.vector, 2)]
                offset = n * shape.head_words // 2
                i.store(ref[head.target], word, pairs, offset=offset, where=head.exists)

    def _weights(self, i: Any, ref: Any, column: Any, first: int) -> Registers:
        n = self.shape.vector
        if not self.shape.bf16_norms:
            return [i.float_of_bits(w) for w in i.load(ref, column, n, offset=first)]
        words = i.load(ref, i.shift_right(column, 1), n // 2, offset=first // 2)
        bits = [half for w in words for half in (i.shift_left(w, 16), i.and_(w, 0xFFFF0000))]
        return [i.float_of_bits(b) for b in bits]


def _rotated(
    i: Any, low: Registers, high: Registers, cos: Registers, sin: Registers
) -> list[Registers]:
    pairs = list(zip(low, high, cos, sin, strict=True))
    return [
        [i.fma(x, c, i.fneg(i.fmul(y, s))) for x, y, c, s in pairs],
        [i.fma(y, c, i.fmul(x, s)) for x, y, c, s in pairs],
    ]
