"""``argmax_matmul`` by a hand-written Mosaic GPU kernel: the products never go to memory.

The kernel is that of `pallas_kernels.decode_matmul`. Whoever adds up sums keeps the largest of those it has and where
it is; XLA takes the largest of what is left, one candidate of 4 x `Config.tiles` products:

    sums of all row tiles of a CTA, four rows a lane ──▶ largest, its row ──▶ candidates [M, N / (4 tiles), 2]

Bytes moved: w once, x once per SM, and 8 bytes of candidates for 4 x tiles rows of w instead of 4 for each. No card has
run it: it serves who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_matmul import Config, Product, multiply
from pallas_kernels.fragments import units
from pallas_kernels.packed import ROWS, Weight
from pallas_kernels.quantized_matmul import mosaic_decode

_VECTOR = 4
why_not = mosaic_decode.why_not
default_config = mosaic_decode.default_config
mmas_per_fragment = mosaic_decode.mmas_per_fragment


def intermediate_bytes(x: jax.Array, w: Weight) -> int:
    """Of the candidates, written and read."""
    tiles = w.shape[0] // ROWS
    groups = -(-tiles // default_config(x, w).tiles)
    return 2 * 8 * math.prod(x.shape[:-1]) * groups * (ROWS // _VECTOR)


def argmax_matmul(x: jax.Array, w: Weight, config: Config | None = None) -> jax.Array:
    """int32 ``[...]``: where ``x @ w.T`` is largest."""
    rows = x.reshape(-1, x.shape[-1])
    n, k = w.shape
    config = config or default_config(x, w)
    unit = units(w)
    base = mosaic_decode.product(len(rows), n, k, unit)
    groups = -(-base.tiles // config.tiles)
    per_group = ROWS // _VECTOR

    def write(
        i: Any, _: Any, y: Any, tile: Any, row: Any, x_row: Any, inside: Any, totals: Any
    ) -> None:
        best, where = i.number(-jnp.inf), i.u32(n)
        for s, products in enumerate(totals):
            first = i.iadd(i.imul(i.iadd(tile, i.u32(s)), i.u32(ROWS)), row)
            for v, product in enumerate(products):
                at = i.iadd(first, i.u32(v))
                # Tiles beyond the last have sums of 0 that are no products.
                better = i.both(i.less_float(best, product), i.less(at, i.u32(n)))
                best = i.select(better, product, best)
                where = i.select(better, at, where)
        group = i.idiv(tile, i.u32(config.tiles))
        place = i.iadd(i.imul(group, i.u32(per_group)), i.idiv(row, i.u32(_VECTOR)))
        word = i.imul(i.iadd(i.imul(x_row, i.u32(groups * per_group)), place), i.u32(2))
        i.store(y, word, [i.bits_of_float(best), where], where=inside)

    product = Product(
        "argmax_matmul",
        len(rows),
        base.tiles,
        base.chunks,
        base.unit_at,
        base.x_at,
        write,
        shape=(len(rows), groups * per_group, 2),
        dtype=jnp.uint32,
        span=config.tiles,
        vector=_VECTOR,
    )
    candidates = multiply(rows, unit, product, config)
    values = lax.bitcast_convert_type(candidates[..., 0], jnp.float32)
    places = candidates[..., 1].astype(jnp.int32)
    best = jnp.max(values, axis=-1, keepdims=True)
    lowest = jnp.min(jnp.where(values == best, places, n), axis=-1)
    return lowest.reshape(x.shape[:-1])
