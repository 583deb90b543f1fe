"""From floating point to quantized arrays: jitted searches for the scales of least squared error.

Every format is quantized block by block in three moves, each of which only ever accepts an improvement:
1. candidate scales per block, and the least-squares scale for the codes that each gives (the search of GGML's
   ``make_qkx2_quants`` and ``make_qx_quants``, https://github.com/ggml-org/ggml, without its heuristic weights);
2. rounding of the scales to what the format stores (6- or 8-bit integers times a float16 d per super-block);
3. descent on the stored values themselves: neighbouring integer scales for given d, least-squares d for given codes.
The error that is minimised is sum(importance * (w - value)**2), with the codes that the stored scales really give.

Inside, weights lie as ``[elements of a block, blocks of a super-block, super-blocks of a row, rows]``: the lanes of a
vector unit, or of a warp, then work on different rows, and no sum runs along the minor axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arrays import BLOCK, EQ8_0, FORMATS, Q4K, Q6K, QuantizedArray, super_block_size

F16_MAX = 65504.0
# Elements worked on at once: what a core's cache holds, or enough to fill a GPU.
CHUNK_ELEMENTS = {"cpu": 2**16, "gpu": 2**26}


def quantize(
    w: jax.Array,
    format: str,
    importance: jax.Array | None = None,
) -> QuantizedArray:
    """Quantizes ``w`` along its last axis, minimising the weighted squared error.

    Args:
        w: finite floats ``[..., N, K]`` (any leading axes, also none), K a multiple of 32.
        format: "q4k", "eq8_0" or "q6k".
        importance: float ``[K]``, weight >= 0 of the squared error of each column; None weighs all alike.

    Returns:
        The quantized array of the same shape. Values whose scale would overflow float16 are clipped.

    Raises:
        ValueError: unknown format, K not a multiple of 32, w not floating point, wrong shape of importance.

    >>> import jax
    >>> w = jax.random.normal(jax.random.key(0), (4, 512))
    >>> q = quantize(w, "q4k")
    >>> q.shape, q.bits_per_weight, relative_error(w, q) < 0.08
    ((4, 512), 4.5, True)
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


