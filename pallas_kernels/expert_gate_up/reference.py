"""Defines ``expert_gate_up``: the products in float32, the gated GELU of them, rounded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul import reference
from pallas_kernels.packed import Weight


def why_not(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> None:
    """Nothing to configure."""


def expert_gate_up(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> jax.Array:
    """``[T, J, F]``: ``gelu(scale[t] * gate) * scale[t] * up``, ids in 0..E-1."""
    per_token = expert_ids.shape[1]
    y = reference.expert_matmul(jnp.repeat(x, per_token, axis=0), w, expert_ids.reshape(-1))
    gate, up = jnp.split(
        y.reshape(*expert_ids.shape, w.shape[1]) * scale[:, None, None], 2, axis=-1
    )
    return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)
