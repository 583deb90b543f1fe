"""``attention_decode`` in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla


def attention_decode(
    qkv: jax.Array,
    norms: tuple[jax.Array, jax.Array | None],
    rope: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    *,
    heads: int,
    window: int | None,
    pages: jax.Array | None = None,
    eps: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """See `pallas_kernels.attention_decode.attention_decode`."""
    kv_heads, head_dim = cache[0].shape[2:]
    q, new = prepare(qkv, norms, rope, heads=heads, kv_heads=kv_heads, head_dim=head_dim, eps=eps)
    page = cache[0].shape[1]
    slots = page if pages is None else page * pages.shape[1]
    if new is not None:
        slot = positions % slots
        row = jnp.arange(len(positions), dtype=jnp.int32)[:, None]
        if pages is not None:
            row = jnp.take_along_axis(pages, slot // page, axis=1)
        row = jnp.where(positions < 0, len(cache[0]), row)  # beyond the last: dropped
        at = (row, slot % page)
        keys, values = (
            old.at[at].set(x.astype(old.dtype), mode="drop", unique_indices=True)
            for old, x in zip(cache, new, strict=True)
        )
        cache = (keys, values)
    last = jnp.max(positions, axis=1, keepdims=True)
    held = last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots
    q = q.astype(cache[0].dtype)
    out = xla.attention(q, *cache, positions, held, window=window, pages=pages)
    return out.reshape(*out.shape[:2], heads * head_dim), cache


def prepare(
    qkv: jax.Array,
    norms: tuple[jax.Array, jax.Array | None],
    rope: tuple[jax.Array, jax.Array],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Normed and rotated q, and k and normed v if the product has them: float32 ``[B, T, heads, C]``."""
    x = qkv.astype(jnp.float32).reshape(*qkv.shape[:-1], -1, head_dim)
    # One norm for all heads: q and k have a scale on top of it, v has none, and K = V shares the product.
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    q_norm, k_norm = norms
    q = apply_rope(x[..., :heads, :] * q_norm.astype(jnp.float32), rope)
    if k_norm is None:
        return q, None
    k, v = x[..., heads : heads + kv_heads, :], x[..., -kv_heads:, :]
    return q, (apply_rope(k * k_norm.astype(jnp.float32), rope), v)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (j, j + C / 2) of every head of ``x`` ``[B, T, heads, C]``; float32 in, float32 out.

    Source: Su et al., RoFormer (arXiv:2104.09864), in the half-split form of the published checkpoints.
    """
    cos, sin = (t[:, :, None, None, :] for t in table)
    halves = x.reshape(*x.shape[:-1], 2, -1)
    # Element-wise, so that it fuses with what reads it: halves put together again would be a kernel of their own.
    signs = jnp.array([[-1.0], [1.0]])
    return (halves * cos + halves[..., ::-1, :] * (signs * sin)).reshape(x.shape)


def why_not(
    qkv: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    heads: int,
    pages: jax.Array | None = None,
) -> str | None:
    """XLA serves every call."""
    return None
