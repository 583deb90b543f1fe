"""``attention`` for a few queries over a long cache: bound by reading keys and values once.

    a block of 64 slots of a KV head's cache, 16 a warp:
    q, in L1 ──▶ A fragments ─────────┐
    k ──16-byte loads──▶ B fragments ─┴▶ mma.sync ─▶ scores ─▶ mask ─▶ online soft-max ─▶ B fragments ─┐
    v ──16-byte loads──▶ pairs of slots (prmt) ──▶ A fragments ────────────────────────────────────────┴▶ mma.sync
    maximum, sum and values of each warp ──shared memory──▶ of the CTA ──▶ global memory ──▶ XLA adds up the CTAs

All queries that read a KV head, `Q` = T * H / K of them, share its slots, each of which is read once: they are rows of
the first product and columns of the second, which takes the scores in the order in which the first leaves them. The
slots of a KV head are dealt out to `Config.splits` CTAs block by block, so that those in use are spread over the GPU
however few they are; a warp whose 16 slots no query sees loads nothing but their positions. CTAs and warps are added
up in a fixed order.

Registers: 240 a thread, of which C / 4 for sums (twice that if Q is more than 8) and C / 4 for keys on their way; two
CTAs an SM. A head size of 512 spills: XLA serves it. Shared memory: 4 warps x Q x C x 4 bytes. Bytes moved: keys and
values of the blocks that are seen, once; 4 bytes of positions a slot; Q x C x 4 bytes a CTA of sums, written and read.
Bound: memory. No card has run it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes
from pallas_kernels.lanes import Registers

MAX_ROWS = 16
_TILE = 16  # slots of a warp at a time
_WARPS = lanes.WARPS
_NO_SCORE = -1e30
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """`splits`: CTAs that share the slots of a KV head of a row, at most one for each block of 64."""

    splits: int = 64


def why_not(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> str | None:
    """Wants bfloat16, C of 64, 128 or 256, at most 16 query rows a KV head (8 at 256), and S a multiple of 16."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.dtype != jnp.bfloat16:
            return f"{name} has dtype {array.dtype}: tensor cores take bfloat16"
    rows, head_dim = q.shape[1] * q.shape[2] // k.shape[2], q.shape[3]
    if head_dim not in (64, 128, 256):
        return f"the head size is {head_dim}: expected 64, 128 or 256"
    most = MAX_ROWS if head_dim <= 128 else MAX_ROWS // 2  # beyond, registers spill
    if not 0 < rows <= most:
        return f"{rows} query rows read a KV head: expected 1 to {most}"
    if k.shape[1] % _TILE:
        return f"the cache has {k.shape[1]} slots: expected a multiple of {_TILE}"
    return None


