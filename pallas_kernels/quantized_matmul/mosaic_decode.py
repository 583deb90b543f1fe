"""``quantized_matmul`` for 1 to 16 rows of x: a matrix-vector product on tensor cores, bound by reading the weights.

    global memory ──16-byte loads, one unit ahead──▶ registers ──lop3──▶ A fragment ─┐
    x, in L1 after the first touch ───────16-byte loads──────────────▶ B fragment ─┴▶ mma.sync ─▶ float32 sums
    sums of the warps that share a row tile ──shared memory──▶ added in order ──▶ y

A *unit* is a row tile (16 rows of w) by a chunk (256 or 64 columns): 2.3 KB in Q4K. A CTA has `Config.warpgroups` x 4
warps and `Config.tiles` row tiles; its warps take turns in the chunks of a tile, so K is split over
warps / tiles of them. Each warp reads its own units, holds one in registers while the next is on its way, and never waits
for another until the end. Sums are added in a fixed order: results do not depend on timing.

Bytes moved: w once; x once per SM, from L2. Shared memory: 64 bytes per warp and row of x. Bound: the weights' bytes at
the card's copy bandwidth. No card has run it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes
from pallas_kernels.arrays import Weight
from pallas_kernels.fragments import MAX_ROWS, Units, units, why_no_units
from pallas_kernels.packed import ROWS


@dataclasses.dataclass(frozen=True)
class Config:
    """`tiles` (1, 2 or 4): row tiles of a CTA. `warpgroups`: its warps are four times as many."""

    tiles: int = 1
    warpgroups: int = 1


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Wants bfloat16 x of at most 16 rows, and packed or bfloat16 weights."""
    rows = math.prod(x.shape[:-1])
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}: tensor cores take bfloat16"
    if not 0 < rows <= MAX_ROWS:
        return f"x has {rows} rows: expected 1 to {MAX_ROWS}"
    return why_no_units(w)


def default_config(x: jax.Array, w: Weight) -> Config:
    """Few rows of w: all warps of a CTA on one tile. Many: a warp for each tile, and no sums to exchange."""
    n, k = w.shape
    tiles, chunks = n // ROWS, k // units(w).chunk
    if tiles >= 1024:
        return Config(tiles=4, warpgroups=1)
    return Config(tiles=1, warpgroups=2 if chunks > 8 else 1)


