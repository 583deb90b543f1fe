"""``gated_matmul`` by a hand-written Mosaic GPU kernel: packed or bfloat16 weights, up to 16 rows of bfloat16 x.

The kernel is that of `pallas_kernels.decode_matmul`. A CTA's row tiles come in pairs, 16 rows of gate and the same 16
of up, wherever these are in w, so that who adds up the sums has both:

    sums of gate tile ──▶ * scale ──▶ gelu ─┐
    sums of up tile ────▶ * scale ──────────┴▶ * ──▶ bfloat16 h, four rows a lane

Bytes moved: w once, x once per SM, and 2 bytes of h instead of 8 of gate and up. No card has run it: it serves who asks
for ``implementation="mosaic"``.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.decode_matmul import Config, Product, gelu, multiply
from pallas_kernels.fragments import units
from pallas_kernels.packed import ROWS, Weight
from pallas_kernels.quantized_matmul import mosaic_decode


def why_not(x: jax.Array, w: Weight, scale: jax.Array) -> str | None:
    """As ``quantized_matmul``'s decode kernel, and F a multiple of 16."""
    del scale
    if w.shape[0] % (2 * ROWS):
        return f"w has shape {w.shape}: expected [2 F, K] with F a multiple of {ROWS}"
    return mosaic_decode.why_not(x, w)


def default_config(x: jax.Array, w: Weight, scale: jax.Array) -> Config:
    """The number of tiles with the fewest turns; pairs of tiles stay together."""
    del x, scale
    n, k = w.shape
    unit = units(w)
    return Config.fewest_turns(unit, n // ROWS, k // unit.chunk, span=2)


def mmas_per_fragment(x: jax.Array, w: Weight, scale: jax.Array) -> float:
    """As ``quantized_matmul``."""
    del scale
    return mosaic_decode.mmas_per_fragment(x, w)


def gated_matmul(
    x: jax.Array, w: Weight, scale: jax.Array, config: Config | None = None
) -> jax.Array:
    """``[..., F]`` in the type of x: ``gelu(scale * gate) * scale * up``."""
    rows = x.reshape(-1, x.shape[-1])
    n, k = w.shape
    width, unit = n // 2, units(w)
    base = mosaic_decode.product(len(rows), n, k, unit)

    def unit_at(i: Any, tables: Any, tile: Any, chunk: Any) -> Any:
        """Even tiles of the product are gate's, odd ones up's."""
        half = i.imul(i.and_(tile, 1), i.u32(width // ROWS))
        return base.unit_at(i, tables, i.iadd(i.shift_right(tile, 1), half), chunk)

    def write(
        i: Any, tables: Any, h: Any, tile: Any, row: Any, x_row: Any, inside: Any, totals: Any
    ) -> None:
        [bits] = i.load(tables[0], x_row, 1, where=inside)
        factor = i.float_of_bits(bits)
        gate, up = ([i.fmul(factor, total) for total in half] for half in totals)
        out = [i.fmul(gelu(i, g), u) for g, u in zip(gate, up, strict=True)]
        words = [i.bf16x2_of_floats(*out[n : n + 2]) for n in range(0, len(out), 2)]
        h_row = i.iadd(i.imul(i.shift_right(tile, 1), i.u32(ROWS)), row)
        word = i.shift_right(i.iadd(i.imul(x_row, i.u32(width)), h_row), 1)
        i.store(h, word, words, where=inside)

    product = Product(
        "gated_matmul",
        len(rows),
        n // ROWS,
        base.chunks,
        unit_at,
        base.x_at,
        write,
        shape=(len(rows), width),
        dtype=x.dtype,
        tables=(scale.reshape(-1),),
        span=2,
        vector=4,
    )
    h = multiply(rows, unit, product, config or default_config(x, w, scale))
    return h.reshape(*x.shape[:-1], width)
