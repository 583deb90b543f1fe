"""Lane programs after the last block: a run's result, who comes last, and adding up results in their order."""

from __future__ import annotations

from typing import Any

from pallas_kernels.attention_decode.blocks import NO_SCORE, first_value_word, of_queries
from pallas_kernels.attention_decode.schedule import ARRIVALS, FAN, Grid
from pallas_kernels.attention_decode.shape import Shape
from pallas_kernels.lanes import LANES, WARPS, Register, Registers

ROWS_AT_A_TIME = 2


class Write:
    """Writes a run's sums: the result, if the pair has no other run; else a partial result, its maximum and weight."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __call__(self, i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Registers]:
        """Refs: out, partial results ``[ctas, rows, C]``, states ``[levels, ctas, rows, 2]``; arrays as a block leaves
        them; scalars: CTA, batch row, KV head, tile, runs of the pair.
        """
        shape = self.shape
        out, partial, states = refs
        sums, state = arrays
        cta, batch, head, tile, runs = scalars
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        alone, is_part = i.less(runs, i.u32(2)), i.less(i.u32(1), runs)
        first_column = first_value_word(i, shape)
        writes_state = i.both(i.less(i.warp(), i.u32(1)), i.less(t, i.u32(1)))
        for half in range(shape.halves):
            highest, total = state[2 * half], state[2 * half + 1]
            for distance in (1, 2):
                total = i.fadd(total, i.shuffle_xor(total, distance))
            row = i.iadd(g, i.u32(8 * half))
            _, _, exists = shape.row_of(i, tile, row)
            exists = i.both(exists, i.both(is_part, writes_state))
            word = i.iadd(i.imul(cta, i.u32(shape.tile_rows)), row)
            i.store(states, i.shift_left(word, 1), [highest, total], where=exists)

            for q, factor in enumerate(of_queries(i, _inverse(i, total))):
                row = i.iadd(i.shift_left(t, 1), i.u32(8 * half + q))
                query, of_group, exists = shape.row_of(i, tile, row)
                to_out = i.iadd(shape.out_word(i, batch, head, query, of_group), first_column)
                at = i.iadd(i.imul(cta, i.u32(shape.tile_rows)), row)
                to_part = i.imul(at, i.u32(shape.head_dim))
                to_part = i.iadd(to_part, i.shift_left(first_column, 1))
                for piece in range(shape.pieces):
                    values = self._columns(sums, piece, half, q)
                    pairs = [
                        i.bf16x2_of_floats(*(i.fmul(x, factor) for x in values[n : n + 2]))
                        for n in range(0, len(values), 2)
                    ]
                    where = i.both(exists, alone)
                    i.store(out, to_out, pairs, offset=32 * piece, where=where)
                    where = i.both(exists, is_part)
                    for n in range(0, len(values), 4):
                        offset = 64 * piece + n
                        i.store(partial, to_part, values[n : n + 4], offset=offset, where=where)
        return []

    def _columns(self, sums: Registers, piece: int, half: int, q: int) -> Registers:
        """This lane's neighbouring columns of a piece, of query 2 t + q of a half."""
        out = []
        for n in range(self.shape.vector):
            fragment = (piece * self.shape.vector + n) * self.shape.halves + half
            out += [sums[4 * fragment + q], sums[4 * fragment + 2 + q]]
        return out


class Arrive:
    """Says in shared memory whether this CTA is the last of its group to come here; sets the count back if so."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, i: Any, refs: Any, _: Any, scalars: Any) -> list[Registers]:
        """Refs: the schedule and the flag; scalars: the group's first CTA, its level, how many it has."""
        table, flag_smem = refs
        first, level, members = scalars
        i.synchronize()  # all have written
        is_first = i.less(_thread(i), i.u32(1))
        word = i.iadd(i.imul(first, i.u32(self.grid.columns)), i.iadd(level, i.u32(ARRIVALS)))
        before = i.fetch_add(table, word, 1, is_first)
        is_last = i.less(members, i.iadd(before, i.u32(2)))
        i.store(table, word, [i.u32(0)], where=i.both(is_first, is_last))
        flag = i.select(is_last, i.u32(1), i.u32(0))
        i.store(flag_smem, i.u32(0), [flag], where=is_first)
        i.synchronize()
        return []


