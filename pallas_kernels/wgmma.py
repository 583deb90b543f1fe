"""``wgmma`` from lane programs: the registers of 128 lanes as its A operand, and its sums back as registers.

``wgmma.m64nNk16`` takes A, 64 x 16, from the registers of a warpgroup: each of its four warps holds 16 rows, in the
order of ``mma.m16n8k16`` (`pallas_kernels.lanes` draws it). Its sums, 64 x N, lie in the order of that instruction's C.

On a CPU the accumulator is shared memory and the product a dot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import lanes
from pallas_kernels.lanes import LANES, WARPS

ROWS = 16 * WARPS
COLUMNS = 64  # of A at a time: as many bfloat16 as a 128-byte swizzle spans
REGISTERS = ROWS * COLUMNS // (2 * WARPS * LANES)  # that A takes in a lane


def with_accumulator(body: Callable[[Any], Any], n: int, warpgroups: int) -> Any:
    """``body(acc)``, acc holding sums float32 ``[64, n]``, zero at first, of each warpgroup of axis "warpgroup"."""
    if not lanes.is_interpreted():
        return pl.run_scoped(body, plgpu.ACC((ROWS, n)))

    def with_memory(smem: Any) -> Any:
        acc = smem.at[lax.axis_index("warpgroup")]
        acc[...] = jnp.zeros((ROWS, n), jnp.float32)
        return body(acc)

    smem = plgpu.SMEM((warpgroups, ROWS, n), jnp.float32)
    return pl.run_scoped(with_memory, smem, collective_axes="warpgroup")


def multiply(acc: Any, a: jax.Array, b_smem: Any) -> None:
    """Begins ``acc += A @ b.T``.

    Args:
        acc: of `with_accumulator`.
        a: uint32 ``[4, 32, 16]``, A ``[64, 64]`` as bfloat16 pairs: a0 to a3 of four times 16 columns.
        b_smem: bfloat16 ``[n, 64]`` in shared memory, with a 128-byte swizzle.
    """
    if lanes.is_interpreted():
        product = _matrix(a) @ b_smem[...].T.astype(jnp.float32)
        acc[...] = acc[...] + product
    else:
        plgpu.wgmma(acc, _operand(a), plgpu.transpose_ref(b_smem, (1, 0)))


def sums(acc: Any) -> jax.Array:
    """The sums ``[64, n]`` of all that was begun: float32 ``[4, 32, n/2]``, c0 to c3 of every 8 columns."""
    value = acc[...]
    return _registers(value) if lanes.is_interpreted() else _lanes_of(value)


def product(
    pairs: Sequence[tuple[Any, Any]], n: int, begun: Callable[[], None] = lambda: None
) -> jax.Array:
    """The sum of ``a @ b.T`` over `pairs`: float32 ``[4, 32, n/2]``, as `sums` has them.

    Args:
        pairs: bfloat16 a ``[64, k]`` and b ``[n, k]``, both in shared memory, with a 128-byte swizzle.
        n: rows of each b.
        begun: is called while the tensor cores are at it.
    """
    if lanes.is_interpreted():
        parts = [a[...].astype(jnp.float32) @ b[...].astype(jnp.float32).T for a, b in pairs]
        begun()
        return _registers(functools.reduce(jnp.add, parts))

    def multiply_all(acc: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)))
        begun()
        return sums(acc)

    return pl.run_scoped(multiply_all, plgpu.ACC((ROWS, n)))


def add_product(values: jax.Array, a: jax.Array, b_smem: Any) -> jax.Array:
    """``values + A @ b``, with values in registers as `sums` has them.

    Args:
        values: float32 ``[4, 32, n/2]``.
        a: uint32 ``[4, 32, k/4]``, A ``[64, k]`` as bfloat16 pairs: a0 to a3 of every 16 columns.
        b_smem: bfloat16 ``[k, n]`` in shared memory, swizzled over min(k, 64) columns.
    """
    if lanes.is_interpreted():
        n = 2 * values.shape[-1]
        by_lane = values.reshape(WARPS, 8, 4, n // 8, 2, 2)  # warp, g, t, tile, half row, pair
        before = by_lane.transpose(0, 4, 1, 3, 2, 5).reshape(ROWS, n)
        return _registers(before + _matrix(a) @ b_smem[...].astype(jnp.float32))
    n = 2 * values.shape[-1]
    matrix = plgpu.ShapeDtypeStruct((ROWS, n), jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(lanes.layout(values.shape[-1]),), return_type=matrix)
    def laid_out(_: Any, values: Any) -> Any:
        registers = lanes.unpack(values.registers.item())
        pairs = [lanes.pack(registers[i : i + 2]) for i in range(0, len(registers), 2)]
        shape = fa.WGMMA_LAYOUT.registers_shape((ROWS, n))
        return fa.FragmentedArray(
            _registers=np.array(pairs, dtype=object).reshape(shape),
            _layout=fa.WGMMA_LAYOUT,
            _is_signed=None,
        )

    def multiply_into(acc: Any) -> None:
        plgpu.wgmma(acc, _operand(a), b_smem)

    return _lanes_of(pl.run_state(multiply_into)(plgpu.ACC.init(laid_out(values))))


def _lanes_of(value: jax.Array) -> jax.Array:
    """A float32 matrix ``[64, n]`` of the layout of sums as registers of lanes."""
    n = value.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,), return_type=lanes.array_type(n // 2, jnp.float32)
    )
    def inlined(_: Any, value: Any) -> Any:
        return lanes.array_of([r for pair in value.registers.flat for r in lanes.unpack(pair)])

    return inlined(value)


def _registers(value: jax.Array) -> jax.Array:
    """`_lanes_of` on a CPU."""
    n = value.shape[1]
    by_lane = value.reshape(WARPS, 2, 8, n // 8, 4, 2)  # warp, half row, g, tile, t, pair
    return by_lane.transpose(0, 2, 4, 3, 1, 5).reshape(WARPS, LANES, n // 2)


def _matrix(a: jax.Array) -> jax.Array:
    """float32 ``[64, k]``, A from its registers."""
    halves = jnp.stack([a << 16, a & jnp.uint32(0xFFFF0000)], axis=-1)
    values = lax.bitcast_convert_type(halves, jnp.float32)
    # Warp, g, t, 16 columns, 8 columns, half row, pair.
    values = values.reshape(WARPS, 8, 4, a.shape[-1] // 4, 2, 2, 2)
    return values.transpose(0, 5, 1, 3, 4, 2, 6).reshape(ROWS, 4 * a.shape[-1])


def _operand(a: jax.Array) -> jax.Array:
    """bfloat16 ``[64, k]`` in the layout that `plgpu.wgmma` wants of A."""
    of_a = (ROWS, 4 * a.shape[-1])
    matrix = plgpu.ShapeDtypeStruct(of_a, jnp.dtype(jnp.bfloat16), layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(lanes.layout(a.shape[-1]),), return_type=matrix)
    def inlined(_: Any, a: Any) -> Any:
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        words = [mgpu_utils.bitcast(word, pair) for word in lanes.unpack(a.registers.item())]
        shape = fa.WGMMA_LAYOUT.registers_shape(of_a)
        return fa.FragmentedArray(
            _registers=np.array(words, dtype=object).reshape(shape),
            _layout=fa.WGMMA_LAYOUT,
            _is_signed=None,
        )

    return inlined(a)
