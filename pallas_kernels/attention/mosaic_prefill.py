"""``attention`` for prompts, on Hopper: two warpgroups of ``wgmma`` around an online soft-max in registers.

    q ──TMA, once──▶ q_smem ────────────────┐
    k ──TMA, `Config.stages`──▶ k_smem ─────┴▶ wgmma ─▶ scores ─▶ mask ─▶ soft-max ─▶ bfloat16 A fragments ─┐
    v ──TMA, `Config.stages`──▶ v_smem ─────────────────────────────────────────────────────────────────────┴▶ wgmma

A CTA takes query heads that read one KV head, `heads_per_tile` of them, and as many queries as make a tile of 64 rows:
row ``head * queries_per_tile + query``. Up to a head size of 256 each of its two warpgroups has a tile of its own, and
the next queries are the second's; at 512 they share one tile, both compute its scores, and each has half of the columns
of v, because 64 x 512 sums would not fit into the registers of one.

The warpgroups take turns, at a barrier: while one is at its soft-max, the other has the tensor cores. The barrier also
says that the other has left the keys or values of the block before, whose place the first warpgroup, in which one
thread issues all copies, then fills again; there is no third warpgroup, which would leave each 168 registers (see
`quantized_matmul.mosaic_prefill`).

Which blocks of keys a tile visits, XLA says beforehand, in a range per tile: from the first to the last block that has
a position within its queries' reach. So a sliding layer's work grows with T * window wherever slots lie in the order of
their positions, as a ring (whose wrap doubles its range at most) and a chunk beside it do; in any order the result is
right. What of a block a row sees is one unsigned comparison: ``position - slot's position < window``, with empty slots
at ``EMPTY`` and 0 for the window of a row of padding. The last block begins where it ends with the last slot, and does
not see again what the block before had.

Values: scores and sums in float32, weights rounded to bfloat16 for the second product but not in their sum.

Shared memory: 64 KB of q and 128 KB of k and v (C of 256: blocks of 64 slots, 512: of 32, two stages). Bytes moved:
k and v of the range once per CTA, from L2 after the first; q and the result once. Bound: the tensor cores, 4 * C * 64 *
`block_kv` operations a tile and block, half as many again at 512, where the scores are computed twice. No card has run
it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes, target, wgmma
from pallas_kernels.lanes import Registers

HEAD_SIZES = (64, 128, 256, 512)
WARPGROUPS = 2
ROWS = wgmma.ROWS
EMPTY = (
    2**31 - 1
)  # position of a slot that none sees: every distance to it is large as an unsigned integer
_MOST_COLUMNS = 256  # of a wgmma
_MOST_HEADS = 8  # of a tile: the swizzle has rows in groups of eight, which one head's queries fill
# A score of what is not seen is so far below any highest score, and that below any real score, that its weight is 0.
_HIDDEN, _LOWEST = -1e30, -1e20
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """How much of k and v is in shared memory at a time.

    block_kv: slots of a block, 32 or 64.
    stages: blocks, two or more: one in use and one ahead.
    """

    block_kv: int = 64
    stages: int = 2

    def __post_init__(self) -> None:
        if self.block_kv not in (32, 64) or self.stages < 2:
            raise ValueError(f"{self}: block_kv must be 32 or 64, stages at least 2")


def why_not(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> str | None:
    """Wants a Hopper GPU, bfloat16, C of 64, 128, 256 or 512, and S a multiple of 8."""
    capability = target.compute_capability()
    if capability != target.HOPPER and not lanes.is_interpreted():
        return (
            f"the GPU has compute capability {capability}: wgmma is Hopper's ({target.HOPPER}) only; where none is "
            "present, pallas_kernels.target.compiling_for names it"
        )
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.dtype != jnp.bfloat16:
            return f"{name} has dtype {array.dtype}: tensor cores take bfloat16"
    if q.shape[3] not in HEAD_SIZES:
        return f"the head size is {q.shape[3]}: expected one of {', '.join(map(str, HEAD_SIZES))}"
    if not (q.size and k.size):
        return f"q {q.shape} or k {k.shape} is empty"
    if k.shape[1] % 8:
        return f"the cache has {k.shape[1]} slots: expected a multiple of 8"
    return None


def default_config(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> Config:
    """The most that shared memory holds in two stages."""
    return Config(block_kv=32 if q.shape[3] > _MOST_COLUMNS else 64)


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
    kernel = _Kernel(batch, queries, heads, k.shape[2], head_dim, k.shape[1], window, config)
    # TMA wants whole groups of eight rows, and a whole box.
    to_eight = max(-(-queries // 8) * 8, kernel.queries_per_tile) - queries
    q = jnp.pad(q, [(0, 0), (0, to_eight), (0, 0), (0, 0)])
    missing = max(config.block_kv - k.shape[1], 0)
    k, v = (jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) for x in (k, v))
    q_tiles, kv_blocks = kernel.tiles_of(q_positions), kernel.blocks_of(kv_positions)
    ranges = visited(q_tiles, kv_blocks, window)
    return kernel.call(q, k, v, q_tiles, kv_blocks, ranges)


def visited(q_tiles: jax.Array, kv_blocks: jax.Array, window: int | None) -> jax.Array:
    """First and one past last block of slots for each tile of queries: int32 ``[B, tiles, 2]``, equal for none.

    Args:
        q_tiles: positions ``[B, tiles, queries]``, negative for padding.
        kv_blocks: positions ``[B, blocks, slots]``, `EMPTY` for none.
        window: as `pallas_kernels.attention.attention` has it.
    """
    newest_query = jnp.max(q_tiles, axis=2)[:, :, None]
    oldest_query = jnp.min(jnp.where(q_tiles < 0, EMPTY, q_tiles), axis=2)[:, :, None]
    oldest_key = jnp.min(kv_blocks, axis=2)[:, None, :]
    newest_key = jnp.max(jnp.where(kv_blocks == EMPTY, -1, kv_blocks), axis=2)[:, None, :]
    needed = (newest_key >= 0) & (oldest_key <= newest_query)
    if window is not None:
        needed &= newest_key > oldest_query - window
    index = jnp.arange(kv_blocks.shape[1], dtype=jnp.int32)
    end = jnp.max(jnp.where(needed, index + 1, 0), axis=2)
    first = jnp.min(jnp.where(needed, index, kv_blocks.shape[1]), axis=2)
    return jnp.stack([jnp.minimum(first, end), end], axis=-1)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    batch: int
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    window: int | None
    config: Config

    @property
    def parts(self) -> int:
        """Warpgroups that share a tile, each with its part of v's columns."""
        return max(1, self.head_dim // _MOST_COLUMNS)

    @property
    def columns(self) -> int:
        """Of v that a warpgroup multiplies."""
        return self.head_dim // self.parts

    @property
    def heads_per_tile(self) -> int:
        """Query heads of a tile: the largest power of two that divides those of a KV head, at most `_MOST_HEADS`."""
        return math.gcd(self.heads // self.kv_heads, _MOST_HEADS)

    @property
    def queries_per_tile(self) -> int:
        """Of each of these heads, in a tile of a warpgroup."""
        return ROWS // self.heads_per_tile

    @property
    def queries_per_cta(self) -> int:
        """Of all its warpgroups."""
        return self.queries_per_tile * WARPGROUPS // self.parts

    @property
    def tiles(self) -> int:
        """CTAs for the queries of a head."""
        return -(-self.queries // self.queries_per_cta)

    @property
    def blocks(self) -> int:
        """Of slots."""
        return -(-self.slots // self.config.block_kv)

    def tiles_of(self, q_positions: jax.Array) -> jax.Array:
        """int32 ``[B, tiles, queries]``, filled up with padding."""
        missing = self.tiles * self.queries_per_cta - self.queries
        padded = jnp.pad(q_positions.astype(jnp.int32), [(0, 0), (0, missing)], constant_values=-1)
        return padded.reshape(self.batch, self.tiles, self.queries_per_cta)

    def blocks_of(self, kv_positions: jax.Array) -> jax.Array:
        """int32 ``[B, blocks, slots]``, the last ending with the last slot, those of the one before empty."""
        block_kv = self.config.block_kv
        found = kv_positions.astype(jnp.int32)
        found = jnp.where(found < 0, EMPTY, found)
        missing = max(block_kv - self.slots, 0)
        found = jnp.pad(found, [(0, 0), (0, missing)], constant_values=EMPTY)
        whole = (self.blocks - 1) * block_kv
        last = found[:, -block_kv:]
        is_new = jnp.arange(block_kv) >= whole + block_kv - found.shape[1]
        found = jnp.concatenate([found[:, :whole], jnp.where(is_new, last, EMPTY)], axis=1)
        return found.reshape(self.batch, self.blocks, block_kv)

    def call(self, *arguments: jax.Array) -> jax.Array:
        """The kernel, on padded arrays."""
        stages, block_kv = self.config.stages, self.config.block_kv
        groups = self.heads // self.heads_per_tile

        def smem(*shape: int, swizzle: int = 128) -> Any:
            tiling = plgpu.TilingTransform((8, swizzle // 2))  # type: ignore[abstract]
            swizzled: Any = (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
            return plgpu.SMEM((*shape, self.columns), jnp.bfloat16, transforms=swizzled)

        return plgpu.kernel(
            self._body,
            out_type=jax.ShapeDtypeStruct(
                (self.batch, self.queries, self.heads, self.head_dim), jnp.bfloat16
            ),
            grid=(self.batch * groups * self.tiles,),
            grid_names=("cta",),
            num_threads=WARPGROUPS,
            thread_name="warpgroup",
            scratch_types=(
                smem(WARPGROUPS, ROWS),
                smem(stages, self.parts, block_kv),
                smem(stages, self.parts, block_kv, swizzle=2 * block_kv),
                plgpu.Barrier(num_arrivals=WARPGROUPS * self.heads_per_tile),
                plgpu.Barrier(num_arrivals=self.parts, num_barriers=stages),
                plgpu.Barrier(num_arrivals=self.parts, num_barriers=stages),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
            ),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=lanes.interpret_params(),
            kernel_name="attention_prefill",
        )(*arguments)

    def _body(self, *refs: Any) -> None:
        q_gmem, k_gmem, v_gmem, q_tiles_gmem, kv_blocks_gmem, ranges_gmem, out_gmem = refs[:7]
        q_smem, k_smem, v_smem, q_ready, k_ready, v_ready, turn = refs[7:]
        stages, block_kv = self.config.stages, self.config.block_kv
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        groups = self.heads // self.heads_per_tile
        # The last queries, which see most, first; all heads of a row and tile together, for L2.
        place = lax.div(cta, jnp.int32(groups))
        group = lax.rem(cta, jnp.int32(groups))
        batch = lax.rem(place, jnp.int32(self.batch))
        tile = self.tiles - 1 - lax.div(place, jnp.int32(self.batch))
        first_head = group * self.heads_per_tile
        kv_head = lax.div(first_head, jnp.int32(self.heads // self.kv_heads))
        own_tile = warpgroup if self.parts == 1 else jnp.int32(0)
        first_query = tile * self.queries_per_cta + own_tile * self.queries_per_tile
        first_block, end_block = ranges_gmem[batch, tile, 0], ranges_gmem[batch, tile, 1]
        steps = end_block - first_block
        is_loader = warpgroup == 0

        def begin_q() -> None:
            for n in range(WARPGROUPS):
                queries = tile * self.queries_per_cta
                queries += n * self.queries_per_tile if self.parts == 1 else 0
                columns = pl.ds(0 if self.parts == 1 else n * self.columns, self.columns)
                for head in range(self.heads_per_tile):
                    rows = pl.ds(head * self.queries_per_tile, self.queries_per_tile)
                    some = pl.ds(queries, self.queries_per_tile)
                    block = q_gmem.at[batch, some, first_head + head, columns]
                    plgpu.copy_gmem_to_smem(block, q_smem.at[n, rows], q_ready)

        def begin(step: Any, gmem: Any, smem: Any, ready: Any) -> None:
            slot = lax.rem(step, jnp.int32(stages))
            slots = max(self.slots, block_kv)
            first = jnp.minimum((first_block + step) * block_kv, slots - block_kv)
            for part in range(self.parts):
                columns = pl.ds(part * self.columns, self.columns)
                block = gmem.at[batch, pl.ds(first, block_kv), kv_head, columns]
                plgpu.copy_gmem_to_smem(block, smem.at[slot, part], ready.at[slot])

        keys, values = (k_gmem, k_smem, k_ready), (v_gmem, v_smem, v_ready)

        @pl.when(is_loader)
        def _() -> None:
            begin_q()
            for step in range(stages):

                @pl.when(step < steps)
                def _(step: int = step) -> None:
                    begin(jnp.int32(step), *keys)
                    begin(jnp.int32(step), *values)

        def take_turns() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def refill(step: Any, memory: Any) -> None:
            """Where the block before that of `step` was, which both warpgroups have left."""
            following = step - 1 + stages
            pl.when(is_loader & (step >= 1) & (following < steps))(
                lambda: begin(following, *memory)
            )

        def one_block(step: Any, carry: Any) -> Any:
            sums, state = carry
            slot = lax.rem(step, jnp.int32(stages))
            slots_of = [(block_kv // 4, jnp.uint32)]
            block = batch * self.blocks + first_block + step
            [positions] = lanes.run(
                self._positions, slots_of, refs=[kv_blocks_gmem], scalars=[block]
            )
            plgpu.barrier_wait(k_ready.at[slot])

            def begun() -> None:
                take_turns()
                refill(step, keys)

            pairs = [
                (q_smem.at[warpgroup if self.parts == 1 else part], k_smem.at[slot, part])
                for part in range(self.parts)
            ]
            scores = wgmma.product(pairs, block_kv, begun)
            sums, state, weights = lanes.run(
                self._softmax,
                [(self.columns // 2, jnp.float32), (4, jnp.float32), (block_kv // 4, jnp.uint32)],
                arrays=[sums, state, scores, positions, rows],
            )
            take_turns()
            refill(step, values)
            plgpu.barrier_wait(v_ready.at[slot])
            part = 0 if self.parts == 1 else warpgroup
            return [wgmma.add_product(sums, weights, v_smem.at[slot, part]), state]

        cta_tile = batch * self.tiles + tile
        state, rows = lanes.run(
            self._begin,
            [(4, jnp.float32), (4, jnp.uint32)],
            refs=[q_tiles_gmem],
            scalars=[cta_tile, own_tile],
        )
        plgpu.barrier_wait(q_ready)
        pl.when(warpgroup == 1)(take_turns)
        carry = lax.fori_loop(0, steps, one_block, [lanes.zeros(self.columns // 2), state])
        pl.when(warpgroup == 0)(take_turns)

        def write() -> None:
            first_column = jnp.int32(0) if self.parts == 1 else warpgroup * self.columns
            scalars = [batch, first_query, first_head, first_column]
            lanes.run(self._store, refs=[out_gmem], arrays=carry, scalars=scalars, stores=[0])

        lanes.in_turn(write, WARPGROUPS)

    def _row(self, i: Any, half: int) -> Any:
        """Of the tile, that this lane's registers of a half belong to."""
        g = i.shift_right(i.lane(), 2)
        return i.iadd(i.iadd(i.shift_left(i.warp(), 4), g), i.u32(8 * half))

    def _begin(self, i: Any, refs: Any, _: Any, scalars: Any) -> list[Registers]:
        """Highest score and sum of weights of this lane's two rows; their positions and windows."""
        cta_tile, own_tile = scalars
        state = [i.number(_LOWEST), i.number(0.0)] * 2
        first = i.imul(cta_tile, i.u32(self.queries_per_cta))
        first = i.iadd(first, i.imul(own_tile, i.u32(self.queries_per_tile)))
        rows: Registers = []
        for half in range(2):
            query = i.and_(self._row(i, half), self.queries_per_tile - 1)
            [position] = i.load(refs[0], i.iadd(first, query), 1)
            exists = i.less(position, i.u32(2**31))
            window = 2**31 if self.window is None else min(self.window, 2**31)
            rows += [position, i.select(exists, i.u32(window), i.u32(0))]
        return [state, rows]

    def _positions(self, i: Any, refs: Any, _: Any, scalars: Any) -> list[Registers]:
        """Of the slots of a block that are this lane's: columns 2 t and 2 t + 1 of every 8."""
        t = i.and_(i.lane(), 3)
        word = i.iadd(i.imul(scalars[0], i.u32(self.config.block_kv)), i.shift_left(t, 1))
        pairs = [i.load(refs[0], word, 2, offset=n) for n in range(0, self.config.block_kv, 8)]
        return [[position for pair in pairs for position in pair]]

    def _softmax(self, i: Any, _: Any, arrays: Any, __: Any) -> list[Registers]:
        """Takes a block's scores into the online soft-max (Milakov and Gimelshein, arXiv:1805.02867)."""
        sums, state, scores, positions, rows = arrays
        weights = list(scores)
        new_state: Registers = []
        scales: Registers = []
        for half in range(2):
            highest, total = state[2 * half : 2 * half + 2]
            position, window = rows[2 * half : 2 * half + 2]
            mine = [4 * n + 2 * half + pair for n in range(len(scores) // 4) for pair in range(2)]
            best = highest
            for slot, index in zip(positions, mine, strict=True):
                seen = i.less(i.isub(position, slot), window)
                weights[index] = i.select(seen, scores[index], i.number(_HIDDEN))
                best = i.fmax(best, weights[index])
            for distance in (1, 2):  # the four lanes of a row
                best = i.fmax(best, i.shuffle_xor(best, distance))
            shift = i.fmul(best, i.number(-_LOG2_E))
            # Not by the rounded shift, which is far from -log2(e) times a highest score that is still `_LOWEST`.
            scale = i.exp2(i.fmul(i.fsub(highest, best), i.number(_LOG2_E)))
            total = i.fmul(total, scale)
            for index in mine:
                weights[index] = i.exp2(i.fma(weights[index], i.number(_LOG2_E), shift))
                total = i.fadd(total, weights[index])
            new_state += [best, total]
            scales.append(scale)
        sums = [i.fmul(value, scales[index // 2 % 2]) for index, value in enumerate(sums)]
        pairs = zip(weights[::2], weights[1::2], strict=True)
        return [sums, new_state, [i.bf16x2_of_floats(*pair) for pair in pairs]]

    def _store(self, i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Registers]:
        """Divides by the sums of weights and writes this lane's two rows, two columns at a time."""
        sums, state = arrays
        batch, first_query, first_head, first_column = scalars
        column = i.iadd(first_column, i.shift_left(i.and_(i.lane(), 3), 1))
        for half in range(2):
            total = state[2 * half + 1]
            for distance in (1, 2):
                total = i.fadd(total, i.shuffle_xor(total, distance))
            scale = i.reciprocal(total)
            scale = i.select(i.less_float(i.number(0.0), total), scale, i.number(0.0))
            row = self._row(i, half)
            query = i.iadd(first_query, i.and_(row, self.queries_per_tile - 1))
            bits = self.queries_per_tile.bit_length() - 1
            head = i.iadd(first_head, i.shift_right(row, bits))
            out = i.iadd(i.imul(batch, i.u32(self.queries)), query)
            out = i.iadd(i.imul(out, i.u32(self.heads)), head)
            word = i.iadd(i.imul(out, i.u32(self.head_dim // 2)), i.shift_right(column, 1))
            inside = i.less(query, i.u32(self.queries))
            for index in range(2 * half, len(sums), 4):
                two = [i.fmul(value, scale) for value in sums[index : index + 2]]
                i.store(
                    refs[0], word, [i.bf16x2_of_floats(*two)], offset=index // 4 * 4, where=inside
                )
        return []
