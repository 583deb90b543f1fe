"""``expert_down`` as XLA runs it: ``expert_matmul``, then the weighted sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul import xla
from pallas_kernels.packed import Weight


def why_not(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(
    h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array
) -> xla.Config:
    """That of ``expert_matmul``."""
    rows: Any = jax.ShapeDtypeStruct((expert_ids.size, h.shape[-1]), h.dtype)
    return xla.default_config(rows, w, expert_ids)


def expert_down(
    h: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    weights: jax.Array,
    config: xla.Config | None = None,
) -> jax.Array:
    """float32 ``[T, N]``: ``sum_j weights[t, j] * w[expert_ids[t, j]] @ h[t, j]``, ids in 0..E-1."""
    y = xla.expert_matmul(h.reshape(-1, h.shape[-1]), w, expert_ids.reshape(-1), config)
    return jnp.sum(y.reshape(*weights.shape, w.shape[1]) * weights[..., None], axis=1)
