"""Defines ``quantized_matmul``: dequantize to float32, multiply in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dense
from pallas_kernels.packed import Weight


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight) -> None:
    """Nothing to configure."""


def quantized_matmul(x: jax.Array, w: Weight) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T`` with every product and sum in float32."""
    return jnp.einsum(
        "...k,nk->...n",
        x.astype(jnp.float32),
        dense(w, jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
