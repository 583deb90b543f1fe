"""``expert_gate_up`` as XLA runs it: ``expert_matmul`` of every token repeated for each expert, then the rest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul import xla
from pallas_kernels.packed import Weight


def why_not(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> xla.Config:
    """That of ``expert_matmul``."""
    rows: Any = jax.ShapeDtypeStruct((expert_ids.size, x.shape[-1]), x.dtype)
    return xla.default_config(rows, w, expert_ids)


def expert_gate_up(
    x: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    scale: jax.Array,
    config: xla.Config | None = None,
) -> jax.Array:
    """``[T, J, F]``: ``gelu(scale[t] * gate) * scale[t] * up``, ids in 0..E-1."""
    rows, scales = (jnp.repeat(v, expert_ids.shape[1], axis=0) for v in (x, scale))
    y = xla.expert_matmul(rows, w, expert_ids.reshape(-1), config) * scales[:, None]
    gate, up = jnp.split(y, 2, axis=-1)
    h = (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)
    return h.reshape(*expert_ids.shape, w.shape[1] // 2)
