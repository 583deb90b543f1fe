"""``quantized_matmul`` for 1 to 16 rows of x: a matrix-vector product on tensor cores, bound by reading the weights.

    global memory ──16-byte loads, one unit ahead──▶ registers ──lop3──▶ A fragment ─┐
    x, in L1 after the first touch ───────16-byte loads──────────────▶ B fragment ─┴▶ mma.sync ─▶ float32 sums
    sums of the warps that share a row tile ──shared memory──▶ added in order ──▶ y

A *unit* is a row tile (16 rows of w) by a chunk (256 or 64 columns): 2.3 KB in Q4K. The grid is persistent: a CTA of
`Config.warpgroups` x 4 warps takes `Config.tiles` row tiles at a time, and its warps take turns in the chunks of a
tile, so K is split over warps / tiles of them. Each warp reads its own units, holds one in registers while the next,
also that of the next tile, is on its way, and meets the others once a tile. Sums are added in a fixed order: results
do not depend on timing.

Bytes moved: w once; x once per SM, from L2. Shared memory: 128 bytes per warp and row of x. Registers: what 16 warps an
SM leave, 128. Bound: the weights' bytes at the card's copy bandwidth. No card has run it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes, tuning
from pallas_kernels.fragments import MAX_ROWS, Units, units, why_no_units
from pallas_kernels.packed import ROWS, Weight


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is spread over the GPU.

    tiles: row tiles that a CTA works on at a time; divides its warps.
    warpgroups: a CTA has four times as many warps. With 4 the assembler keeps to 128 registers, so 16 warps fit an SM.
    ctas: of the grid, at most; one for each SM of an H100 or H200.
    """

    tiles: int = 1
    warpgroups: int = 4
    ctas: int = 132

    def __post_init__(self) -> None:
        if self.warpgroups > 8 or 4 * self.warpgroups % self.tiles:
            raise ValueError(
                f"tiles = {self.tiles}, warpgroups = {self.warpgroups}: expected at most 8 warpgroups, and tiles that "
                "divide their warps"
            )


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Wants bfloat16 x of at most 16 rows, and packed or bfloat16 weights."""
    rows = math.prod(x.shape[:-1])
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}: tensor cores take bfloat16"
    if not 0 < rows <= MAX_ROWS:
        return f"x has {rows} rows: expected 1 to {MAX_ROWS}"
    return why_no_units(w)


def default_config(x: jax.Array, w: Weight) -> Config:
    """What was measured to be best on this GPU, else the tiles that let the busiest warp have the fewest units."""
    if lanes.is_interpreted():
        # There a warpgroup is a thread, and with fewer cores than warpgroups they wait for each other forever.
        return Config(warpgroups=1, ctas=2)
    if (config := tuning.tuned(Config, x, w)) is not None:
        return config
    n, k = w.shape
    row_tiles, chunks = n // ROWS, k // units(w).chunk

    def most_units(config: Config) -> int:
        groups = -(-row_tiles // config.tiles)
        rounds = -(-chunks // (4 * config.warpgroups // config.tiles))
        return -(-groups // config.ctas) * rounds

    return min((Config(tiles=tiles) for tiles in (1, 2, 4, 8, 16)), key=most_units)


def configs(x: jax.Array, w: Weight) -> list[Config]:
    """What is worth measuring: tiles, and the same warps in CTAs of half the size."""
    del x, w
    spread = ((4, 132), (2, 264))
    tiles = (1, 2, 4, 8, 16)
    return [Config(t, wgs, ctas) for wgs, ctas in spread for t in tiles if 4 * wgs % t == 0]


def mmas_per_fragment(x: jax.Array, w: Weight) -> int:
    """Tensor-core instructions for each 16 x 16 weights: one a tile of columns, and as many of a constant operand."""
    column_tiles = -(-math.prod(x.shape[:-1]) // 8)
    return column_tiles * (2 if units(w).constants else 1)


def quantized_matmul(x: jax.Array, w: Weight, config: Config | None = None) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    config = config or default_config(x, w)
    rows = x.reshape(-1, x.shape[-1])
    n, k = w.shape
    y = _kernel(len(rows), n, k, units(w), config)(rows, *units(w).planes)
    return y.reshape(*x.shape[:-1], n)


def _flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def _kernel(m: int, n: int, k: int, unit: Units, config: Config) -> Any:
    row_tiles, chunks = n // ROWS, k // unit.chunk
    warps = 4 * config.warpgroups
    parts = warps // config.tiles  # of K
    rounds = -(-chunks // parts)
    column_tiles = -(-m // 8)
    columns = (0,) if m == 1 else (0, 1)
    groups = -(-row_tiles // config.tiles)
    ctas = min(config.ctas, groups)

    def place(i: Any, group: Any, warpgroup: Any, turn: Any) -> tuple[Any, Any, Any]:
        """This warp's row tile in a group, its chunk in a turn, and whether there is such a unit."""
        warp = i.iadd(i.shift_left(warpgroup, 2), i.warp())
        tile = i.iadd(i.imul(group, i.u32(config.tiles)), i.irem(warp, i.u32(config.tiles)))
        part = i.idiv(warp, i.u32(config.tiles))
        chunk = i.iadd(i.imul(turn, i.u32(parts)), part)
        exists = i.both(i.less(tile, i.u32(row_tiles)), i.less(chunk, i.u32(chunks)))
        return tile, chunk, exists

    def load(i: Any, refs: Any, _: Any, scalars: Any) -> list[Any]:
        tile, chunk, exists = place(i, *scalars)
        index = i.iadd(i.imul(tile, i.u32(chunks)), chunk)
        return [_flat(piece(i, refs, index, exists) for _, piece in unit.pieces)]

    def multiply(i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Any]:
        x_gmem, *planes = refs
        sums, registers, *constants = arrays
        group, warpgroup, turn, next_group, next_turn = scalars
        _, chunk, _ = place(i, group, warpgroup, turn)
        chunk = i.imin(
            chunk, i.u32(chunks - 1)
        )  # where there is no unit its weights are zeros, and x must be numbers
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)

        def x(tile: int, first: int, words: int) -> Any:
            row = i.imin(
                i.iadd(g, i.u32(8 * tile)), i.u32(m - 1)
            )  # columns beyond m repeat the last
            word = i.iadd(i.imul(row, i.u32(k // 2)), i.imul(chunk, i.u32(unit.chunk // 2)))
            return i.load(x_gmem, i.iadd(word, i.imul(t, i.u32(words))), words, offset=first // 2)

        tile, chunk_after, exists = place(i, next_group, warpgroup, next_turn)
        index = i.iadd(i.imul(tile, i.u32(chunks)), chunk_after)
        following: list[Any] = [None] * len(unit.pieces)

        def done(piece: int) -> None:
            following[piece] = unit.pieces[piece][1](i, planes, index, exists)

        by_tile = [sums[4 * tile : 4 * tile + 4] for tile in range(column_tiles)]
        pieces = unit.split(registers)
        by_tile = unit.multiply(i, pieces, done, constants, x, by_tile, columns)
        return [_flat(by_tile), _flat(following)]

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
        [group] = scalars
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
            y_row = i.iadd(
                i.imul(i.iadd(i.imul(group, i.u32(config.tiles)), tile), i.u32(ROWS)), row
            )
            inside = i.both(inside, i.less(y_row, i.u32(n)))
            i.store(y_gmem, i.iadd(i.imul(x_row, i.u32(n)), y_row), [total], where=inside)
        return []

    def body(x_gmem: Any, *refs: Any) -> None:
        *planes, y_gmem, sums_smem, exchanged = refs
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        constants = [lanes.opaque(bits) for bits in unit.constants]

        def one_group(index: Any, registers: Any) -> Any:
            group = cta + index * ctas

            def one_turn(turn: Any, carry: Any) -> Any:
                is_last = turn == rounds - 1
                after = (jnp.where(is_last, group + ctas, group), jnp.where(is_last, 0, turn + 1))
                return lanes.run(
                    multiply,
                    [(4 * column_tiles, jnp.float32), (unit.registers, jnp.uint32)],
                    refs=[x_gmem, *planes],
                    arrays=[*carry, *constants],
                    scalars=[group, warpgroup, turn, *after],
                )

            carry = [lanes.zeros(4 * column_tiles), registers]
            sums, following = lax.fori_loop(0, rounds, one_turn, carry)

            # Two buffers: whoever writes this one again has passed the next group's barrier, and so have its readers.
            buffer = sums_smem.at[lax.rem(index, jnp.int32(2))]
            lanes.run(exchange, refs=[buffer.at[warpgroup]], arrays=[sums])
            plgpu.barrier_arrive(exchanged)
            plgpu.barrier_wait(exchanged)
            is_writer = warpgroup == lax.rem(index, jnp.int32(config.warpgroups))

            @pl.when(is_writer)
            def _() -> None:
                lanes.run(finish, refs=[buffer, y_gmem], scalars=[group])

            return following

        mine = lax.div(groups - cta + ctas - 1, jnp.int32(ctas))
        out = [(unit.registers, jnp.uint32)]
        [registers] = lanes.run(load, out, refs=planes, scalars=[cta, warpgroup, jnp.int32(0)])
        lax.fori_loop(0, mine, one_group, registers)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.float32),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((2, config.warpgroups, 4, m, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=lanes.interpret_params(),
        kernel_name="quantized_matmul_decode",
    )
