"""The kernel for more than 16 rows of x, on Hopper: weights become A fragments in registers, ``wgmma`` multiplies them.

    x in global memory ──TMA, `Config.stages` - 2 ahead──▶ x_smem [block_m, 64] ───────────────────────────────────┐
    w in global memory ──16-byte loads, one unit ahead──▶ registers ──lane program──▶ bfloat16 A fragments ──▶ wgmma
    float32 sums in registers ──▶ y

A CTA is two warpgroups; it computes [block_m rows of x, 128 rows of w] over K / `Config.splits`. A warpgroup has 64
rows of w, its four warps a row tile each. What a warp needs of w nobody else does: it loads its own *units* (a row tile
by a chunk, as packed) straight into registers, and makes of them the A operand of ``wgmma``, 64 columns a step. x is B,
swizzled in shared memory, where both warpgroups read it. One step's products are in flight while the next 64 columns
are dequantized, and those of the other warpgroup besides. The first warpgroup also starts the copies of x, into the
place of two steps ago, which the other has left by then as a rule. A third warpgroup for that would leave the two 168
registers each: ``setmaxnreg`` is ignored by the assembler where JAX calls it through nvJitLink (C7504), and sums would
be spilled.

Values: weights are rounded to bfloat16 once, exactly as ``w.dequantize(jnp.bfloat16)`` rounds them; sums are float32.

Shared memory: stages x block_m x 128 bytes, 192 KB at most by default. Registers: 246 to 253 of 255 a thread at block_m
= 256 (128 of them sums, 32 fragments, 24 to 40 a unit), one CTA an SM. Bytes moved: w once per block of x, after the
first from L2; x once per 128 rows of w. Bound: the tensor cores at block_m = 256, where a step takes them 1024 cycles
and a scheduler about 500 issue slots to dequantize; with few rows these slots, about 9 bytes of Q4K a cycle and SM.
No card has run it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes, target, wgmma
from pallas_kernels.fragments import units
from pallas_kernels.fragments_dequantized import PART, dequantizer, permuted
from pallas_kernels.packed import ROWS, Weight

WARPGROUPS = 2
BLOCK_N = 64 * WARPGROUPS
SMS = 132  # of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is spread over the GPU.

    block_m: rows of x that a CTA multiplies, a multiple of 8, at most 256.
    splits: CTAs that share K; each writes sums of its own, which are then added in order.
    stages: pieces ``[block_m, 64]`` of x in shared memory, three or more: one in use, one that is being left, one
    ahead.
    """

    block_m: int = 256
    splits: int = 1
    stages: int = 6

    def __post_init__(self) -> None:
        if self.block_m % 8 or not 0 < self.block_m <= 256 or self.splits < 1 or self.stages < 3:
            raise ValueError(
                f"{self}: block_m must be a multiple of 8 up to 256, splits at least 1, stages at least 3"
            )


@dataclasses.dataclass(frozen=True)
class Product:
    """What an op computes, to the kernel: which rows of x meet which matrix, and where the sums go.

    name: of the kernel.
    rows: of y.
    blocks: of rows of x.
    place: ``(tables, block)``: three int32, the first of a block's rows of x, the row behind its last, and which of the
        matrices of w they meet. Nothing is computed of a block without rows.
    y_row: lane program ``(i, tables, row, inside)``: the row of y that row `row` of x belongs to, where `inside`.
    tables: arrays for these.
    """

    name: str
    rows: int
    blocks: int
    place: Callable[[Any, Any], tuple[Any, Any, Any]]
    y_row: Callable[..., Any] = lambda i, tables, row, inside: row
    tables: tuple[jax.Array, ...] = ()


def why_not_here() -> str | None:
    """Why the GPU that kernels are traced for has no ``wgmma``, or None."""
    capability = target.compute_capability()
    if capability == target.HOPPER or lanes.is_interpreted():
        return None
    return (
        f"the GPU has compute capability {capability}: wgmma is Hopper's ({target.HOPPER}) only; where none is "
        "present, pallas_kernels.target.compiling_for names it"
    )


