"""``gated_matmul`` as XLA runs it: ``quantized_matmul``, then GELU in the fusion that follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.packed import Weight
from pallas_kernels.quantized_matmul import xla


def why_not(x: jax.Array, w: Weight, scale: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight, scale: jax.Array) -> xla.Config:
    """That of ``quantized_matmul``."""
    return xla.default_config(x, w)


def gated_matmul(
    x: jax.Array, w: Weight, scale: jax.Array, config: xla.Config | None = None
) -> jax.Array:
    """``[..., F]`` in the type of x: ``gelu(scale * gate) * scale * up``."""
    return gated_gelu(xla.quantized_matmul(x, w, config) * scale).astype(x.dtype)


def gated_gelu(gate_up: jax.Array) -> jax.Array:
    """``gelu(gate) * up`` of a last axis that holds gate then up; the tanh form of GELU."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.gelu(gate, approximate=True) * up
