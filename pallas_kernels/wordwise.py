"""Products with a quantized matrix without a dot: each word of codes is loaded once and used on the spot.

Everything up to the sum over K is element-wise over words, so a GPU gets one kernel that reads the planes and writes
the sums. Scales multiply the partial sum of a word rather than each element.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import BLOCK, EQ8_0, Q4K, Q6K, QuantizedArray, Weight


def weighted_sums(x: jax.Array, w: Weight) -> jax.Array:
    """Returns ``sum_k x[k] * w[..., n, k]`` for float32 x ``[K]``: float32 ``[..., N]``."""
    if not isinstance(w, QuantizedArray):
        return jnp.sum(w.astype(jnp.float32) * x, axis=-1)
    return jax.lax.platform_dependent(x, w, cpu=_sums_in_two_steps, default=_sums_in_one_step)


def _terms(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """One float32 term per word of codes."""
    if isinstance(w, Q4K):
        return _q4k_terms(x, w)
    return _eq8_0_terms(x, w) if isinstance(w, EQ8_0) else _q6k_terms(x, w)


def _sums_in_one_step(x: jax.Array, w: QuantizedArray) -> jax.Array:
    return jnp.sum(_terms(x, w), axis=-1)


def _sums_in_two_steps(x: jax.Array, w: QuantizedArray) -> jax.Array:
    # XLA:CPU vectorizes an element-wise loop over words but not one fused into a sum: writing the terms (an eighth or a
    # quarter of the elements) and summing them in a second loop is 15 to 40 times faster.
    return jnp.sum(jax.lax.optimization_barrier(_terms(x, w)), axis=-1)


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
    # Added up on the spot: as a sum of its own it would cost a GPU one more launch than the multiply-adds it saves.
    sum_x = functools.reduce(operator.add, by_place).reshape(-1, BLOCK // 8)
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
    """Per word of ``low``, half a group of 16: scale * sum((q - 32) * x)."""
    by_place = x.reshape(-1, 2, 8).transpose(2, 0, 1)
    low = w.low.reshape(*w.low.shape[:-1], -1, 2)
    high = w.high[..., None] >> jnp.array([0, 16], jnp.uint32)
    # Bits 2 i and 2 i + 1 of the half word belong at 4 and 5: one shift, to the left while 2 i < 4.
    tops = [high << (4 - 2 * i) if i < 2 else high >> (2 * i - 4) for i in range(8)]
    fields = [
        (((low >> (4 * i)) & 15) | (top & 48)).astype(jnp.int32) - 32 for i, top in enumerate(tops)
    ]
    words = _dot_fields(fields, by_place)
    return (words * w.block_scales()[..., None]).reshape(w.low.shape)
