"""``quantized_matmul`` for thousands of rows of x: packed weights become a bfloat16 matrix, which XLA multiplies.

    w in global memory ──16-byte loads──▶ registers ──lane program──▶ bfloat16 fragment ──8 or 16-byte stores──▶ [N, K]

A warp dequantizes one *unit* (a row tile by a chunk), and is done. Values are those of ``w.dequantize(jnp.bfloat16)``,
bit for bit. Bytes moved: w once, 2 per weight written, and read again by the matmul; against what M rows cost, that is
little where M is in the thousands. Bound: memory. Runs on any GPU that Mosaic knows; no card has run it.
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
from pallas_kernels.fragments import Units, units, why_no_units
from pallas_kernels.fragments_dequantized import PART, dequantizer, pairs_of_lane
from pallas_kernels.packed import ROWS, PackedArray, Weight
from pallas_kernels.quantized_matmul import xla


@dataclasses.dataclass(frozen=True)
class Config:
    """``max_bytes``: of w as bfloat16 at a time; a larger one is multiplied block of rows by block of rows."""

    max_bytes: int = 2**29


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Wants bfloat16 x and packed or bfloat16 weights."""
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}: tensor cores take bfloat16"
    return why_no_units(w)


def default_config(x: jax.Array, w: Weight) -> Config:
    """The same for all shapes."""
    return Config()


def quantized_matmul(x: jax.Array, w: Weight, config: Config | None = None) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    if not isinstance(w, PackedArray):
        return xla.matmul_dense(x, w)
    config = config or default_config(x, w)
    n, k = w.shape
    block = max(1, config.max_bytes // (2 * k * ROWS)) * ROWS
    blocks: list[jax.Array] = []
    for first in range(0, n, block):
        # Not before x is there, nor before the block in front is done with: XLA would make all matrices at once.
        x, now, _ = lax.optimization_barrier((x, w, blocks[-1:]))
        blocks.append(xla.matmul_dense(x, dequantized(now, first, min(block, n - first))))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=-1)


def dequantized(w: PackedArray, first: int, count: int) -> jax.Array:
    """bfloat16 ``[count, K]``, the values of rows `first` to ``first + count - 1``; both are multiples of 16."""
    unit = units(w)
    return _kernel(first // ROWS, count // ROWS, w, unit)(*unit.planes)


def _kernel(first_tile: int, tiles: int, w: PackedArray, unit: Units) -> Any:
    k = w.shape[-1]
    chunks, parts, pairs = k // unit.chunk, unit.chunk // PART, pairs_of_lane(w)
    dequantize = dequantizer(w)
    fragments = pairs // 2  # of which a lane's columns lie side by side

    def program(i: Any, refs: Any, _: Any, scalars: Any) -> list[Any]:
        *planes, out_gmem = refs
        [cta] = scalars
        index = i.iadd(i.shift_left(cta, 2), i.warp())
        exists = i.less(index, i.u32(tiles * chunks))
        source = i.iadd(index, i.u32(first_tile * chunks))
        pieces = [piece(i, planes, source, exists) for _, piece in unit.pieces]
        tile, chunk = i.idiv(index, i.u32(chunks)), i.irem(index, i.u32(chunks))
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        row = i.iadd(i.imul(tile, i.u32(ROWS)), g)
        word = i.iadd(i.imul(row, i.u32(k // 2)), i.imul(chunk, i.u32(unit.chunk // 2)))
        word = i.iadd(word, i.imul(t, i.u32(pairs)))
        for part in range(parts):
            a = dequantize(i, pieces, part, lambda _: None)
            for group in range(4 // fragments):
                for half in range(2):
                    words = [
                        a[4 * (group * fragments + fragment) + 2 * pair + half]
                        for fragment in range(fragments)
                        for pair in range(2)
                    ]
                    beyond = part * PART // 2 + 8 * fragments * group + half * 8 * (k // 2)
                    i.store(out_gmem, i.iadd(word, i.u32(beyond)), words, where=exists)
        return []

    def body(*refs: Any) -> None:
        lanes.run(program, refs=refs, scalars=[lax.axis_index("cta")], stores=[len(refs) - 1])

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tiles * ROWS, k), jnp.bfloat16),
        grid=(math.ceil(tiles * chunks / 4),),
        grid_names=("cta",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=lanes.interpret_params(),
        kernel_name="dequantize",
    )
