"""Products with a quantized matrix without a dot: each word of codes is loaded once and used on the spot.

Everything up to the sum over K is element-wise over words, so a GPU gets one kernel that reads the planes and writes
the sums. Scales multiply the partial sum of a word rather than each element.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import wordwise_cpu
from pallas_kernels.arrays import BLOCK, EQ8_0, Q4K, Q6K, QuantizedArray

# Weights of a matrix from which on its instructions matter more than a GPU's launches, …
_LARGE = 1 << 22
# … and from which on what all rows need of x is worth a launch of its own.
_HUGE = 12_000_000
# Sums that keep a GPU busy, and how many are few even so.
_FEWEST_SUMS = 5120
_FEW_SUMS = 3072


def weighted_sums(x: jax.Array, w: QuantizedArray | jax.Array) -> jax.Array:
    """Returns ``sum_k x[m, k] * w[n, k]`` for x ``[M, K]``, added up in float32: float32 ``[M, N]``."""
    if not isinstance(w, QuantizedArray):
        wide = w.astype(jnp.float32)
        return _together([jnp.sum(wide * row, axis=-1) for row in x.astype(jnp.float32)])
    return jax.lax.platform_dependent(
        x, w, cpu=wordwise_cpu.weighted_sums, default=_sums_in_one_step
    )


def _together(sums: list[jax.Array]) -> jax.Array:
    """Stacks the rows' sums over one matrix such that XLA merges them into one kernel, which reads it once."""
    return jnp.stack(jax.lax.optimization_barrier(sums) if len(sums) > 1 else sums)


