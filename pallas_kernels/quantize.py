"""From floating point to quantized arrays: jitted searches for the scales of least squared error.

Every format is quantized block by block in three moves, all of which only ever accept an improvement:
1. candidate scales per block, each followed by the least-squares scale for the codes it gives (the search of GGML's
   ``make_qkx2_quants`` and ``make_qx_quants``, https://github.com/ggml-org/ggml, without its heuristic weights);
2. rounding of the scales to what the format stores (6- or 8-bit integers of a float16 d per super-block);
3. descent on the stored values themselves: neighbouring integer scales for given d, least-squares d for given codes.
The error that is minimised is sum(importance * (w - value)**2), with the codes that the stored scales really give.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arrays import BLOCK, EQ8_0, FORMATS, Q4K, Q6K, QuantizedArray, super_block_size

F16_MAX = 65504.0


def quantize(w: jax.Array, format: str, importance: jax.Array | None = None) -> QuantizedArray:
    """Quantizes ``w`` along its last axis, minimising the weighted squared error.

    Args:
        w: float ``[..., N, K]`` (any leading axes, also none), K a multiple of 32, finite.
        format: "q4k", "eq8_0" or "q6k".
        importance: float ``[K]``, weights >= 0 of the squared error of each column; None weighs all alike.

    Returns:
        The quantized array of the same shape. Values whose scale would leave float16 are clipped.

    Raises:
        ValueError: unknown format, K not a multiple of 32, w not floating point, wrong shape of importance.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: expected one of {', '.join(FORMATS)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w has dtype {w.dtype}: expected a floating-point array")
    if w.ndim < 1:
        raise ValueError("w is a scalar: expected [..., K]")
    k = w.shape[-1]
    super_block_size(k)
    if importance is not None and importance.shape != (k,):
        raise ValueError(f"importance has shape {importance.shape}: expected ({k},), w's last axis")
    return _quantize(w, importance, format)


@partial(jax.jit, static_argnames="format")
def _quantize(w: jax.Array, importance: jax.Array | None, format: str) -> QuantizedArray:
    weights = jnp.ones((w.shape[-1],)) if importance is None else importance
    weights = weights.astype(jnp.float32)
    # Mean 1, so that sums of products stay in range; a block that matters nowhere still gets sensible codes.
    weights = weights * _inverse(jnp.mean(weights)) + 1e-6
    return _QUANTIZERS[format](w.astype(jnp.float32), weights)


def relative_error(w: jax.Array, quantized: QuantizedArray) -> float:
    """Returns ``||w - dequantized|| / ||w||`` (Frobenius norms over all elements), 0 for w = 0."""
    error, norm = _squares(w, quantized)
    return float(jnp.sqrt(error / norm)) if norm > 0 else 0.0


@jax.jit
def _squares(w: jax.Array, quantized: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    w = w.astype(jnp.float32)
    return jnp.sum((w - quantized.dequantize()) ** 2), jnp.sum(w * w)


def _inverse(x: jax.Array) -> jax.Array:
    """1/x, and 0 where x = 0 (or so small that 1/x is not finite), so that zero blocks get zero codes."""
    tiny = jnp.abs(x) < 1e-37
    return jnp.where(tiny, 0.0, 1.0 / jnp.where(tiny, 1.0, x))


def _f16(x: jax.Array) -> jax.Array:
    """Rounds to float16 without overflow, kept as float32."""
    return jnp.clip(x, -F16_MAX, F16_MAX).astype(jnp.float16).astype(jnp.float32)


def _keep_better(error: jax.Array, new: Any, best_error: jax.Array, best: Any) -> tuple[Any, Any]:
    """Takes ``new`` wherever its error is smaller; entries may have trailing axes of their own."""
    better = error < best_error

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(better.shape + (1,) * (a.ndim - better.ndim)), a, b)

    return jnp.where(better, error, best_error), jax.tree.map(choose, new, best)


# ---------------------------------------------------------------------------------------------- EQ8_0


def _quantize_eq8_0(w: jax.Array, weights: jax.Array) -> EQ8_0:
    """Scales just above and below amax / 127, then twice the least-squares scale for the codes."""
    x = w.reshape(*w.shape[:-1], -1, BLOCK)
    v = weights.reshape(-1, BLOCK)
    plain = jnp.max(jnp.abs(x), axis=-1) / 127

    def codes(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(x * _inverse(scale)[..., None]), -127, 127)

    def error(scale: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.sum(v * (x - scale[..., None] * q) ** 2, axis=-1)

    def attempt(best: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[Any, None]:
        scale = _f16(plain * factor)
        q = codes(scale)
        best = _keep_better(error(scale, q), scale, *best)
        refit = _f16(jnp.sum(v * x * q, -1) * _inverse(jnp.sum(v * q * q, -1)))
        return _keep_better(error(refit, codes(refit)), refit, *best), None

    first = _f16(plain)
    best = (error(first, codes(first)), first)
    (_, scale), _ = jax.lax.scan(attempt, best, _EQ8_FACTORS)
    return EQ8_0.from_fields(codes(scale).reshape(w.shape), scale)


# Below 1 the largest element is clipped: worth it only by a hair. Above 1 every rounding error grows with the factor,
# but the 32 roundings fall anew: a few per cent is where the luckiest of them pays.
_EQ8_FACTORS = np.concatenate(
    [np.linspace(0.985, 0.998, 4), np.linspace(1.002, 1.09, 20)], dtype=np.float32
)


# ------------------------------------------------------------------------------------------------ Q6K


def _quantize_q6k(w: jax.Array, weights: jax.Array) -> Q6K:
    """Signed scales (the largest magnitude becomes -32), then 8-bit scales of a float16 d."""
    s = super_block_size(w.shape[-1])
    groups = s // Q6K.GROUP
    x = w.reshape(*w.shape[:-1], -1, groups, Q6K.GROUP)
    v = weights.reshape(-1, groups, Q6K.GROUP)

    def codes(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(x * _inverse(scale)[..., None]), -32, 31)

    def error(scale: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.sum(v * (x - scale[..., None] * q) ** 2, axis=-1)

    largest = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=-1, keepdims=True), -1)[..., 0]

    def attempt(best: tuple[jax.Array, jax.Array], divisor: jax.Array) -> tuple[Any, None]:
        q = codes(largest / divisor)
        refit = jnp.sum(v * x * q, -1) * _inverse(jnp.sum(v * q * q, -1))
        return _keep_better(error(refit, codes(refit)), refit, *best), None

    first = largest / -32
    best = (error(first, codes(first)), first)
    (_, scale), _ = jax.lax.scan(attempt, best, _Q6_DIVISORS)

    def stored(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The int8 sc and float16 d that express ``scale`` [..., groups]."""
        peak = jnp.argmax(jnp.abs(scale), axis=-1, keepdims=True)
        d = _f16(jnp.take_along_axis(scale, peak, -1)[..., 0] / -128)
        sc = jnp.clip(jnp.round(scale * _inverse(d)[..., None]), -128, 127)
        return d, sc

    def total(d: jax.Array, sc: jax.Array) -> jax.Array:
        scale = d[..., None] * sc
        return jnp.sum(error(scale, codes(scale)), axis=-1)

    def descend(best: Any, _: None) -> tuple[Any, None]:
        _, (d, sc) = best

        def neighbour(block: Any, step: jax.Array) -> tuple[Any, None]:
            tried = jnp.clip(sc + step, -128, 127)
            scale = d[..., None] * tried
            return _keep_better(error(scale, codes(scale)), tried, *block), None

        scale = d[..., None] * sc
        (_, sc), _ = jax.lax.scan(
            neighbour, (error(scale, codes(scale)), sc), jnp.array([-2.0, -1.0, 1.0, 2.0])
        )
        best = _keep_better(total(d, sc), (d, sc), *best)
        y = sc[..., None] * codes(d[..., None] * sc)
        refit = _f16(jnp.sum(v * x * y, (-1, -2)) * _inverse(jnp.sum(v * y * y, (-1, -2))))
        return _keep_better(total(refit, sc), (refit, sc), *best), None

    plain, searched = stored(first), stored(scale)
    best = _keep_better(total(*searched), searched, total(*plain), plain)
    (_, (d, sc)), _ = jax.lax.scan(descend, best, None, length=2)
    q = codes(d[..., None] * sc) + 32
    flat = (*w.shape[:-1], -1)
    return Q6K.from_fields(q.reshape(w.shape), sc.reshape(flat), d)


_Q6_DIVISORS = -(32 + np.linspace(-1.5, 1.5, 16, dtype=np.float32))


# ------------------------------------------------------------------------------------------------ Q4K


def _quantize_q4k(w: jax.Array, weights: jax.Array) -> Q4K:
    """Affine blocks (scale, minimum >= 0), then 6-bit scales and minima of float16 d and dmin."""
    s = super_block_size(w.shape[-1])
    blocks = s // BLOCK
    x = w.reshape(*w.shape[:-1], -1, blocks, BLOCK)
    v = jnp.broadcast_to(weights.reshape(-1, blocks, BLOCK), x.shape[-3:])

    def codes(scale: jax.Array, minimum: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round((x + minimum[..., None]) * _inverse(scale)[..., None]), 0, 15)

    def error(scale: jax.Array, minimum: jax.Array) -> jax.Array:
        q = codes(scale, minimum)
        return jnp.sum(v * (x - scale[..., None] * q + minimum[..., None]) ** 2, axis=-1)

    low = jnp.minimum(jnp.min(x, axis=-1), 0.0)
    spread = jnp.max(x, axis=-1) - low
    spread = jnp.maximum(spread, 0.0)
    plain = (spread / 15, -low)

    def attempt(best: Any, levels: jax.Array) -> tuple[Any, None]:
        fit = _least_squares_affine(x, v, codes(spread / levels, -low))
        return _keep_better(error(*fit), fit, *best), None

    (_, searched), _ = jax.lax.scan(attempt, (error(*plain), plain), _Q4_LEVELS)

    def stored(scale: jax.Array, minimum: jax.Array) -> Any:
        d, dmin = _f16(jnp.max(scale, -1) / 63), _f16(jnp.max(minimum, -1) / 63)
        sc = jnp.clip(jnp.round(scale * _inverse(d)[..., None]), 0, 63)
        m = jnp.clip(jnp.round(minimum * _inverse(dmin)[..., None]), 0, 63)
        return d, dmin, sc, m

    def real(d: jax.Array, dmin: jax.Array, sc: jax.Array, m: jax.Array) -> Any:
        return d[..., None] * sc, dmin[..., None] * m

    def total(state: Any) -> jax.Array:
        return jnp.sum(error(*real(*state)), axis=-1)

    def descend(best: Any, _: None) -> tuple[Any, None]:
        d, dmin, sc, m = best[1]

        def neighbour(block: Any, step: jax.Array) -> tuple[Any, None]:
            tried = (jnp.clip(sc + step[0], 0, 63), jnp.clip(m + step[1], 0, 63))
            return _keep_better(error(*real(d, dmin, *tried)), tried, *block), None

        start = (error(*real(d, dmin, sc, m)), (sc, m))
        (_, (sc, m)), _ = jax.lax.scan(neighbour, start, _Q4_STEPS)
        state = (d, dmin, sc, m)
        best = _keep_better(total(state), state, *best)
        refit = _refit_d(x, v, codes(*real(*state)), sc, m)
        state = (*refit, sc, m)
        return _keep_better(total(state), state, *best), None

    first = stored(*plain)
    best = _keep_better(total(stored(*searched)), stored(*searched), total(first), first)
    (_, (d, dmin, sc, m)), _ = jax.lax.scan(descend, best, None, length=2)
    q = codes(*real(d, dmin, sc, m)).reshape(w.shape)
    flat = (*w.shape[:-1], -1)
    return Q4K.from_fields(q, sc.reshape(flat), m.reshape(flat), d, dmin)


_Q4_LEVELS = np.linspace(12.5, 17.0, 19, dtype=np.float32)
_Q4_STEPS = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b], np.float32)


def _least_squares_affine(x: jax.Array, v: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the (scale >= 0, minimum >= 0) of least weighted error per block for given codes."""
    sum_v, sum_q, sum_qq = jnp.sum(v, -1), jnp.sum(v * q, -1), jnp.sum(v * q * q, -1)
    sum_x, sum_xq = jnp.sum(v * x, -1), jnp.sum(v * x * q, -1)
    inverse = _inverse(sum_v * sum_qq - sum_q * sum_q)
    scale = (sum_v * sum_xq - sum_x * sum_q) * inverse
    minimum = (sum_q * sum_xq - sum_qq * sum_x) * inverse
    without = sum_xq * _inverse(sum_qq)  # the best scale where the minimum is held at 0
    scale = jnp.where(minimum < 0, without, scale)
    return jnp.maximum(scale, 0.0), jnp.maximum(minimum, 0.0)


def _refit_d(
    x: jax.Array, v: jax.Array, q: jax.Array, sc: jax.Array, m: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the float16 (d, dmin) of least error per super-block for given codes, sc and m."""
    a, b = sc[..., None] * q, jnp.broadcast_to(m[..., None], q.shape)

    def dot(p: jax.Array, r: jax.Array) -> jax.Array:
        return jnp.sum(v * p * r, axis=(-1, -2))

    aa, ab, bb, xa, xb = dot(a, a), dot(a, b), dot(b, b), dot(x, a), dot(x, b)
    inverse = _inverse(aa * bb - ab * ab)
    d, dmin = (bb * xa - ab * xb) * inverse, (ab * xa - aa * xb) * inverse
    return _f16(jnp.maximum(d, 0.0)), _f16(jnp.maximum(dmin, 0.0))


_QUANTIZERS = {"q4k": _quantize_q4k, "eq8_0": _quantize_eq8_0, "q6k": _quantize_q6k}
