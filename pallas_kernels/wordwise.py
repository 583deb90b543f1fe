"""Products with a quantized matrix without a dot: each word of codes is loaded once and used on the spot.

Everything up to the sum over K is element-wise over words, so a GPU gets one kernel that reads the planes and writes
the sums. Scales multiply the partial sum of a word rather than each element.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import BLOCK, EQ8_0, Q4K, Q6K, QuantizedArray, Weight

# Weights of a matrix from which on its instructions matter more than a GPU's launches, …
_LARGE = 1 << 22
# … and from which on what all rows need of x is worth a launch of its own.
_HUGE = 12_000_000
# Sums that keep a GPU busy.
_FEWEST_SUMS = 5120


def weighted_sums(x: jax.Array, w: Weight) -> jax.Array:
    """Returns ``sum_k x[k] * w[..., n, k]`` for x ``[K]``, added up in float32: float32 ``[..., N]``."""
    if not isinstance(w, QuantizedArray):
        return jnp.sum(w.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)
    return jax.lax.platform_dependent(x, w, cpu=_sums_in_two_steps, default=_sums_in_one_step)


def _terms(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """One float32 term per word of codes."""
    if isinstance(w, Q4K):
        return _q4k_terms(x, w)
    return _eq8_0_terms(x, w) if isinstance(w, EQ8_0) else _q6k_terms(x, w)


def _sums_in_one_step(x: jax.Array, w: QuantizedArray) -> jax.Array:
    if isinstance(w, Q4K) and x.dtype == jnp.bfloat16 and _matrix_size(w) >= _LARGE:
        terms = _q4k_terms_without_conversion(x, w)
    else:
        terms = _terms(x, w)
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

    With fewer, XLA also prefers to write the terms to memory and to sum them in a second kernel.
    """
    parts = 1
    while rows * parts < _FEWEST_SUMS and words % (2 * parts) == 0 and words // (2 * parts) >= 40:
        parts *= 2
    return parts


def _sums_in_two_steps(x: jax.Array, w: QuantizedArray) -> jax.Array:
    # XLA:CPU vectorizes an element-wise loop over words but not one fused into a sum: writing the terms (an eighth or a
    # quarter of the elements) and summing them in a second loop is 15 to 40 times faster.
    return jnp.sum(jax.lax.optimization_barrier(_terms(x, w)), axis=-1)


def _q4k_terms_without_conversion(x: jax.Array, w: Q4K) -> jax.Array:
    """`_q4k_terms` of bfloat16 x with no conversion from integer to float, which is slow on GPUs.

    A code q put into the mantissa of 1.0 at bits 19-22 reads as ``1 + q / 16``, at bits 15-18 as ``1 + q / 256``.
    """
    scale, minimum = w.block_scales()
    if _matrix_size(w) < _HUGE:
        by_place = x.astype(jnp.float32).reshape(-1, 8).T
        codes = [_in_mantissa(_shifted(w.codes, 19 - 4 * i), 0x00780000) for i in range(8)]
        words = _dot([code - 1 for code in codes], by_place)
        # The sum of x by way of the codes: XLA would compute one of x alone in a kernel of its own.
        sum_x = _dot(codes, by_place) - words
        words = 16 * words
    else:
        # One shift serves both nibbles of a byte. With x times 16 for the lower ones, the sum of products is
        # sum(q * x) / 16 plus a sum over x alone.
        even, odd, sum_even, sum_odd = _shared_places(x)
        sum_x = sum_even / 16 + sum_odd
        halves = [_shifted(w.codes, 15 - 8 * i) for i in range(4)]
        codes = [_in_mantissa(half, mask) for mask in (0x00078000, 0x00780000) for half in halves]
        words = _dot(codes, [*even, *odd])
        words = 16 * (words - (sum_even + sum_odd))
    terms = words.reshape(*scale.shape, BLOCK // 8) * scale[..., None]
    terms -= minimum[..., None] * sum_x.reshape(*sum_x.shape[:-1], -1, BLOCK // 8)
    return terms.reshape(words.shape)


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


def _shared_places(
    x: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    """What all rows of a Q4K product need of bfloat16 x for each word of eight elements, written once by a kernel.

    Returns:
        float32 ``[K/8]`` each: 16 times the elements at the four even places, those at the odd ones, and the two sums.
    """
    pairs = x.reshape(-1, 4, 2)
    even, odd = pairs[..., 0] * 16, pairs[..., 1]  # a power of two: exact
    sums = [
        functools.reduce(operator.add, [v[:, i].astype(jnp.float32) for i in range(4)])
        for v in (even, odd)
    ]
    bits = [jax.lax.bitcast_convert_type(v, jnp.uint16).astype(jnp.uint32) for v in (even, odd)]
    summed = jax.lax.bitcast_convert_type(jnp.stack(sums, axis=-1), jnp.uint32)
    # 32 bytes a word, which a row of the weights reads in two loads. Flat, so that XLA cannot choose a layout in which
    # they lie apart.
    rows = jnp.concatenate([bits[0] | (bits[1] << 16), summed, jnp.zeros_like(summed)], axis=-1)
    rows = jax.lax.optimization_barrier(rows.reshape(-1)).reshape(-1, 8)
    upper = jnp.uint32(0xFFFF0000)
    columns = [rows[:, i] << 16 for i in range(4)] + [rows[:, i] & upper for i in range(4)]
    columns += [rows[:, 4], rows[:, 5]]
    values = [jax.lax.bitcast_convert_type(v, jnp.float32) for v in columns]
    return values[:4], values[4:8], values[8], values[9]


def _q4k_terms(x: jax.Array, w: Q4K) -> jax.Array:
    """Per word: scale * sum(q * x) - minimum * sum(x)."""
    scale, minimum = w.block_scales()
    by_place = x.reshape(-1, 8).T
    fields = [((w.codes >> (4 * i)) & 15).astype(jnp.int32) for i in range(8)]
    words = _dot(fields, by_place)
    blocked = (*scale.shape, BLOCK // 8)
    # Added up on the spot: as a sum of its own it would cost a GPU one more launch than the multiply-adds it saves.
    sum_x = functools.reduce(operator.add, by_place.astype(jnp.float32)).reshape(-1, BLOCK // 8)
    terms = words.reshape(blocked) * scale[..., None] - minimum[..., None] * sum_x
    return terms.reshape(words.shape)


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
