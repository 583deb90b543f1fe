"""Defines ``expert_matmul``: every row times every expert in float32, then the row's own result."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dense
from pallas_kernels.packed import Weight


def why_not(x: jax.Array, w: Weight, expert_ids: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array) -> None:
    """Nothing to configure."""


def expert_matmul(x: jax.Array, w: Weight, expert_ids: jax.Array) -> jax.Array:
    """float32 ``[M, N]``: row m is ``w[expert_ids[m]] @ x[m]``, ids in 0..E-1."""
    every = jnp.einsum(
        "mk,enk->emn",
        x.astype(jnp.float32),
        dense(w, jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return every[expert_ids, jnp.arange(x.shape[0])]
