"""``argmax_matmul`` as XLA runs it: ``quantized_matmul``, whose result goes to memory, then the largest element."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Weight
from pallas_kernels.quantized_matmul import xla

why_not = xla.why_not
default_config = xla.default_config


def argmax_matmul(x: jax.Array, w: Weight) -> jax.Array:
    """int32 ``[...]``: where ``x @ w.T`` is largest."""
    return jnp.argmax(xla.quantized_matmul(x, w), axis=-1).astype(jnp.int32)
