"""``quantized_matmul`` for more than 16 rows of x, on Hopper: dequantized in registers, multiplied by ``wgmma``.

    x in global memory ──TMA, `Config.stages` - 2 ahead──▶ x_smem [block_m, 64] ───────────────────────────────────┐
    w in global memory ──16-byte loads, one unit ahead──▶ registers ──lane program──▶ bfloat16 A fragments ──▶ wgmma
    float32 sums in registers ──▶ y

A CTA is two warpgroups; it computes y[block_m rows of x, 128 rows of w] over K / `Config.splits`. A warpgroup has 64
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
and a scheduler 300 to 400 issue slots to dequantize; with few rows these slots, about 11 bytes of Q4K a cycle and SM.
No card has run it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes, target, wgmma
from pallas_kernels.fragments import MAX_ROWS, Units, units
from pallas_kernels.fragments_dequantized import PART, Dequantize, dequantizer, permuted
from pallas_kernels.packed import ROWS, PackedArray, Weight

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


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Wants a Hopper GPU, bfloat16 x of more than 16 rows, and packed weights."""
    capability = target.compute_capability()
    if capability != target.HOPPER and not lanes.is_interpreted():
        return (
            f"the GPU has compute capability {capability}: wgmma is Hopper's ({target.HOPPER}) only; where none is "
            "present, pallas_kernels.target.compiling_for names it"
        )
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}: tensor cores take bfloat16"
    rows = math.prod(x.shape[:-1])
    if rows <= MAX_ROWS:
        return f"x has {rows} rows: expected more than {MAX_ROWS}"
    if not isinstance(w, PackedArray):
        return f"w is {type(w).__name__}: only packed arrays are dequantized here"
    return None


def default_config(x: jax.Array, w: PackedArray) -> Config:
    """The blocks and splits that keep the busiest SM busy for the shortest time, by a model that no card has tuned.

    A step of 64 columns takes the tensor cores 4 block_m cycles, but never less than a scheduler's two warps need to
    dequantize, about 400; what a CTA does once costs about as much as four steps.
    """
    m, (n, k) = math.prod(x.shape[:-1]), w.shape
    chunks, parts = k // w.chunk, w.chunk // PART

    def cycles(config: Config) -> int:
        ctas = -(-m // config.block_m) * -(-n // BLOCK_N) * config.splits
        steps = -(-chunks // config.splits) * parts + 4
        return -(-ctas // SMS) * steps * max(4 * config.block_m, 400)

    blocks = [b for b in (32, 64, 96, 128, 192, 256) if b < m + 32]
    splits = [s for s in (1, 2, 4, 8) if s <= chunks]
    return min((Config(b, s) for s in splits for b in reversed(blocks)), key=cycles)


def quantized_matmul(x: jax.Array, w: PackedArray, config: Config | None = None) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    config = config or default_config(x, w)
    m, (n, k) = math.prod(x.shape[:-1]), w.shape
    # TMA wants whole groups of eight rows, as the swizzle has them.
    rows = jnp.pad(permuted(x.reshape(m, k), w), [(0, -m % 8), (0, 0)])
    unit = units(w)
    # K is cut into as many pieces as have a chunk to do.
    chunks_per_split = -(-(k // w.chunk) // config.splits)
    kernel = _kernel(m, n, k, unit, dequantizer(w), chunks_per_split, config)
    y = kernel(rows, *unit.planes)
    return (y[0] if len(y) == 1 else jnp.sum(y, axis=0)).reshape(*x.shape[:-1], n)


def _kernel(
    m: int,
    n: int,
    k: int,
    unit: Units,
    dequantize: Dequantize,
    chunks_per_split: int,
    config: Config,
) -> Any:
    row_tiles, chunks, parts = n // ROWS, k // unit.chunk, unit.chunk // PART
    m_blocks, n_blocks = -(-m // config.block_m), -(-n // BLOCK_N)
    splits = -(-chunks // chunks_per_split)
    stages = config.stages

    def unit_at(i: Any, tile: Any, chunk: Any, last: Any) -> tuple[Any, Any]:
        """A unit's index, and whether there is one."""
        exists = i.both(i.less(tile, i.u32(row_tiles)), i.less(chunk, last))
        return i.iadd(i.imul(tile, i.u32(chunks)), chunk), exists

    def load(i: Any, planes: Any, _: Any, scalars: Any) -> list[Any]:
        first_tile, chunk, last = scalars
        place = unit_at(i, i.iadd(first_tile, i.warp()), chunk, last)
        return [[r for _, piece in unit.pieces for r in piece(i, planes, *place)]]

    def fragments(part: int, i: Any, planes: Any, arrays: Any, scalars: Any) -> list[Any]:
        """The A operand of 64 columns, and the registers with what the next unit has put into those that are free."""
        first_tile, chunk, last = scalars
        place = unit_at(i, i.iadd(first_tile, i.warp()), i.iadd(chunk, i.u32(1)), last)
        pieces = unit.split(arrays[0])
        following = list(pieces)

        def done(piece: int) -> None:
            following[piece] = unit.pieces[piece][1](i, planes, *place)

        a = dequantize(i, pieces, part, done)
        return [a, [r for piece in following for r in piece]]

    def store(i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Any]:
        """Writes rows g and g + 8 of this warp's tile for all of the block's rows of x."""
        [sums], (first_tile, first_row, split) = arrays, scalars
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        tile = i.iadd(first_tile, i.warp())
        row = i.iadd(first_row, i.shift_left(t, 1))
        column = i.iadd(i.imul(tile, i.u32(ROWS)), g)
        first = i.iadd(i.imul(i.iadd(i.imul(split, i.u32(m)), row), i.u32(n)), column)
        tile_exists = i.less(tile, i.u32(row_tiles))
        for index, value in enumerate(sums):
            tile_of_8, half, pair = index // 4, index // 2 % 2, index % 2
            down = 8 * tile_of_8 + pair
            inside = i.both(tile_exists, i.less(i.iadd(row, i.u32(down)), i.u32(m)))
            i.store(refs[0], i.iadd(first, i.u32(down * n + 8 * half)), [value], where=inside)
        return []

    def body(x_gmem: Any, *refs: Any) -> None:
        *planes, y_gmem, x_smem, x_ready, x_consumed = refs
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        first_row = lax.rem(cta, jnp.int32(m_blocks)) * config.block_m
        rest = lax.div(cta, jnp.int32(m_blocks))
        first_tile = lax.rem(rest, jnp.int32(n_blocks)) * (BLOCK_N // ROWS) + warpgroup * 4
        split = lax.div(rest, jnp.int32(n_blocks))
        first_chunk = split * chunks_per_split
        last_chunk = jnp.minimum(first_chunk + chunks_per_split, chunks)
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
        scalars = [first_tile, first_chunk, last_chunk]
        [registers] = lanes.run(load, held, refs=planes, scalars=scalars)

        def multiply(acc: Any) -> jax.Array:
            def one_chunk(index: Any, registers: Any) -> Any:
                for part in range(parts):
                    a, registers = lanes.run(
                        functools.partial(fragments, part),
                        [(wgmma.REGISTERS, jnp.uint32), *held],
                        refs=planes,
                        arrays=[registers],
                        scalars=[first_tile, first_chunk + index, last_chunk],
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
            place = [first_tile, first_row, split]
            lanes.run(store, refs=[y_gmem], arrays=[sums], scalars=place, stores=[0])

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
        kernel_name="quantized_matmul_prefill",
    )
