"""``residual_norm`` as it is defined, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.residual_norm import Pending


def why_not(stream: Pending, norms: tuple[jax.Array | None, ...], dtype: Any) -> str | None:
    """Serves every call."""
    del stream, norms, dtype
    return None


def default_config(stream: Pending, norms: tuple[jax.Array | None, ...], dtype: Any) -> None:
    """Has none."""
    del stream, norms, dtype


def residual_norm(
    stream: Pending, norms: tuple[jax.Array | None, ...], *, dtype: Any, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `pallas_kernels.residual_norm.residual_norm`."""

    def norm(v: jax.Array, weight: jax.Array) -> jax.Array:
        v = v * jax.lax.rsqrt(jnp.mean(v * v, axis=-1, keepdims=True) + eps)
        return v * weight.astype(jnp.float32)

    h = stream.h
    if stream.branches:
        z = sum((norm(y, weight) for y, weight in stream.branches), jnp.zeros_like(h))
        h = h + (z if stream.outer is None else norm(z, stream.outer))
    if stream.scalar is not None:
        h = h * stream.scalar
    return h, tuple((h if w is None else norm(h, w)).astype(dtype) for w in norms)
