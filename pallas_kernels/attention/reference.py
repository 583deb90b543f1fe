"""Attention by its definition, in float32: what every other implementation is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    *,
    window: int | None,
    pages: jax.Array | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.attention`."""
    if pages is not None:
        k, v = gathered(k, pages), gathered(v, pages)
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("BTHC,BSHC->BHTS", q, k, precision="highest")
    seen = visible(q_positions, kv_positions, window)[:, None]
    weights = jnp.where(
        seen,
        jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)),
        0.0,
    )
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    return jnp.einsum("BHTS,BSHC->BTHC", weights, v, precision="highest").astype(dtype)


def gathered(pool: jax.Array, pages: jax.Array) -> jax.Array:
    """The slots ``[B, n * page, K, C]`` that `pages` ``[B, n]`` names in a pool ``[P, page, K, C]``."""
    return pool[pages].reshape(pages.shape[0], -1, *pool.shape[2:])


def visible(q_positions: jax.Array, kv_positions: jax.Array, window: int | None) -> jax.Array:
    """Which key slot each query sees: bool ``[B, T, S]``.

    A query at position p sees the keys at positions in (p - window, p]; negative positions are padding and see, and are
    seen by, nothing.
    """
    q, s = q_positions[:, :, None], kv_positions[:, None, :]
    seen = (s >= 0) & (s <= q)
    return seen if window is None else seen & (s > q - window)


def why_not(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    pages: jax.Array | None = None,
) -> str | None:
    """The definition serves every call."""
    return None
