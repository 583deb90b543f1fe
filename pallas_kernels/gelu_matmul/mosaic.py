"""``gelu_matmul`` by a hand-written Mosaic GPU kernel: packed or bfloat16 weights, up to 16 rows of bfloat16 x.

The kernel is that of `pallas_kernels.decode_matmul`; four sums a lane become ``gelu(sum) * factor`` where they are
added up, with one 16-byte load of factors.

Bytes moved: w once, x once per SM, 4 bytes of factor and 2 of y an element instead of 14 where y goes to memory in
between. No card has run it: it serves who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from pallas_kernels.decode_matmul import Config, gelu, multiply
from pallas_kernels.fragments import units
from pallas_kernels.packed import ROWS, Weight
from pallas_kernels.quantized_matmul import mosaic_decode


def why_not(x: jax.Array, w: Weight, factor: jax.Array) -> str | None:
    """As ``quantized_matmul``'s decode kernel."""
    del factor
    return mosaic_decode.why_not(x, w)


def default_config(x: jax.Array, w: Weight, factor: jax.Array) -> Config:
    """The number of tiles with the fewest turns."""
    del x, factor
    n, k = w.shape
    unit = units(w)
    return Config.fewest_turns(unit, n // ROWS, k // unit.chunk)


def mmas_per_fragment(x: jax.Array, w: Weight, factor: jax.Array) -> float:
    """As ``quantized_matmul``."""
    del factor
    return mosaic_decode.mmas_per_fragment(x, w)


def gelu_matmul(
    x: jax.Array, w: Weight, factor: jax.Array, config: Config | None = None
) -> jax.Array:
    """``[..., N]`` in the type of x: ``gelu(x @ w.T) * factor``."""
    rows = x.reshape(-1, x.shape[-1])
    n, k = w.shape
    unit = units(w)

    def write(
        i: Any, tables: Any, y: Any, tile: Any, row: Any, x_row: Any, inside: Any, totals: Any
    ) -> None:
        first = i.iadd(i.imul(x_row, i.u32(n)), i.iadd(i.imul(tile, i.u32(ROWS)), row))
        factors = i.load(tables[0], first, len(totals[0]), where=inside)
        out = [
            i.fmul(gelu(i, total), i.float_of_bits(bits))
            for total, bits in zip(totals[0], factors, strict=True)
        ]
        words = [i.bf16x2_of_floats(*out[n : n + 2]) for n in range(0, len(out), 2)]
        i.store(y, i.shift_right(first, 1), words, where=inside)

    product = dataclasses.replace(
        mosaic_decode.product(len(rows), n, k, unit),
        name="gelu_matmul",
        write=write,
        dtype=x.dtype,
        tables=(factor.reshape(len(rows), n),),
        vector=4,
    )
    y = multiply(rows, unit, product, config or default_config(x, w, factor))
    return y.reshape(*x.shape[:-1], n)