def in_fragment_order(x: jax.Array, w: Weight) -> jax.Array:
    """x ``[M, K]`` as `multiply` wants it, for `w`."""
    return permuted(x, w)


def multiply(x: jax.Array, w: Weight, product: Product, config: Config) -> jax.Array:
    """float32 ``[rows, N]``, of `product`.

    Args:
        x: bfloat16 ``[M, K]``, of `in_fragment_order`.
        w: ``[N, K]`` or ``[E, N, K]``, packed or bfloat16.
        product: which row meets which matrix.
        config: the blocks.
    """
    # TMA wants whole groups of eight rows, as the swizzle has them.
    rows = jnp.pad(x, [(0, -len(x) % 8), (0, 0)])
    y = _kernel(w, product, config)(rows, *units(w).planes, *product.tables)
    return y[0] if len(y) == 1 else jnp.sum(y, axis=0)


def _kernel(w: Weight, product: Product, config: Config) -> Any:
    unit, dequantize = units(w), dequantizer(w)
    m, (n, k) = product.rows, w.shape[-2:]
    row_tiles, chunks, parts = n // ROWS, k // unit.chunk, unit.chunk // PART
    m_blocks, n_blocks = product.blocks, -(-n // BLOCK_N)
    # K is cut into as many pieces as have a chunk to do.
    chunks_per_split = -(-chunks // config.splits)
    splits = -(-chunks // chunks_per_split)
    stages, tables_from = config.stages, len(unit.planes)

    def unit_at(i: Any, matrix: Any, first_tile: Any, chunk: Any, last: Any) -> tuple[Any, Any]:
        """The index of this warp's unit, and whether there is one."""
        tile = i.iadd(first_tile, i.warp())
        exists = i.both(i.less(tile, i.u32(row_tiles)), i.less(chunk, last))
        tile = i.iadd(i.imul(matrix, i.u32(row_tiles)), tile)
        return i.iadd(i.imul(tile, i.u32(chunks)), chunk), exists

    def load(i: Any, planes: Any, _: Any, scalars: Any) -> list[Any]:
        place = unit_at(i, *scalars)
        return [[r for _, piece in unit.pieces for r in piece(i, planes, *place)]]

    def fragments(part: int, i: Any, planes: Any, arrays: Any, scalars: Any) -> list[Any]:
        """The A operand of 64 columns, and the registers with what the next unit has put into those that are free."""
        matrix, first_tile, chunk, last = scalars
        place = unit_at(i, matrix, first_tile, i.iadd(chunk, i.u32(1)), last)
        pieces = unit.split(arrays[0])
        following = list(pieces)

        def done(piece: int) -> None:
            following[piece] = unit.pieces[piece][1](i, planes, *place)

        a = dequantize(i, pieces, part, done)
        return [a, [r for piece in following for r in piece]]

    def store(i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Any]:
        """Writes rows g and g + 8 of this warp's tile for all of the block's rows of x."""
        y_gmem, *tables = refs
        [sums], (first_tile, first_row, end_row, split) = arrays, scalars
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        tile = i.iadd(first_tile, i.warp())
        row = i.iadd(first_row, i.shift_left(t, 1))
        column = i.iadd(i.imul(tile, i.u32(ROWS)), g)
        tile_exists = i.less(tile, i.u32(row_tiles))
        for tile_of_8, pair in itertools.product(range(len(sums) // 4), range(2)):
            x_row = i.iadd(row, i.u32(8 * tile_of_8 + pair))
            inside = i.both(tile_exists, i.less(x_row, end_row))
            y_row = i.iadd(i.imul(split, i.u32(m)), product.y_row(i, tables, x_row, inside))
            first = i.iadd(i.imul(y_row, i.u32(n)), column)
            for half in range(2):
                value = sums[4 * tile_of_8 + 2 * half + pair]
                i.store(y_gmem, first, [value], offset=8 * half, where=inside)
        return []

    def body(x_gmem: Any, *refs: Any) -> None:
        *sources, y_gmem, x_smem, x_ready, x_consumed = refs
        planes, tables = sources[:tables_from], sources[tables_from:]
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        first_row, end_row, matrix = product.place(tables, lax.rem(cta, jnp.int32(m_blocks)))
        rest = lax.div(cta, jnp.int32(m_blocks))
        first_tile = lax.rem(rest, jnp.int32(n_blocks)) * (BLOCK_N // ROWS) + warpgroup * 4
        split = lax.div(rest, jnp.int32(n_blocks))
        first_chunk = split * chunks_per_split
        last_chunk = jnp.minimum(first_chunk + chunks_per_split, chunks)
        last_chunk = jnp.where(first_row < end_row, last_chunk, first_chunk)
        steps = (last_chunk - first_chunk) * parts

        def begin_copy(step: Any) -> None:
            slot = lax.rem(step, jnp.int32(stages))
            columns = pl.ds((first_chunk * parts + step) * PART, PART)
            # TMA fills rows beyond the last with zeros.
            block = x_gmem.at[pl.ds(first_row, config.block_m), columns]
            plgpu.copy_gmem_to_smem(block, x_smem.at[slot], x_ready.at[slot])

        @pl.when(warpgroup == 0)
        def _() -> None:
            for step in range(stages):

                @pl.when(step < steps)
                def _(step: int = step) -> None:
                    begin_copy(jnp.int32(step))

        def arrive(step: Any) -> None:
            plgpu.barrier_arrive(x_consumed.at[lax.rem(step, jnp.int32(stages))])

        def refill(step: Any) -> None:
            """Where the x of `step` was, which this warpgroup has done with, as has the other in a moment."""
            plgpu.barrier_wait(x_consumed.at[lax.rem(step, jnp.int32(stages))])
            begin_copy(step + stages)

        held = [(unit.registers, jnp.uint32)]
        scalars = [matrix, first_tile, first_chunk, last_chunk]
        [registers] = lanes.run(load, held, refs=planes, scalars=scalars)

        def multiply(acc: Any) -> jax.Array:
            def one_chunk(index: Any, registers: Any) -> Any:
                for part in range(parts):
                    a, registers = lanes.run(
                        functools.partial(fragments, part),
                        [(wgmma.REGISTERS, jnp.uint32), *held],
                        refs=planes,
                        arrays=[registers],
                        scalars=[matrix, first_tile, first_chunk + index, last_chunk],
                    )
                    step = index * parts + part
                    slot = lax.rem(step, jnp.int32(stages))
                    plgpu.barrier_wait(x_ready.at[slot])
                    wgmma.multiply(acc, a, x_smem.at[slot])
                    plgpu.wgmma_wait(1)
                    # All products but that of this step are done.
                    pl.when((warpgroup == 1) & (step >= 1))(functools.partial(arrive, step - 1))
                    refills = (step >= 2) & (step - 2 + stages < steps)
                    pl.when((warpgroup == 0) & refills)(functools.partial(refill, step - 2))
                return registers

            lax.fori_loop(0, last_chunk - first_chunk, one_chunk, registers)
            return wgmma.sums(acc)

        sums = wgmma.with_accumulator(multiply, config.block_m, WARPGROUPS)

        def write() -> None:
            place = [first_tile, first_row, end_row, split]
            lanes.run(store, refs=[y_gmem, *tables], arrays=[sums], scalars=place, stores=[0])

        lanes.in_turn(write, WARPGROUPS)

    swizzled: Any = (plgpu.TilingTransform((8, PART)), plgpu.SwizzleTransform(2 * PART))  # type: ignore[abstract]
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits, m, n), jnp.float32),
        grid=(m_blocks * n_blocks * splits,),
        grid_names=("cta",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((stages, config.block_m, PART), jnp.bfloat16, transforms=swizzled),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=lanes.interpret_params(),
        kernel_name=product.name,
    )
