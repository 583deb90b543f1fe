"""``expert_gate_up`` as XLA runs it: ``expert_matmul`` of every token repeated for each expert, then the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul import xla
from pallas_kernels.packed import Weight


def why_not(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> xla.Config:
    """That of ``expert_matmul``."""
    return xla.default_config(*_repeated(x, w, expert_ids))


def expert_gate_up(
    x: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    scale: jax.Array,
    config: xla.Config | None = None,
) -> jax.Array:
    """``[T, J, F]``: ``gelu(scale[t] * gate) * scale[t] * up``, ids in 0..E-1."""
    y = xla.expert_matmul(*_repeated(x, w, expert_ids), config)
    gate, up = jnp.split(y * jnp.repeat(scale, expert_ids.shape[1])[:, None], 2, axis=-1)
    h = (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)
    return h.reshape(*expert_ids.shape, w.shape[1] // 2)


def _repeated(
    x: jax.Array, w: Weight, expert_ids: jax.Array
) -> tuple[jax.Array, Weight, jax.Array]:
    return jnp.repeat(x, expert_ids.shape[1], axis=0), w, expert_ids.reshape(-1)
