"""The word-wise product as XLA:CPU runs it well: one element of an element-wise loop per block, then a sum.

XLA:CPU turns an element-wise loop into vector instructions, but neither a sum fused with what it sums nor one over a
short last axis. So a first loop computes a term per block of 32 (Q6K: of 16), unpacking all its codes in registers, and
writes it; a second one adds up the terms of a row: a 32nd of what a dequantized matrix would take.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import BLOCK, EQ8_0, Q4K, Q6K, QuantizedArray


def weighted_sums(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """Returns ``sum_k x[m, k] * w[n, k]`` for x ``[M, K]``, added up in float32: float32 ``[M, N]``."""
    # The barrier ties the codes to x: from a loop over tokens XLA would move the unpacking out, into memory.
    x, w = jax.lax.optimization_barrier((x.astype(jnp.float32), w))
    rows = [jax.lax.optimization_barrier(_terms(row, w)) for row in x]
    return jnp.stack([jnp.sum(terms, axis=-1) for terms in rows])


def _terms(x: jax.Array, w: QuantizedArray) -> jax.Array:
    if isinstance(w, Q4K):
        return _q4k_terms(x, w)
    return _eq8_0_terms(x, w) if isinstance(w, EQ8_0) else _q6k_terms(x, w)


def _q4k_terms(x: jax.Array, w: Q4K) -> jax.Array:
    """Per block: scale * sum(q * x) - minimum * sum(x).

    Codes are masked where they lie in their words, q * 16**i, and multiply x * 16**-i: powers of two, so exact, and a
    shift less for each code. The last of a word would be negative, and is shifted.
    """
    scale, minimum = _q4k_scales(w)
    weights = [16.0**-i for i in range(7)] + [1.0]
    places, sum_x = _by_place(x, BLOCK, weights * (BLOCK // 8))
    codes = w.codes.reshape(*scale.shape, BLOCK // 8)
    fields = [
        (codes[..., word] & (15 << 4 * i) if i < 7 else codes[..., word] >> 28).astype(jnp.int32)
        for word in range(BLOCK // 8)
        for i in range(8)
    ]
    return scale * _dot(fields, places) - minimum * sum_x


def _eq8_0_terms(x: jax.Array, w: EQ8_0) -> jax.Array:
    """Per block: scale * sum(q * x)."""
    places, _ = _by_place(x, BLOCK)
    codes = w.codes.reshape(*w.scale.shape, BLOCK // 4)
    fields = [
        (codes[..., word] << (24 - 8 * i)) >> 24 for word in range(BLOCK // 4) for i in range(4)
    ]
    return w.scale.astype(jnp.float32) * _dot(fields, places)


def _q6k_terms(x: jax.Array, w: Q6K) -> jax.Array:
    """Per group of 16: scale * (sum(q * x) - 32 * sum(x)), q from 0 to 63."""
    scale = w.block_scales()
    places, sum_x = _by_place(x, 16)
    low = w.low.reshape(*scale.shape, 2)
    # Bits 2 i and 2 i + 1 of the word of high bits belong at 4 and 5: one shift, to the left while 2 i < 4.
    tops = [w.high << (4 - 2 * i) if i < 2 else w.high >> (2 * i - 4) for i in range(16)]
    fields = [
        (((low[..., i // 8] >> (4 * (i % 8))) & 15) | (top & 48)).astype(jnp.int32)
        for i, top in enumerate(tops)
    ]
    return scale * (_dot(fields, places) - 32 * sum_x)


def _by_place(
    x: jax.Array, size: int, weights: Sequence[float] = (1.0,)
) -> tuple[list[jax.Array], jax.Array]:
    """Element i of every block of `size` times weight i, side by side, for each i; and the sums of the blocks."""
    by_place = x.reshape(-1, size).T
    total = jnp.sum(by_place, axis=0, keepdims=True)
    by_place = jnp.concatenate([by_place * jnp.asarray(weights)[:, None], total])
    # Computed once and not again for each row; flat, so that XLA cannot leave them in x's order.
    by_place = jax.lax.optimization_barrier(by_place.reshape(-1)).reshape(size + 1, -1)
    return list(by_place[:size]), by_place[size]


def _dot(fields: Sequence[jax.Array], factors: Sequence[jax.Array]) -> jax.Array:
    """``sum_i fields[i] * factors[i]``, in chains of eight that do not wait for each other."""
    products = [f.astype(jnp.float32) * x for f, x in zip(fields, factors, strict=True)]
    chains = [
        functools.reduce(operator.add, products[i : i + 8]) for i in range(0, len(products), 8)
    ]
    while len(chains) > 1:
        chains = [a + b for a, b in zip(chains[::2], chains[1::2], strict=True)]
    return chains[0]


def _q4k_scales(w: Q4K) -> tuple[jax.Array, jax.Array]:
    """`Q4K.block_scales` on 32-bit integers, of which XLA:CPU makes vectors, where it does not of bytes."""
    blocks = w.scales_low.shape[-1]
    if blocks % 8 == 0:  # the nibbles of a super-block are a word
        pairs = w.scales_high.reshape(*w.scales_high.shape[:-1], -1, 4)
        high, count = jax.lax.bitcast_convert_type(pairs, jnp.uint32), 8
    else:
        high, count = w.scales_high.astype(jnp.uint32), 2
    shape = (*high.shape, count)
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    high = jnp.broadcast_to(high[..., None], shape)
    # Four shifts by an iota: XLA would hand 4 * iota to the loop as one more array, and beyond seven LLVM gives up.
    for _ in range(4):
        high = high >> place
    high = high.reshape(*high.shape[:-2], -1)[..., :blocks]
    low = w.scales_low.astype(jnp.uint32)
    sc = (low & 15) | ((high & 3) << 4)
    m = (low >> 4) | ((high & 12) << 2)
    return _scaled(sc, w.d), _scaled(m, w.dmin)


def _scaled(integers: jax.Array, scale: jax.Array) -> jax.Array:
    per_super_block = integers.reshape(*scale.shape, -1).astype(jnp.int32).astype(jnp.float32)
    return (per_super_block * scale[..., None].astype(jnp.float32)).reshape(integers.shape)
