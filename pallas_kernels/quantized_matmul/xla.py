"""``quantized_matmul`` as XLA runs it well.

Up to eight rows: word-wise multiply-and-reduce without a dot, which fuses into kernels that read each word of the
weights once and write nothing but the result. More rows: dequantize, then one dot.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import Q6K, QuantizedArray
from pallas_kernels.dispatch import dense, unpacked
from pallas_kernels.packed import Weight
from pallas_kernels.wordwise import weighted_sums


@dataclasses.dataclass(frozen=True)
class Config:
    """``max_wordwise_rows``: most rows of x that are multiplied word by word, without a dot."""

    max_wordwise_rows: int = 8


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight) -> Config:
    """The same for all shapes."""
    return Config()


def quantized_matmul(x: jax.Array, w: Weight, config: Config | None = None) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    config = config or default_config(x, w)
    w = unpacked(w)
    rows = math.prod(x.shape[:-1])
    narrower = isinstance(w, QuantizedArray) or w.dtype.itemsize < x.dtype.itemsize
    if narrower and 0 < rows <= config.max_wordwise_rows:
        flat = x.reshape(rows, -1)
        if isinstance(w, Q6K) and rows > 1:
            # XLA finds its codes too dear to unpack in the sums and would write a float32 per word and row instead.
            # The barrier keeps the unpacking inside the loop.
            sums = jax.lax.map(
                lambda row: weighted_sums(*jax.lax.optimization_barrier((row, w)))[0],
                flat[:, None],
            )
        else:
            sums = weighted_sums(flat, w)
        return sums.reshape(*x.shape[:-1], -1)
    return matmul_dense(x, w)


def matmul_dense(x: jax.Array, w: Weight) -> jax.Array:
    """float32 ``x [..., K] @ w [N, K].T`` as one dot, in x's type or, for plain w, the wider of the two."""
    quantized = isinstance(w, QuantizedArray)
    dtype = x.dtype if quantized else jnp.promote_types(x.dtype, w.dtype)
    if quantized:
        # Not before x is there: XLA would otherwise dequantize the matrices of all layers ahead of their use.
        x, w = jax.lax.optimization_barrier((x, w))
    return jax.lax.dot_general(
        x.astype(dtype),
        dense(w, dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