class Combine:
    """Adds up a group's partial results of some rows: into the result, or into a partial one of the next level."""

    def __init__(self, shape: Shape, grid: Grid) -> None:
        self.shape, self.grid = shape, grid

    def __call__(self, i: Any, refs: Any, _: Any, scalars: Any) -> list[Registers]:
        """Refs as those of `Write`; scalars: turn, the group's first CTA, CTAs from one member to the next, members,
        level, whether this is the last level, batch row, KV head, tile.
        """
        out, partial, states = refs
        turn, first, stride, members, level, is_result, batch, head, tile = scalars
        shape = self.shape
        vector = max(2, shape.head_dim // (WARPS * LANES))
        column = i.imul(_thread(i), i.u32(vector))
        inside = i.less(column, i.u32(shape.head_dim))
        rows = []
        for n in range(ROWS_AT_A_TIME):
            row = i.iadd(i.imul(turn, i.u32(ROWS_AT_A_TIME)), i.u32(n))
            query, of_group, exists = shape.row_of(i, tile, row)
            exists = i.both(exists, i.less(row, i.u32(shape.tile_rows)))
            parts = []
            for member in range(FAN):
                is_member = i.both(exists, i.less(i.u32(member), members))
                cta = i.iadd(first, i.imul(stride, i.u32(member)))
                at = i.iadd(i.imul(cta, i.u32(shape.tile_rows)), row)
                state = i.load(states, self._state(i, level, at), 2, where=is_member)
                word = i.iadd(i.imul(at, i.u32(shape.head_dim)), column)
                values = i.load(partial, word, vector, where=i.both(is_member, inside))
                parts.append((is_member, state, values))
            rows.append((row, query, of_group, exists, parts))
        result, part = i.less(i.u32(0), is_result), i.less(is_result, i.u32(1))
        for row, query, of_group, exists, parts in rows:
            best, total, values = _added(i, parts)
            factor = _inverse(i, total)
            pairs = [
                i.bf16x2_of_floats(*(i.fmul(x, factor) for x in values[n : n + 2]))
                for n in range(0, vector, 2)
            ]
            word = shape.out_word(i, batch, head, query, of_group)
            word = i.iadd(word, i.shift_right(column, 1))
            writes = i.both(exists, inside)
            i.store(out, word, pairs, where=i.both(writes, result))
            at = i.iadd(i.imul(first, i.u32(shape.tile_rows)), row)
            word = i.iadd(i.imul(at, i.u32(shape.head_dim)), column)
            i.store(partial, word, values, where=i.both(writes, part))
            # Of the next level: other warps may still read this one's.
            word = self._state(i, i.iadd(level, i.u32(1)), at)
            writes_state = i.both(i.both(exists, part), i.less(_thread(i), i.u32(1)))
            i.store(states, word, [best, total], where=writes_state)
        return []

    def _state(self, i: Any, level: Any, at: Any) -> Register:
        rows = i.imul(level, i.u32(self.grid.ctas * self.shape.tile_rows))
        return i.shift_left(i.iadd(rows, at), 1)


def _added(
    i: Any, parts: list[tuple[Register, Registers, Registers]]
) -> tuple[Register, Register, Registers]:
    """Highest score, sum of weights and sums of values of all parts that are there."""
    none = i.number(NO_SCORE)
    states = [
        (i.select(there, i.float_of_bits(state[0]), none), i.float_of_bits(state[1]))
        for there, state, _ in parts
    ]
    best = none
    for highest, _ in states:
        best = i.fmax(best, highest)
    total, values = i.number(0.0), [i.number(0.0)] * len(parts[0][2])
    for (highest, weight), (_, _, words) in zip(states, parts, strict=True):
        scale = i.exp2(i.fadd(highest, i.fneg(best)))
        total = i.fma(scale, weight, total)
        values = [i.fma(scale, i.float_of_bits(w), v) for w, v in zip(words, values, strict=True)]
    return best, total, values


def _inverse(i: Any, total: Register) -> Register:
    """1 / total, or 0 where nothing was seen."""
    return i.select(i.less_float(i.number(0.0), total), i.reciprocal(total), i.number(0.0))


def _thread(i: Any) -> Register:
    return i.iadd(i.shift_left(i.warp(), 5), i.lane())
