"""The lane program of a block of 64 slots: scores by slots, shared through memory, then values by columns.

Warp w has slots 16 w to 16 w + 15 in the first product and the w-th quarter of the columns, of all 64 slots, in the
second. So a lane has a quarter of the sums it would have if warps shared slots alone, which is what lets a head size of
512 fit its registers; every warp keeps the same maximum and sum of weights, and nothing is left to exchange at the end.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from pallas_kernels.attention_decode.schedule import BLOCK
from pallas_kernels.attention_decode.shape import Shape
from pallas_kernels.lanes import WARPS, Register, Registers

NO_SCORE = -1e30
SCORE_WORDS = BLOCK + 8  # from one row to the next: rows begin in different banks
_TILE = BLOCK // WARPS  # slots of a warp, and of a product with values
_LOG2_E = math.log2(math.e)


class TakeBlock:
    """Takes a block into the online soft-max (Milakov and Gimelshein, arXiv:1805.02867)."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __call__(self, i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Registers]:
        """Refs: keys, values, positions, pages, q and scores; arrays: sums of values, and of each half's rows highest
        score and this lane's part of the sum of weights; scalars: block, batch row, KV head, tile, last position.
        """
        keys, values, positions, pages, q_smem, scores_smem = refs
        sums, state = arrays
        block, batch, head, tile, last = scalars
        first = i.imul(block, i.u32(BLOCK))
        # Beyond it lanes read it again: a load on a condition would keep its registers from all else in the loop.
        newest = i.imin(last, i.u32(self.shape.slots - 1))
        most = i.iadd(newest, i.imul(first, i.u32(0xFFFFFFFF)))  # of the block, or more than it has
        row = self.shape.block_row(i, pages, batch, block)
        keys_of_slots = self._load_keys(i, keys, row, head, most)

        def load_values(part: int, after: Any = None) -> list[Registers]:
            begin = i.u32(part * _TILE) if after is None else i.iadd(after, i.u32(part * _TILE))
            return self._load_values(i, values, row, head, begin, most)

        # Registers have room for the values of 64 slots beside the keys up to 256 columns, later for those of 32.
        ahead = range(WARPS if self.shape.head_dim <= 256 else WARPS // 2)
        loaded = [load_values(part) for part in ahead] if len(ahead) == WARPS else []
        scores = self._scores(i, q_smem, keys_of_slots)
        seen = self._seen(i, positions, batch, tile, first, newest, last)
        buffer = i.imul(i.and_(block, 1), i.u32(8 * self.shape.halves * SCORE_WORDS))
        self._share(i, scores_smem, buffer, scores, seen)
        loaded = loaded or [load_values(part) for part in ahead]
        i.synchronize()
        highest, totals, rescale = self._highest(i, scores_smem, buffer, state)
        sums = [i.fmul(x, rescale[n // 4 % len(highest)][n % 2]) for n, x in enumerate(sums)]
        for part in range(WARPS):
            slots = loaded.pop(0)
            weights, totals = self._weights(i, scores_smem, buffer, highest, totals, part)
            sums = self._add(i, sums, slots, weights)
            following = part + len(loaded) + 1
            if following < WARPS:
                loaded.append(load_values(following, i.zero_after(sums[-1])))
        return [sums, list(itertools.chain.from_iterable(zip(highest, totals, strict=True)))]

    def _load_keys(
        self, i: Any, keys: Any, row: Any, head: Any, most: Any
    ) -> list[list[Registers]]:
        """Of slots g and g + 8 of this warp's 16, by 32 columns: lane t's eight.

        They are B fragments, but that columns come in another order: that of q.
        """
        shape = self.shape
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        mine = i.imul(i.warp(), i.u32(_TILE))
        out = []
        for n in range(2):
            slot = i.imin(i.iadd(mine, i.iadd(g, i.u32(8 * n))), most)
            word = shape.cache_word(i, i.iadd(row, slot), head)
            word = i.iadd(word, i.shift_left(t, 2))
            offsets = range(0, shape.head_words, 16)
            out.append([i.load(keys, word, 4, offset=o, streamed=True) for o in offsets])
        return out

    def _scores(self, i: Any, q_smem: Any, keys: list[list[Registers]]) -> list[Registers]:
        """q . k of the warp's 16 slots: C fragments of two times 8."""
        shape = self.shape
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        scores = [[i.number(0.0)] * 4 for _ in range(2)]
        starts = [
            i.iadd(
                i.imul(
                    i.imin(i.iadd(g, i.u32(8 * half)), i.u32(shape.tile_rows - 1)),
                    i.u32(shape.q_words),
                ),
                i.shift_left(t, 2),
            )
            for half in range(shape.halves)
        ]
        for place in range(shape.head_words // 16):
            rows = [i.load(q_smem, start, 4, offset=16 * place) for start in starts]
            other = rows[1] if shape.halves == 2 else [i.u32(0)] * 4
            for n in range(2):
                for part in (0, 2):
                    a = [rows[0][part], other[part], rows[0][part + 1], other[part + 1]]
                    scores[n] = i.mma(a, keys[n][place][part : part + 2], scores[n])
        return scores

    def _seen(
        self, i: Any, positions: Any, batch: Any, tile: Any, first: Any, newest: Any, last: Any
    ) -> list[Registers]:
        """Of rows g and g + 8: which of this lane's slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 they see."""
        shape = self.shape
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        latest = i.irem(last, i.u32(shape.slots))  # slot of the last position
        before = i.iadd(last, i.imul(latest, i.u32(0xFFFFFFFF)))  # position of slot 0, if as new
        start = i.iadd(i.iadd(first, i.imul(i.warp(), i.u32(_TILE))), i.shift_left(t, 1))
        held = []
        for offset in (0, 1, 8, 9):
            slot = i.iadd(start, i.u32(offset))
            position = i.iadd(before, slot)
            older = i.iadd(position, i.u32(-shape.slots))
            position = i.select(i.less(latest, slot), older, position)
            held.append((position, i.less(slot, i.iadd(newest, i.u32(1)))))
        out = []
        for half in range(shape.halves):
            query, _, exists = shape.row_of(i, tile, i.iadd(g, i.u32(8 * half)))
            at = i.iadd(i.imul(batch, i.u32(shape.queries)), query)
            [own] = i.load(positions, at, 1, where=exists, otherwise=0xFFFFFFFF)
            is_query = i.less(own, i.u32(1 << 31))
            seen = []
            for position, is_held in held:
                ok = i.both(i.both(is_query, is_held), i.less(position, i.iadd(own, i.u32(1))))
                if shape.window is not None:
                    # p > q - window, without a difference that may be negative.
                    ok = i.both(ok, i.less(own, i.iadd(position, i.u32(shape.window))))
                seen.append(ok)
            out.append(seen)
        return out

    def _share(
        self, i: Any, scores_smem: Any, buffer: Any, scores: list[Registers], seen: list[Registers]
    ) -> None:
        """Writes this warp's scores, base 2, ``[rows, 64]``."""
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        column = i.iadd(i.imul(i.warp(), i.u32(_TILE)), i.shift_left(t, 1))
        word = i.iadd(i.iadd(buffer, i.imul(g, i.u32(SCORE_WORDS))), column)
        for half in range(self.shape.halves):
            for n in range(2):
                pair = [
                    i.select(
                        seen[half][2 * n + p],
                        i.fmul(scores[n][2 * half + p], i.number(_LOG2_E)),
                        i.number(NO_SCORE),
                    )
                    for p in range(2)
                ]
                i.store(scores_smem, word, pair, offset=8 * half * SCORE_WORDS + 8 * n)

    def _highest(
        self, i: Any, scores_smem: Any, buffer: Any, state: Registers
    ) -> tuple[Registers, Registers, list[Registers]]:
        """Of each half: the highest score of its row with this block, the sum of weights before it, relative to that
        score, and what its queries' sums of values are multiplied by.
        """
        highest, totals, rescale = [], [], []
        for half in range(self.shape.halves):
            best = state[2 * half]
            for place in range(0, BLOCK, 8):
                for score in self._read(i, scores_smem, buffer, half, place):
                    best = i.fmax(best, score)
            for distance in (1, 2):  # the four lanes of a row
                best = i.fmax(best, i.shuffle_xor(best, distance))
            scale = i.exp2(i.fadd(state[2 * half], i.fneg(best)))
            highest.append(best)
            totals.append(i.fmul(state[2 * half + 1], scale))
            rescale.append(of_queries(i, scale))
        return highest, totals, rescale

    def _weights(
        self,
        i: Any,
        scores_smem: Any,
        buffer: Any,
        highest: Registers,
        totals: Registers,
        part: int,
    ) -> tuple[list[Registers], Registers]:
        """Of each half: the B fragment of the weights of 16 slots, and the sum of weights with theirs."""
        fragments, new_totals = [], []
        for half, (best, total) in enumerate(zip(highest, totals, strict=True)):
            # Read again: kept, the scores of a block would take registers that values need.
            after = i.iadd(buffer, i.zero_after(best))
            fragment = []
            for place in (part * _TILE, part * _TILE + 8):
                weights = [
                    i.select(
                        i.less_float(i.number(NO_SCORE), score),
                        i.exp2(i.fadd(score, i.fneg(best))),
                        i.number(0.0),
                    )
                    for score in self._read(i, scores_smem, after, half, place)
                ]
                for weight in weights:
                    total = i.fadd(total, weight)
                fragment.append(i.bf16x2_of_floats(*weights))
            fragments.append(fragment)
            new_totals.append(total)
        return fragments, new_totals

    def _read(self, i: Any, scores_smem: Any, buffer: Any, half: int, place: int) -> Registers:
        """Row g's scores of slots 2 t and 2 t + 1 after `place`."""
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        word = i.iadd(i.iadd(buffer, i.imul(g, i.u32(SCORE_WORDS))), i.shift_left(t, 1))
        offset = 8 * half * SCORE_WORDS + place
        return [i.float_of_bits(bits) for bits in i.load(scores_smem, word, 2, offset=offset)]

    def _load_values(
        self, i: Any, values: Any, row: Any, head: Any, begin: Any, most: Any
    ) -> list[Registers]:
        """Of the 16 slots from `begin` on: words of slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, in this warp's columns."""
        shape = self.shape
        start = i.iadd(begin, i.shift_left(i.and_(i.lane(), 3), 1))
        out: list[Registers] = []
        for offset in (0, 1, 8, 9):
            slot = i.imin(i.iadd(start, i.u32(offset)), most)
            word = shape.cache_word(i, i.iadd(row, slot), head)
            word = i.iadd(word, first_value_word(i, shape))
            pieces = (
                i.load(values, word, shape.vector, offset=32 * piece, streamed=True)
                for piece in range(shape.pieces)
            )
            out.append(list(itertools.chain.from_iterable(pieces)))
        return out

    def _add(
        self, i: Any, sums: Registers, slots: list[Registers], weights: list[Registers]
    ) -> Registers:
        """sums + v.T @ weights of 16 slots: C fragments of 16 columns of v by 8 queries.

        A word of two columns gives two rows of A, so that columns 2 n and 2 n + 1 of lane g's are rows g and g + 8 of
        fragment n.
        """
        out: Registers = []
        for n in range(len(slots[0])):
            a = [
                i.bytes_of_two(slots[s][n], slots[s + 1][n], selector)
                for s in (0, 2)
                for selector in (0x5410, 0x7632)
            ]
            for b in weights:
                out += i.mma(a, b, sums[len(out) : len(out) + 4])
        return out


def first_value_word(i: Any, shape: Shape) -> Register:
    """Within a head: the first word of this lane's columns of v; those of the next piece lie 32 further."""
    g = i.shift_right(i.lane(), 2)
    quarter = i.imul(i.warp(), i.u32(shape.head_words // WARPS))
    return i.iadd(quarter, i.imul(g, i.u32(shape.vector)))


def of_queries(i: Any, value: Register) -> Registers:
    """Of queries 2 t and 2 t + 1 what the lanes of rows 2 t and 2 t + 1 have."""
    t = i.and_(i.lane(), 3)
    return [i.shuffle(value, i.iadd(i.shift_left(t, 3), i.u32(n))) for n in (0, 4)]
