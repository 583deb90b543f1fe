"""Products with a quantized matrix without a dot: each word of codes is loaded once and used on the spot.

The whole expression is element-wise up to one sum over K, so XLA fuses it into a kernel that holds no dequantized
weight. Scales multiply the partial sum of a word rather than each element.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import BLOCK, EQ8_0, Q4K, Q6K, Weight


def weighted_sums(x: jax.Array, w: Weight) -> jax.Array:
    """Returns ``sum_k x[k] * w[..., n, k]`` for float32 x ``[K]``: float32 ``[..., N]``."""
    if isinstance(w, Q4K):
        terms = _q4k_terms(x, w)
    elif isinstance(w, EQ8_0):
        terms = _eq8_0_terms(x, w)
    elif isinstance(w, Q6K):
        terms = _q6k_terms(x, w)
    else:
        terms = w.astype(jnp.float32) * x
    return jnp.sum(terms, axis=-1)


def _dot_fields(fields: list[jax.Array], x: jax.Array) -> jax.Array:
    """Returns ``sum_i fields[i] * x[i]`` as one chain of multiply-adds."""
    total = fields[0].astype(jnp.float32) * x[0]
    for field, factor in zip(fields[1:], x[1:], strict=True):
        total = total + field.astype(jnp.float32) * factor
    return total


def _q4k_terms(x: jax.Array, w: Q4K) -> jax.Array:
    """Per word: scale * sum(q * x) - minimum * sum(x)."""
    scale, minimum = w.block_scales()
    by_place = x.reshape(-1, 8).T
    fields = [((w.codes >> (4 * i)) & 15).astype(jnp.int32) for i in range(8)]
    words = _dot_fields(fields, by_place)
    blocked = (*scale.shape, BLOCK // 8)
    sum_x = jnp.sum(by_place, axis=0).reshape(-1, BLOCK // 8)
    terms = words.reshape(blocked) * scale[..., None] - minimum[..., None] * sum_x
    return terms.reshape(words.shape)


def _eq8_0_terms(x: jax.Array, w: EQ8_0) -> jax.Array:
    """Per word: scale * sum(q * x)."""
    by_place = x.reshape(-1, 4).T
    fields = [(w.codes << (24 - 8 * i)) >> 24 for i in range(4)]
    words = _dot_fields(fields, by_place)
    scale = w.scale.astype(jnp.float32)[..., None]
    return (words.reshape(*w.scale.shape, BLOCK // 4) * scale).reshape(words.shape)


def _q6k_terms(x: jax.Array, w: Q6K) -> jax.Array:
    """Per group of 16: scale * sum((q - 32) * x)."""
    by_place = x.reshape(-1, 2, 8).transpose(2, 0, 1)
    low = w.low.reshape(*w.low.shape[:-1], -1, 2)
    high = w.high[..., None] >> jnp.array([0, 16], jnp.uint32)
    fields = [
        (((low >> (4 * i)) & 15) | (((high >> (2 * i)) & 3) << 4)).astype(jnp.int32) - 32
        for i in range(8)
    ]
    words = _dot_fields(fields, by_place)
    return (words * w.block_scales()[..., None]).reshape(w.low.shape)
