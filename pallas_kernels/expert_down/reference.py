"""Defines ``expert_down``: every product in float32, then their weighted sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul import reference
from pallas_kernels.packed import Weight


def why_not(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> None:
    """Nothing to configure."""


def expert_down(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 ``[T, N]``: ``sum_j weights[t, j] * w[expert_ids[t, j]] @ h[t, j]``, ids in 0..E-1."""
    rows = h.reshape(-1, h.shape[-1])
    y = reference.expert_matmul(rows, w, expert_ids.reshape(-1))
    return jnp.sum(y.reshape(*weights.shape, w.shape[1]) * weights[..., None], axis=1)
