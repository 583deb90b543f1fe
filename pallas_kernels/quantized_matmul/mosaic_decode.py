"""``quantized_matmul`` for 1 to 16 rows of x: a matrix-vector product on tensor cores, bound by reading the weights.

The kernel, its pipeline and what it moves are in `pallas_kernels.decode_matmul`; here is what it multiplies: all units
of w in their order, by the same rows of x. No card has run it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import decode_matmul, tuning
from pallas_kernels.decode_matmul import Product, multiply
from pallas_kernels.fragments import MAX_ROWS, Units, units, why_no_units
from pallas_kernels.packed import ROWS, Weight


class Config(decode_matmul.Config):
    """That of the kernel; a type of its own, because what is measured of this op holds for no other."""


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
    if (config := tuning.tuned(Config, x, w)) is not None:
        return config
    n, k = w.shape
    unit = units(w)
    return Config.fewest_turns(unit, n // ROWS, k // unit.chunk)


def configs(x: jax.Array, w: Weight) -> list[Config]:
    """What is worth measuring: tiles; fewer warps with more registers; and as many in CTAs of half the size."""
    del x, w
    spread = ((4, 132), (3, 132), (2, 264))
    tiles = (1, 2, 3, 4, 6, 8, 12, 16)
    return [
        Config(tiles=t, warpgroups=wgs, ctas=ctas)
        for wgs, ctas in spread
        for t in tiles
        if 4 * wgs % t == 0
    ]


def mmas_per_fragment(x: jax.Array, w: Weight) -> float:
    """As `decode_matmul.mmas_per_fragment`."""
    return decode_matmul.mmas_per_fragment(units(w), math.prod(x.shape[:-1]))


def quantized_matmul(x: jax.Array, w: Weight, config: Config | None = None) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    config = config or default_config(x, w)
    rows = x.reshape(-1, x.shape[-1])
    n, k = w.shape
    y = multiply(rows, units(w), product(len(rows), n, k, units(w)), config)
    return y.reshape(*x.shape[:-1], n)


def product(m: int, n: int, k: int, unit: Units) -> Product:
    """float32 y ``[m, n]`` of x ``[m, k]`` and all units of w ``[n, k]`` in their order."""
    chunks = k // unit.chunk

    def unit_at(i: Any, _: Any, tile: Any, chunk: Any) -> Any:
        return i.iadd(i.imul(tile, i.u32(chunks)), chunk)

    def x_at(i: Any, _tables: Any, _tile: Any, chunk: Any, row: Any) -> Any:
        # Where there is no unit its weights are zeros, and x must be numbers.
        chunk = i.imin(chunk, i.u32(chunks - 1))
        return i.iadd(i.imul(row, i.u32(k // 2)), i.imul(chunk, i.u32(unit.chunk // 2)))

    def write(
        i: Any, _: Any, y: Any, tile: Any, row: Any, x_row: Any, inside: Any, totals: Any
    ) -> None:
        y_row = i.iadd(i.imul(tile, i.u32(ROWS)), row)
        i.store(y, i.iadd(i.imul(x_row, i.u32(n)), y_row), totals[0], where=inside)

    return Product(
        "quantized_matmul_decode", m, n // ROWS, chunks, unit_at, x_at, write, shape=(m, n)
    )