def default_config(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> Config:
    """About two CTAs for each SM of an H100 or H200."""
    return Config(max(1, min(64, 264 // (k.shape[0] * k.shape[2]))))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    *,
    window: int | None,
    config: Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.attention`."""
    config = config or default_config(q, k, v, q_positions, kv_positions)
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    kernel = _Kernel(batch, queries, heads, kv_heads, head_dim, k.shape[1], window, config.splits)
    values, highest, total = kernel.call(
        q, k, v, q_positions.astype(jnp.int32), kv_positions.astype(jnp.int32)
    )
    # Of the CTAs: [B, K, splits, Q, …].
    scale = jnp.exp2(highest - jnp.max(highest, axis=2, keepdims=True))
    total = jnp.sum(total * scale, axis=2)
    values = jnp.sum(values * scale[..., None], axis=2)
    out = values / jnp.where(total == 0.0, 1.0, total)[..., None]
    out = out.reshape(batch, kv_heads, queries, heads // kv_heads, head_dim)
    return out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    batch: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    window: int | None
    max_splits: int

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Q, query rows that read a KV head: row t * group + h."""
        return self.queries * self.group

    @property
    def halves(self) -> int:
        """Registers of a row tile have rows g and, in the second half, g + 8: 1 if there are none of these."""
        return 1 if self.rows <= 8 else 2

    @property
    def splits(self) -> int:
        return min(self.max_splits, -(-self.slots // (_TILE * _WARPS)))

    @property
    def sums(self) -> int:
        """Registers of a lane for sums of values."""
        return self.halves * self.head_dim // 4

    def call(self, *arguments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float32 values ``[B, K, splits, Q, C]``, highest score and sum of weights ``[B, K, splits, Q]``, base 2."""
        parts = (self.batch, self.kv_heads, self.splits, self.rows)
        # Read from memory: compilers unroll a loop whose length they know, and its loads then want too many registers.
        blocks = jnp.full((1,), -(-self.slots // (_TILE * _WARPS)), jnp.int32)
        return plgpu.kernel(
            self._body,
            out_type=(
                jax.ShapeDtypeStruct((*parts, self.head_dim), jnp.float32),
                jax.ShapeDtypeStruct(parts, jnp.float32),
                jax.ShapeDtypeStruct(parts, jnp.float32),
            ),
            grid=(self.batch * self.kv_heads * self.splits,),
            grid_names=("cta",),
            num_threads=1,
            thread_name="warpgroup",
            scratch_types=(
                plgpu.SMEM((_WARPS, self.rows, self.head_dim), jnp.float32),
                plgpu.SMEM((2, _WARPS, self.rows), jnp.float32),
                plgpu.Barrier(num_arrivals=1),
            ),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=lanes.interpret_params(),
            kernel_name="attention_decode",
        )(*arguments, blocks)

    def _body(self, *refs: Any) -> None:
        inputs, blocks_gmem, outputs = refs[:5], refs[5], refs[6:9]
        values_smem, row_smem, exchanged = refs[9:]
        cta = lax.axis_index("cta")
        split = lax.rem(cta, jnp.int32(self.splits))
        pair = lax.div(cta, jnp.int32(self.splits))  # batch row and KV head

        def one_block(turn: Any, carry: Any) -> Any:
            return lanes.run(
                self._take_block,
                [(self.sums, jnp.float32), (2 * self.halves, jnp.float32)],
                refs=inputs,
                arrays=carry,
                scalars=[pair, split + turn * self.splits],
            )

        [start] = lanes.run(self._nothing_seen, [(2 * self.halves, jnp.float32)])
        carry = [lanes.zeros(self.sums), start]
        turns = lax.div(blocks_gmem[0] - split + self.splits - 1, jnp.int32(self.splits))
        carry = lax.fori_loop(0, turns, one_block, carry)
        lanes.run(self._exchange, refs=[values_smem, row_smem], arrays=carry, stores=[0, 1])
        plgpu.barrier_arrive(exchanged)
        plgpu.barrier_wait(exchanged)

        def finish(row: Any, carry: None) -> None:
            refs = [values_smem, row_smem, *outputs]
            lanes.run(self._finish, refs=refs, scalars=[cta, row], stores=[2, 3, 4])

        lax.fori_loop(0, self.rows, finish, None)

    def _nothing_seen(self, i: Any, *_: Any) -> list[Registers]:
        """Highest score and sum of weights of each row."""
        return [[i.number(_NO_SCORE), i.number(0.0)] * self.halves]

    def _take_block(self, i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Registers]:
        """Takes this warp's 16 slots of a block into the online soft-max (Milakov and Gimelshein, arXiv:1805.02867)."""
        q, k, v, q_positions, kv_positions = refs
        values, state = arrays
        pair, block = scalars
        batch, head = i.idiv(pair, i.u32(self.kv_heads)), i.irem(pair, i.u32(self.kv_heads))
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        first = i.imul(i.iadd(i.imul(block, i.u32(_WARPS)), i.warp()), i.u32(_TILE))
        exists = i.less(first, i.u32(self.slots))

        seen = self._seen(i, q_positions, kv_positions, batch, first, exists, g, t)
        wanted = i.any_lane(_any_of(i, [s for row in seen for s in row]))
        slot = i.iadd(i.imul(batch, i.u32(self.slots)), first)
        scores = self._scores(i, q, k, batch, head, slot, wanted, g, t)

        b: list[Registers] = []
        rescale: list[Registers] = []
        new_state: Registers = []
        for half in range(self.halves):
            highest, total = state[2 * half], state[2 * half + 1]
            mine = [
                i.fmul(scores[n][2 * half + p], i.number(_LOG2_E))
                for n in range(2)
                for p in range(2)
            ]
            masked = [
                i.select(s, score, i.number(_NO_SCORE))
                for s, score in zip(seen[half], mine, strict=True)
            ]
            best = highest
            for score in masked:
                best = i.fmax(best, score)
            for distance in (1, 2):  # the four lanes of a row
                best = i.fmax(best, i.shuffle_xor(best, distance))
            weights = [
                i.select(s, i.exp2(i.fadd(score, i.fneg(best))), i.number(0.0))
                for s, score in zip(seen[half], masked, strict=True)
            ]
            scale = i.exp2(i.fadd(highest, i.fneg(best)))
            total = i.fmul(total, scale)
            for weight in weights:
                total = i.fadd(total, weight)
            new_state += [best, total]
            # Of queries 2 t and 2 t + 1, which the lanes of rows 2 t and 2 t + 1 have.
            rescale.append([i.shuffle(scale, i.iadd(i.shift_left(t, 3), i.u32(n))) for n in (0, 4)])
            b.append([i.bf16x2_of_floats(*weights[:2]), i.bf16x2_of_floats(*weights[2:])])
        return [
            self._add_values(i, v, values, rescale, b, head, slot, wanted, g, t),
            new_state,
        ]

    def _seen(
        self,
        i: Any,
        q_positions: Any,
        kv_positions: Any,
        batch: Any,
        first: Any,
        exists: Any,
        g: Any,
        t: Any,
    ) -> list[Registers]:
        """Of rows g and g + 8: which of this lane's slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 they see."""
        word = i.iadd(i.imul(batch, i.u32(self.slots)), i.iadd(first, i.shift_left(t, 1)))
        nowhere = {"where": exists, "otherwise": 0xFFFFFFFF}
        positions = [
            *i.load(kv_positions, word, 2, **nowhere),
            *i.load(kv_positions, word, 2, offset=8, **nowhere),
        ]
        out = []
        for half in range(self.halves):
            row = i.iadd(g, i.u32(8 * half))
            is_row = i.less(row, i.u32(self.rows))
            at = i.iadd(i.imul(batch, i.u32(self.queries)), i.idiv(row, i.u32(self.group)))
            # Negative positions are large as unsigned integers: no slot is seen by or from one.
            [query] = i.load(q_positions, at, 1, where=is_row, otherwise=0xFFFFFFFF)
            is_query = i.less(query, i.u32(1 << 31))
            seen = []
            for position in positions:
                ok = i.both(is_query, i.less(position, i.iadd(query, i.u32(1))))
                if self.window is not None:
                    # p > q - window, without a difference that may be negative.
                    ok = i.both(ok, i.less(query, i.iadd(position, i.u32(self.window))))
                seen.append(ok)
            out.append(seen)
        return out

    def _scores(
        self, i: Any, q: Any, k: Any, batch: Any, head: Any, slot: Any, wanted: Any, g: Any, t: Any
    ) -> list[Registers]:
        """q . k of the 16 slots: C fragments of two times 8."""
        scores = [[i.number(0.0)] * 4 for _ in range(2)]
        row_words = self.head_dim // 2
        starts = []
        for half in range(self.halves):
            row = i.imin(i.iadd(g, i.u32(8 * half)), i.u32(self.rows - 1))
            query, of_group = i.idiv(row, i.u32(self.group)), i.irem(row, i.u32(self.group))
            at = i.iadd(i.imul(batch, i.u32(self.queries)), query)
            at = i.iadd(
                i.imul(at, i.u32(self.heads)), i.iadd(i.imul(head, i.u32(self.group)), of_group)
            )
            starts.append(i.iadd(i.imul(at, i.u32(row_words)), i.shift_left(t, 2)))
        key = i.iadd(i.imul(i.iadd(slot, g), i.u32(self.kv_heads)), head)
        key = i.iadd(i.imul(key, i.u32(row_words)), i.shift_left(t, 2))
        beyond = 8 * self.kv_heads * row_words  # eight slots on
        for group in range(self.head_dim // 32):
            rows = [i.load(q, start, 4, offset=16 * group) for start in starts]
            other = rows[1] if self.halves == 2 else [i.u32(0)] * 4
            for n in range(2):
                # Where no slot is seen any score will do; values must be numbers.
                offset = n * beyond + 16 * group
                words = i.load(
                    k, key, 4, offset=offset, where=wanted, otherwise=None, streamed=True
                )
                for part in (0, 2):
                    a = [rows[0][part], other[part], rows[0][part + 1], other[part + 1]]
                    scores[n] = i.mma(a, words[part : part + 2], scores[n])
        return scores

    def _add_values(
        self,
        i: Any,
        v: Any,
        values: Registers,
        rescale: list[Registers],
        b: list[Registers],
        head: Any,
        slot: Any,
        wanted: Any,
        g: Any,
        t: Any,
    ) -> Registers:
        """values * rescale + v.T @ weights: C fragments of 16 columns of v by 8 queries.

        Lane 4 g + t loads columns 8 g to 8 g + 7 of each 64 of slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. A word of two
        columns gives two rows of A, so that columns 8 g + 2 n and 8 g + 2 n + 1 are rows g and g + 8 of fragment n.
        """
        row_words = self.head_dim // 2
        row = i.iadd(i.imul(i.iadd(slot, i.shift_left(t, 1)), i.u32(self.kv_heads)), head)
        word = i.iadd(i.imul(row, i.u32(row_words)), i.shift_left(g, 2))
        step = self.kv_heads * row_words
        out: Registers = []
        for block in range(self.head_dim // 64):
            four = [
                i.load(v, word, 4, offset=s * step + 32 * block, where=wanted, streamed=True)
                for s in (0, 1, 8, 9)
            ]
            for n in range(4):
                a = [
                    i.bytes_of_two(four[s][n], four[s + 1][n], selector)
                    for s in (0, 2)
                    for selector in (0x5410, 0x7632)
                ]
                for half in range(self.halves):
                    c = values[len(out) : len(out) + 4]
                    c = [i.fmul(value, rescale[half][q % 2]) for q, value in enumerate(c)]
                    out += i.mma(a, b[half], c)
        return out

    def _exchange(self, i: Any, refs: Any, arrays: Any, _: Any) -> list[Registers]:
        """Writes this warp's part of values ``[4, Q, C]`` and rows' states ``[2, 4, Q]``."""
        values_smem, row_smem = refs
        values, state = arrays
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        first_row = i.imul(i.warp(), i.u32(self.rows))
        query = i.shift_left(t, 1)
        word = i.imul(i.iadd(first_row, query), i.u32(self.head_dim))
        word = i.iadd(word, i.shift_left(g, 3))
        for place in range(0, self.sums, 4):
            tile, half = divmod(place // 4, self.halves)
            block, n = divmod(tile, 4)
            for q in range(2):
                is_row = i.less(i.iadd(query, i.u32(8 * half + q)), i.u32(self.rows))
                offset = (8 * half + q) * self.head_dim + 64 * block + 2 * n
                pair = [values[place + q], values[place + 2 + q]]
                i.store(values_smem, word, pair, offset=offset, where=is_row)
        for half in range(self.halves):
            row = i.iadd(g, i.u32(8 * half))
            is_row = i.less(row, i.u32(self.rows))
            at = i.iadd(first_row, row)
            total = state[2 * half + 1]
            for distance in (1, 2):
                total = i.fadd(total, i.shuffle_xor(total, distance))
            i.store(row_smem, at, [state[2 * half]], where=is_row)
            i.store(row_smem, at, [total], offset=_WARPS * self.rows, where=is_row)
        return []

    def _finish(self, i: Any, refs: Any, _: Any, scalars: Any) -> list[Registers]:
        """Adds up the CTA's warps of a row, a column a lane, and writes values, highest score and sum of weights."""
        values_smem, row_smem, values_gmem, highest_gmem, total_gmem = refs
        cta, row = scalars
        thread = i.iadd(i.shift_left(i.warp(), 5), i.lane())
        states = [
            [
                i.float_of_bits(i.load(row_smem, row, 1, offset=(n * _WARPS + warp) * self.rows)[0])
                for n in range(2)
            ]
            for warp in range(_WARPS)
        ]
        best = states[0][0]
        for highest, _total in states[1:]:
            best = i.fmax(best, highest)
        scales = [i.exp2(i.fadd(highest, i.fneg(best))) for highest, _total in states]
        total = i.number(0.0)
        for scale, (_highest, part) in zip(scales, states, strict=True):
            total = i.fma(scale, part, total)
        out_row = i.iadd(i.imul(cta, i.u32(self.rows)), row)
        for first in range(0, self.head_dim, 128):
            column = i.iadd(thread, i.u32(first))
            inside = i.less(column, i.u32(self.head_dim))
            word = i.iadd(i.imul(row, i.u32(self.head_dim)), column)
            value = i.number(0.0)
            for warp, scale in enumerate(scales):
                offset = warp * self.rows * self.head_dim
                [bits] = i.load(values_smem, word, 1, offset=offset, where=inside)
                value = i.fma(scale, i.float_of_bits(bits), value)
            word = i.iadd(i.imul(out_row, i.u32(self.head_dim)), column)
            i.store(values_gmem, word, [value], where=inside)
        is_first = i.less(thread, i.u32(1))
        i.store(highest_gmem, out_row, [best], where=is_first)
        i.store(total_gmem, out_row, [total], where=is_first)
        return []


def _any_of(i: Any, flags: Registers) -> Any:
    """Whether any of a lane's flags is set."""
    out = flags[0]
    for flag in flags[1:]:
        out = i.either(out, flag)
    return out