def quantized_matmul(x: jax.Array, w: Weight, config: Config | None = None) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    config = config or default_config(x, w)
    rows = x.reshape(-1, x.shape[-1])
    y = _kernel(len(rows), *w.shape, units(w), config)(rows, *units(w).planes)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _kernel(m: int, n: int, k: int, unit: Units, config: Config) -> Any:
    row_tiles, chunks = n // ROWS, k // unit.chunk
    warps = 4 * config.warpgroups
    parts = warps // config.tiles  # of K
    rounds = -(-chunks // parts)
    column_tiles = -(-m // 8)
    columns = (0,) if m == 1 else (0, 1)
    always = chunks % parts == 0 and row_tiles % config.tiles == 0

    def place(i: Any, cta: Any, warpgroup: Any, turn: Any) -> tuple[Any, Any, Any]:
        """This warp's row tile, its chunk in this turn, and whether there is such a unit."""
        warp = i.iadd(i.shift_left(warpgroup, 2), i.warp())
        tile = i.iadd(i.imul(cta, i.u32(config.tiles)), i.irem(warp, i.u32(config.tiles)))
        part = i.idiv(warp, i.u32(config.tiles))
        chunk = i.iadd(i.imul(turn, i.u32(parts)), part)
        exists = i.both(i.less(tile, i.u32(row_tiles)), i.less(chunk, i.u32(chunks)))
        return tile, chunk, exists

    def load(i: Any, refs: Any, _: Any, scalars: Any) -> list[Any]:
        tile, chunk, exists = place(i, *scalars)
        index = i.iadd(i.imul(tile, i.u32(chunks)), chunk)
        return [unit.load(i, refs, index, None if always else exists)]

    def multiply(i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Any]:
        sums, registers = arrays
        _, chunk, _ = place(i, *scalars)
        chunk = i.imin(chunk, i.u32(chunks - 1))  # where there is no unit its weights are zeros, and x must be numbers
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)

        def x(tile: int, first: int, words: int) -> Any:
            row = i.imin(i.iadd(g, i.u32(8 * tile)), i.u32(m - 1))  # columns beyond m repeat the last
            word = i.iadd(i.imul(row, i.u32(k // 2)), i.imul(chunk, i.u32(unit.chunk // 2)))
            word = i.iadd(i.iadd(word, i.imul(t, i.u32(words))), i.u32(first // 2))
            return i.load(refs[0], word, words)

        by_tile = [sums[4 * tile : 4 * tile + 4] for tile in range(column_tiles)]
        return [sum(unit.multiply(i, registers, x, by_tile, columns), [])]

    def exchange(i: Any, refs: Any, arrays: Any, _: Any) -> list[Any]:
        """Writes this warp's sums to its piece ``[m, 16]`` of shared memory."""
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        for tile in range(column_tiles):
            for half in range(2):
                for column in columns:
                    row = i.iadd(i.iadd(i.shift_left(t, 1), i.u32(column)), i.u32(8 * tile))
                    word = i.iadd(i.imul(i.iadd(i.imul(i.warp(), i.u32(m)), row), i.u32(ROWS)), g)
                    value = arrays[0][4 * tile + 2 * half + column]
                    inside = i.less(row, i.u32(m))
                    i.store(refs[0], i.iadd(word, i.u32(8 * half)), [value], where=inside)
        return []

    def finish(i: Any, refs: Any, _: Any, scalars: Any) -> list[Any]:
        """Adds up the warps' sums, one output a lane at a time, and writes them."""
        sums_smem, y_gmem = refs
        [cta] = scalars
        outputs = m * config.tiles * ROWS
        thread = i.iadd(i.shift_left(i.warp(), 5), i.lane())
        for first in range(0, outputs, 128):
            output = i.iadd(thread, i.u32(first))
            row = i.irem(output, i.u32(ROWS))
            tile = i.irem(i.idiv(output, i.u32(ROWS)), i.u32(config.tiles))
            x_row = i.idiv(output, i.u32(ROWS * config.tiles))
            inside = i.less(output, i.u32(outputs))
            total = i.number(0.0)
            for part in range(parts):
                warp = i.iadd(tile, i.u32(part * config.tiles))
                word = i.iadd(i.imul(i.iadd(i.imul(warp, i.u32(m)), x_row), i.u32(ROWS)), row)
                [bits] = i.load(sums_smem, word, 1, where=inside)
                total = i.fadd(total, i.float_of_bits(bits))
            y_row = i.iadd(i.imul(i.iadd(i.imul(cta, i.u32(config.tiles)), tile), i.u32(ROWS)), row)
            inside = i.both(inside, i.less(y_row, i.u32(n)))
            i.store(y_gmem, i.iadd(i.imul(x_row, i.u32(n)), y_row), [total], where=inside)
        return []

    def body(x_gmem: Any, *refs: Any) -> None:
        *planes, y_gmem, sums_smem, exchanged = refs
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")

        def load_unit(turn: Any) -> jax.Array:
            out = [(unit.registers, jnp.uint32)]
            [registers] = lanes.run(load, out, refs=planes, scalars=(cta, warpgroup, turn))
            return registers

        def one_turn(turn: Any, carry: Any) -> Any:
            sums, registers = carry
            following = load_unit(jnp.minimum(turn + 1, rounds - 1))
            [sums] = lanes.run(
                multiply,
                [(4 * column_tiles, jnp.float32)],
                refs=[x_gmem],
                arrays=[sums, registers],
                scalars=(cta, warpgroup, turn),
            )
            return sums, following

        carry = (lanes.zeros(4 * column_tiles), load_unit(jnp.int32(0)))
        sums, _ = lax.fori_loop(0, rounds, one_turn, carry)
        lanes.run(exchange, refs=[sums_smem.at[warpgroup]], arrays=[sums])
        plgpu.barrier_arrive(exchanged)

        @jax.named_scope("finish")
        def write() -> None:
            plgpu.barrier_wait(exchanged)
            lanes.run(finish, refs=[sums_smem, y_gmem], scalars=[cta])

        lax.cond(warpgroup == 0, write, lambda: None)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
        grid=(-(-row_tiles // config.tiles),),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((config.warpgroups, 4, m, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=lanes.interpret_params(),
        kernel_name="quantized_matmul_decode",
    )
