"""The definition, in float32 but for what the cache's type rounds: what every other implementation is held against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference


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
    keys, values = cache
    if pages is not None:
        return _in_pages(qkv, norms, rope, cache, positions, pages, heads, window, eps)
    batch, slots, kv_heads, head_dim = keys.shape
    cos, sin = (table[:, :, None] for table in rope)

    def rotated(x: jax.Array) -> jax.Array:
        low, high = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    x = qkv.astype(jnp.float32).reshape(*qkv.shape[:2], -1, head_dim)
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    q = rotated(x[:, :, :heads] * norms[0].astype(jnp.float32))
    if norms[1] is not None:
        k = rotated(x[:, :, heads : heads + kv_heads] * norms[1].astype(jnp.float32))
        v = x[:, :, -kv_heads:]
        slot = jnp.where(positions < 0, slots, positions % slots)  # beyond the last: dropped
        rows = jnp.arange(batch)[:, None]
        keys = keys.at[rows, slot].set(k.astype(keys.dtype), mode="drop")
        values = values.at[rows, slot].set(v.astype(values.dtype), mode="drop")
    last = jnp.max(positions, axis=1, keepdims=True)
    held = last - (last - jnp.arange(slots)) % slots
    out = reference.attention(q.astype(keys.dtype), keys, values, positions, held, window=window)
    return out.reshape(*qkv.shape[:2], -1), (keys, values)


def _in_pages(
    qkv: jax.Array,
    norms: tuple[jax.Array, jax.Array | None],
    rope: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    pages: jax.Array,
    heads: int,
    window: int | None,
    eps: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """By copies of the rows' pages, put side by side; those that were written go back."""
    page = cache[0].shape[1]
    keys, values = (reference.gathered(x, pages) for x in cache)
    options: dict[str, Any] = {"heads": heads, "window": window, "eps": eps}
    out, rows = attention_decode(qkv, norms, rope, (keys, values), positions, **options)
    index = positions % rows[0].shape[1]
    at = jnp.take_along_axis(pages, index // page, axis=1)
    at = jnp.where(positions < 0, len(cache[0]), at)  # beyond the last: dropped
    new = (jnp.take_along_axis(x, index[..., None, None], axis=1) for x in rows)
    keys, values = (
        x.at[at, index % page].set(n, mode="drop") for x, n in zip(cache, new, strict=True)
    )
    return out, (keys, values)


def why_not(
    qkv: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    heads: int,
    pages: jax.Array | None = None,
) -> str | None:
    """The definition serves every call."""
    return None
