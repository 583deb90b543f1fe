"""``quantized_matmul`` for more than 16 rows of x, on Hopper: dequantized in registers, multiplied by ``wgmma``.

The kernel, its pipeline and what it moves are in `pallas_kernels.prefill_matmul`; here is how x and K are cut. No card
has run it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fragments import MAX_ROWS
from pallas_kernels.fragments_dequantized import PART
from pallas_kernels.packed import PackedArray, Weight
from pallas_kernels.prefill_matmul import (
    BLOCK_N,
    SMS,
    Config,
    Product,
    in_fragment_order,
    multiply,
    why_not_here,
)


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Wants a Hopper GPU, bfloat16 x of more than 16 rows, and packed weights."""
    if reason := why_not_here():
        return reason
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

    def place(_: Any, block: Any) -> tuple[Any, Any, Any]:
        return block * config.block_m, jnp.int32(m), jnp.int32(0)

    product = Product("quantized_matmul_prefill", m, -(-m // config.block_m), place)
    y = multiply(in_fragment_order(x.reshape(m, k), w), w, product, config)
    return y.reshape(*x.shape[:-1], n)