def _terms(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """One float32 term per word of codes, for one row of x."""
    if isinstance(w, Q4K):
        return _q4k_terms(x, w)
    return _eq8_0_terms(x, w) if isinstance(w, EQ8_0) else _q6k_terms(x, w)


def _sums_in_one_step(x: jax.Array, w: QuantizedArray) -> jax.Array:
    if x.shape[0] > 1:
        # In memory, rows one after the other: whatever computes x may have another order.
        x = jax.lax.optimization_barrier(x)
    rows: Iterable[jax.Array]
    if isinstance(w, Q4K) and x.dtype == jnp.bfloat16 and _matrix_size(w) >= _HUGE:
        places = _shared_places(x)
        rows = (_q4k_terms_shared(places.of_row(m), w) for m in range(len(x)))
    elif isinstance(w, Q4K) and x.dtype == jnp.bfloat16 and _matrix_size(w) >= _LARGE:
        rows = (_q4k_terms_without_conversion(row, w) for row in x)
    else:
        rows = (_terms(row, w) for row in x)
    return _together([_sums_of_parts(terms) for terms in rows])


def _sums_of_parts(terms: jax.Array) -> jax.Array:
    parts = _parts(terms.shape[-2], terms.shape[-1])
    if parts == 1:
        return jnp.sum(terms, axis=-1)
    sums = jnp.sum(terms.reshape(*terms.shape[:-1], parts, -1), axis=-1)
    sums = jax.lax.optimization_barrier(sums)
    return functools.reduce(operator.add, [sums[..., i] for i in range(parts)])


def _matrix_size(w: QuantizedArray) -> int:
    return math.prod(w.shape[-2:])


def _parts(rows: int, words: int) -> int:
    """Into how many partial sums to split each row so that a GPU has enough of them to be busy.

    With fewer, XLA also prefers to write the terms to memory and to sum them in a second kernel. Of parts that are too
    short, it writes the scales.
    """
    parts = 1
    while rows * parts < _FEWEST_SUMS and words % (2 * parts) == 0:
        shortest = 40 if rows * parts < _FEW_SUMS else 80
        if words // (2 * parts) < shortest:
            break
        parts *= 2
    return parts


def _q4k_terms_without_conversion(x: jax.Array, w: Q4K) -> jax.Array:
    """`_q4k_terms` of bfloat16 x with no conversion from integer to float, which is slow on GPUs.

    A code q put into the mantissa of 1.0 at bits 19-22 reads as ``1 + q / 16``.
    """
    by_place = x.astype(jnp.float32).reshape(-1, 8).T
    codes = [_in_mantissa(_shifted(w.codes, 19 - 4 * i), 0x00780000) for i in range(8)]
    words = _dot([code - 1 for code in codes], by_place)
    # The sum of x by way of the codes: XLA would compute one of x alone in a kernel of its own.
    sum_x = _dot(codes, by_place) - words
    return _scaled_terms(16 * words, sum_x, w)


def _q4k_terms_shared(places: _Places, w: Q4K) -> jax.Array:
    """`_q4k_terms_without_conversion` from what `_shared_places` computed of x.

    One shift serves both nibbles of a byte: at bits 15-18 a code reads as ``1 + q / 256``. With x times 16 for those,
    the sum of products is ``sum(q * x) / 16`` plus a sum over x alone.
    """
    halves = [_shifted(w.codes, 15 - 8 * i) for i in range(4)]
    codes = [_in_mantissa(half, mask) for mask in (0x00078000, 0x00780000) for half in halves]
    words = _dot(codes, [*places.even, *places.odd]) - (places.sum_even + places.sum_odd)
    return _scaled_terms(16 * words, places.sum_even / 16 + places.sum_odd, w)


def _scaled_terms(words: jax.Array, sum_x: jax.Array, w: Q4K) -> jax.Array:
    """Per word: scale * words - minimum * sum_x."""
    # Spread over the words: with the words gathered in blocks, XLA would write the terms to memory for some shapes.
    scale, minimum = (jnp.repeat(v, BLOCK // 8, axis=-1) for v in w.block_scales())
    return words * scale - minimum * sum_x


def _dot(fields: Iterable[jax.Array], factors: Iterable[jax.Array]) -> jax.Array:
    """``sum_i fields[i] * factors[i]`` in float32 as one chain of multiply-adds."""
    products = (
        field.astype(jnp.float32) * factor.astype(jnp.float32)
        for field, factor in zip(fields, factors, strict=True)
    )
    return functools.reduce(operator.add, products)


def _shifted(words: jax.Array, left: int) -> jax.Array:
    return words << left if left > 0 else words >> -left


def _in_mantissa(words: jax.Array, mask: int) -> jax.Array:
    """1.0 with the masked bits of the words in its mantissa."""
    return jax.lax.bitcast_convert_type((words & mask) | 0x3F800000, jnp.float32)


class _Places(NamedTuple):
    """What all rows of a Q4K product need of bfloat16 x, float32 ``[M, K/8]``: for each word of eight elements

    even: 16 times the elements at the four even places; odd: those at the odd ones; sum_even, sum_odd: their sums.
    """

    even: list[jax.Array]
    odd: list[jax.Array]
    sum_even: jax.Array
    sum_odd: jax.Array

    def of_row(self, m: int) -> _Places:
        """``[K/8]``: those of row m."""
        return jax.tree.map(lambda v: v[m], self)


def _shared_places(x: jax.Array) -> _Places:
    """Written once by a kernel, 32 bytes a word, which a row of the weights reads in two loads."""
    pairs = x.reshape(len(x), -1, 4, 2)
    even, odd = pairs[..., 0] * 16, pairs[..., 1]  # a power of two: exact
    sums = [
        functools.reduce(operator.add, [v[..., i].astype(jnp.float32) for i in range(4)])
        for v in (even, odd)
    ]
    bits = [jax.lax.bitcast_convert_type(v, jnp.uint16).astype(jnp.uint32) for v in (even, odd)]
    summed = jax.lax.bitcast_convert_type(jnp.stack(sums, axis=-1), jnp.uint32)
    rows = jnp.concatenate([bits[0] | (bits[1] << 16), summed, jnp.zeros_like(summed)], axis=-1)
    # Flat, so that XLA cannot choose a layout in which a word's numbers lie apart.
    rows = jax.lax.optimization_barrier(rows.reshape(-1)).reshape(len(x), -1, 8)
    upper = jnp.uint32(0xFFFF0000)
    columns = [rows[..., i] << 16 for i in range(4)] + [rows[..., i] & upper for i in range(4)]
    columns += [rows[..., 4], rows[..., 5]]
    values = [jax.lax.bitcast_convert_type(v, jnp.float32) for v in columns]
    return _Places(values[:4], values[4:8], values[8], values[9])


def _q4k_terms(x: jax.Array, w: Q4K) -> jax.Array:
    """Per word: scale * sum(q * x) - minimum * sum(x)."""
    by_place = x.astype(jnp.float32).reshape(-1, 8).T
    words = _dot([((w.codes >> (4 * i)) & 15).astype(jnp.int32) for i in range(8)], by_place)
    # Added up on the spot: as a sum of its own it would cost a GPU one more launch than the multiply-adds it saves.
    return _scaled_terms(words, functools.reduce(operator.add, by_place), w)


def _eq8_0_terms(x: jax.Array, w: EQ8_0) -> jax.Array:
    """Per word: scale * sum(q * x)."""
    by_place = x.reshape(-1, 4).T
    fields = [(w.codes << (24 - 8 * i)) >> 24 for i in range(4)]
    words = _dot(fields, by_place)
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
    words = _dot(fields, by_place)
    return (words * w.block_scales()[..., None]).reshape(w.low.shape)