@partial(jax.jit, static_argnames="name")
def _quantize(w: jax.Array, importance: jax.Array | None, name: str) -> QuantizedArray:
    k, rows = w.shape[-1], math.prod(w.shape[:-1])
    target = CHUNK_ELEMENTS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    chunk = max(1, min(rows, target // k))
    block_size = Q6K.GROUP if name == "q6k" else BLOCK
    v = None
    if importance is not None:
        v = importance.astype(jnp.float32)[None]
        # Mean 1 keeps sums of products in range; a block that matters nowhere still gets sensible codes.
        v = _blocked(v * _inverse(jnp.mean(v)) + 1e-6, block_size)

    def one_chunk(part: jax.Array) -> QuantizedArray:
        return _QUANTIZERS[name](_blocked(part.astype(jnp.float32), block_size), v)

    parts = w.reshape(rows, k)
    parts = jnp.pad(parts, ((0, -rows % chunk), (0, 0))).reshape(-1, chunk, k)
    planes = jax.lax.map(one_chunk, parts)
    return jax.tree.map(
        lambda plane: plane.reshape(-1, plane.shape[-1])[:rows].reshape(*w.shape[:-1], -1), planes
    )


def relative_error(w: jax.Array, quantized: QuantizedArray) -> float:
    """Returns ``||w - dequantized|| / ||w||`` (Frobenius norms over all elements), 0 for w = 0."""
    error, norm = _squares(w, quantized)
    return float(jnp.sqrt(error / norm)) if norm > 0 else 0.0


@jax.jit
def _squares(w: jax.Array, quantized: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    w = w.astype(jnp.float32)
    return jnp.sum((w - quantized.dequantize()) ** 2), jnp.sum(w * w)


# ------------------------------------------------------------------------------- what all formats share


def _blocked(rows: jax.Array, block_size: int) -> jax.Array:
    """``[R, K]`` -> ``[elements, blocks, super-blocks, R]``."""
    r, k = rows.shape
    s = super_block_size(k)
    return rows.reshape(r, k // s, s // block_size, block_size).transpose(3, 2, 1, 0)


def _rows(fields: jax.Array) -> jax.Array:
    """Undoes :func:`_blocked`, for codes, for one number per block, or per super-block: ``[R, …]``."""
    return fields.transpose(*reversed(range(fields.ndim))).reshape(fields.shape[-1], -1)


def _inverse(x: jax.Array) -> jax.Array:
    """1/x, and 0 where x = 0 (or so small that 1/x overflows), so that zero blocks get zero codes."""
    tiny = jnp.abs(x) < 1e-37
    return jnp.where(tiny, 0.0, 1.0 / jnp.where(tiny, 1.0, x))


def _f16(x: jax.Array) -> jax.Array:
    """Rounds to float16 without overflow, kept as float32."""
    return jnp.clip(x, -F16_MAX, F16_MAX).astype(jnp.float16).astype(jnp.float32)


def _weighted(v: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if v is None else v * x


def _extreme(x: jax.Array) -> jax.Array:
    """The element of largest magnitude along the first axis, with its sign."""
    high, low = jnp.max(x, 0), jnp.min(x, 0)
    return jnp.where(high >= -low, high, low)


def _keep_better(error: jax.Array, new: Any, best_error: jax.Array, best: Any) -> tuple[Any, Any]:
    """Takes ``new`` wherever its error is smaller; its leaves may have leading axes that errors lack."""
    better = error < best_error
    return jnp.minimum(error, best_error), jax.tree.map(partial(jnp.where, better), new, best)


def _symmetric(x: jax.Array, v: jax.Array | None, lowest: int, highest: int) -> Any:
    """The three functions of a format without minima: codes(scale), error(scale), refit(codes).

    ``refit`` returns the scale of least error for given codes, sum(v x q) / sum(v q q).
    """

    def codes(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(x * _inverse(scale)), lowest, highest)

    def error(scale: jax.Array) -> jax.Array:
        return jnp.sum(_weighted(v, (x - scale * codes(scale)) ** 2), 0)

    def refit(q: jax.Array) -> jax.Array:
        vq = _weighted(v, q)
        return jnp.sum(vq * x, 0) * _inverse(jnp.sum(vq * q, 0))

    return codes, error, refit


# ------------------------------------------------------------------------------------------------ EQ8_0

# Factors on amax / 127. Below 1 the largest element is clipped, which pays only by a hair. Above 1 every rounding error
# grows with the factor, but the 32 roundings fall anew: within a few per cent the luckiest of them pays.
_EQ8_FACTORS = np.concatenate([np.linspace(0.985, 0.998, 4), np.linspace(1.002, 1.09, 20)])


def _quantize_eq8_0(x: jax.Array, v: jax.Array | None) -> EQ8_0:
    """The best float16 scale among amax / 127, its neighbourhood, and the least-squares scale of each."""
    codes, error, refit = _symmetric(x, v, -127, 127)
    plain = jnp.max(jnp.abs(x), 0) / 127

    def attempt(best: tuple[Any, Any], factor: jax.Array) -> tuple[Any, None]:
        scale = _f16(plain * factor)
        best = _keep_better(error(scale), scale, *best)
        scale = _f16(refit(codes(scale)))
        return _keep_better(error(scale), scale, *best), None

    first = _f16(plain)
    factors = jnp.asarray(_EQ8_FACTORS, jnp.float32)
    (_, scale), _ = jax.lax.scan(attempt, (error(first), first), factors)
    return EQ8_0.from_fields(_rows(codes(scale)), _rows(scale))


# -------------------------------------------------------------------------------------------------- Q6K

# The scale is the largest magnitude over one of these: the full range is -32..31, and its sign is free.
_Q6_DIVISORS = -(32 + np.linspace(-1.5, 1.5, 16))
_Q6_STEPS = (-2.0, -1.0, 1.0, 2.0)


def _quantize_q6k(x: jax.Array, v: jax.Array | None) -> Q6K:
    """Signed scales per 16 elements, then 8-bit integers of a float16 d."""
    codes, error, refit = _symmetric(x, v, -32, 31)
    largest = _extreme(x)

    def attempt(best: tuple[Any, Any], divisor: jax.Array) -> tuple[Any, None]:
        scale = refit(codes(largest / divisor))
        return _keep_better(error(scale), scale, *best), None

    def stored(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        d = _f16(_extreme(scale) / -128)
        return d, jnp.clip(jnp.round(scale * _inverse(d)), -128, 127)

    def total(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(error(state[0] * state[1]), 0)

    def descend(best: tuple[Any, Any], _: None) -> tuple[Any, None]:
        d, sc = best[1]

        def neighbour(block: tuple[Any, Any], step: jax.Array) -> tuple[Any, None]:
            tried = jnp.clip(sc + step, -128, 127)
            return _keep_better(error(d * tried), tried, *block), None

        (_, sc), _ = jax.lax.scan(neighbour, (error(d * sc), sc), jnp.array(_Q6_STEPS))
        best = _keep_better(total((d, sc)), (d, sc), *best)
        y = sc * codes(d * sc)
        vy = _weighted(v, y)
        d = _f16(jnp.sum(vy * x, (0, 1)) * _inverse(jnp.sum(vy * y, (0, 1))))
        return _keep_better(total((d, sc)), (d, sc), *best), None

    first = largest / -32
    divisors = jnp.asarray(_Q6_DIVISORS, jnp.float32)
    (_, scale), _ = jax.lax.scan(attempt, (error(first), first), divisors)
    plain, searched = stored(first), stored(scale)
    best = _keep_better(total(searched), searched, total(plain), plain)
    (_, (d, sc)), _ = jax.lax.scan(descend, best, None, length=2)
    return Q6K.from_fields(_rows(codes(d * sc)) + 32, _rows(sc), _rows(d))


# -------------------------------------------------------------------------------------------------- Q4K

# The scale that codes are taken from is the spread over one of these; 15 would use the range to its ends.
_Q4_LEVELS = np.linspace(12.5, 17.0, 19)
_Q4_STEPS = [(a, b) for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0) if a or b]


def _quantize_q4k(x: jax.Array, v: jax.Array | None) -> Q4K:
    """Scale and minimum >= 0 per 32 elements, then 6-bit integers of float16 d and dmin."""

    def codes(scale: jax.Array, minimum: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round((x + minimum) * _inverse(scale)), 0, 15)

    def error(scale: jax.Array, minimum: jax.Array) -> jax.Array:
        values = scale * codes(scale, minimum) - minimum
        return jnp.sum(_weighted(v, (x - values) ** 2), 0)

    low = jnp.minimum(jnp.min(x, 0), 0.0)
    spread = jnp.maximum(jnp.max(x, 0), 0.0) - low
    first = (spread / 15, -low)

    def attempt(best: tuple[Any, Any], levels: jax.Array) -> tuple[Any, None]:
        fit = _affine_fit(x, v, codes(spread / levels, -low))
        return _keep_better(error(*fit), fit, *best), None

    def stored(scale: jax.Array, minimum: jax.Array) -> tuple[jax.Array, ...]:
        d, dmin = _f16(jnp.max(scale, 0) / 63), _f16(jnp.max(minimum, 0) / 63)
        sc = jnp.clip(jnp.round(scale * _inverse(d)), 0, 63)
        m = jnp.clip(jnp.round(minimum * _inverse(dmin)), 0, 63)
        return d, dmin, sc, m

    def total(state: tuple[jax.Array, ...]) -> jax.Array:
        d, dmin, sc, m = state
        return jnp.sum(error(d * sc, dmin * m), 0)

    def descend(best: tuple[Any, Any], _: None) -> tuple[Any, None]:
        d, dmin, sc, m = best[1]

        def neighbour(block: tuple[Any, Any], step: jax.Array) -> tuple[Any, None]:
            tried = (jnp.clip(sc + step[0], 0, 63), jnp.clip(m + step[1], 0, 63))
            return _keep_better(error(d * tried[0], dmin * tried[1]), tried, *block), None

        start: tuple[Any, Any] = (error(d * sc, dmin * m), (sc, m))
        sc, m = jax.lax.scan(neighbour, start, jnp.array(_Q4_STEPS))[0][1]
        best = _keep_better(total((d, dmin, sc, m)), (d, dmin, sc, m), *best)
        d, dmin = _refit_d_dmin(x, v, sc * codes(d * sc, dmin * m), m)
        return _keep_better(total((d, dmin, sc, m)), (d, dmin, sc, m), *best), None

    levels = jnp.asarray(_Q4_LEVELS, jnp.float32)
    fit = jax.lax.scan(attempt, (error(*first), first), levels)[0][1]
    plain, searched = stored(*first), stored(*fit)
    best = _keep_better(total(searched), searched, total(plain), plain)
    (_, (d, dmin, sc, m)), _ = jax.lax.scan(descend, best, None, length=2)
    q = codes(d * sc, dmin * m)
    return Q4K.from_fields(_rows(q), _rows(sc), _rows(m), _rows(d), _rows(dmin))


def _affine_fit(x: jax.Array, v: jax.Array | None, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The (scale >= 0, minimum >= 0) of least error of ``scale * q - minimum`` per block."""
    vq = _weighted(v, q)
    sum_v = q.shape[0] if v is None else jnp.sum(v, 0)
    sum_x, sum_q = jnp.sum(_weighted(v, x), 0), jnp.sum(vq, 0)
    sum_qq, sum_xq = jnp.sum(vq * q, 0), jnp.sum(vq * x, 0)
    inverse = _inverse(sum_v * sum_qq - sum_q * sum_q)
    scale = (sum_v * sum_xq - sum_x * sum_q) * inverse
    minimum = (sum_q * sum_xq - sum_qq * sum_x) * inverse
    without_minimum = sum_xq * _inverse(sum_qq)
    scale = jnp.where(minimum < 0, without_minimum, scale)
    return jnp.maximum(scale, 0.0), jnp.maximum(minimum, 0.0)


def _refit_d_dmin(
    x: jax.Array, v: jax.Array | None, a: jax.Array, m: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The float16 (d, dmin) of least error of ``d * a - dmin * m`` per super-block, a = sc * q."""
    b = jnp.broadcast_to(m, a.shape)

    def dot(p: jax.Array, r: jax.Array) -> jax.Array:
        return jnp.sum(_weighted(v, p * r), (0, 1))

    aa, ab, bb, xa, xb = dot(a, a), dot(a, b), dot(b, b), dot(x, a), dot(x, b)
    inverse = _inverse(aa * bb - ab * ab)
    d, dmin = (bb * xa - ab * xb) * inverse, (ab * xa - aa * xb) * inverse
    d = jnp.where(bb == 0, xa * _inverse(aa), d)
    return _f16(jnp.maximum(d, 0.0)), _f16(jnp.maximum(dmin, 0.0))


_QUANTIZERS: dict[str, Callable[..., QuantizedArray]] = {
    "q4k": _quantize_q4k,
    "eq8_0": _quantize_eq8_0,
    "q6k": _quantize_q6k,
}
