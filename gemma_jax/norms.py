"""RMS norms and residual sums in the forms that cost a decode step the fewest kernels, all in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.packed import Weight
from pallas_kernels.quantized_matmul import quantized_matmul


class Residual(NamedTuple):
    """The residual stream between two layers, and what the next norm needs to know of it.

    Attributes:
      h: float32 ``[B, T, D]``.
      mean_square: ``mean(h**2)``, float32 ``[B, T, 1]``.
    """

    h: jax.Array
    mean_square: jax.Array

    @classmethod
    def of(cls, h: jax.Array) -> Residual:
        """`h` and its mean square."""
        h = h.astype(jnp.float32)
        return cls(h, jnp.mean(h * h, axis=-1, keepdims=True))


class NormedInput(NamedTuple):
    """``rms_norm(h, weight)`` on its way into a matrix product, the division left for after it.

    ``rms_norm(h, weight) @ w.T = ((h * weight) @ w.T) * scale`` with ``scale = 1 / sqrt(mean(h**2) + eps)``. The
    product can then start before the mean over the row is known, which saves a kernel for each norm of a decode step.

    Attributes:
      x: ``h * weight``, float32 ``[B, T, D]``.
      scale: float32 ``[B, T, 1]``.
    """

    x: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, residual: Residual, weight: jax.Array, eps: float) -> NormedInput:
        """The RMS norm of the residual stream with a scale of its own for each of the D elements."""
        scale = jax.lax.rsqrt(residual.mean_square + eps)
        return cls(residual.h * weight.astype(jnp.float32), scale)

    def times(self, w: Weight, dtype: Any, implementation: Implementation) -> jax.Array:
        """float32 ``[B, T, N]``: the norm times ``w`` ``[N, D]`` transposed, with activations of `dtype`."""
        return quantized_matmul(self.x.astype(dtype), w, implementation=implementation) * self.scale


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis, in float32 (Zhang and Sennrich, arXiv:1910.07467)."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x if weight is None else x * weight.astype(jnp.float32)


def add_normed(
    h: Residual, branches: list[tuple[jax.Array, jax.Array]], outer: jax.Array | None, eps: float
) -> Residual:
    """``h + sum_i rms_norm(y_i, weight_i)``, or ``h + rms_norm(sum_i rms_norm(y_i, weight_i), outer)``, in float32.

    Every mean that is wanted is one of a sum of vectors with known factors, so it follows from the means of products of
    two vectors: ``mean((a u + b v)**2) = a**2 mean(u**2) + 2 a b mean(u v) + b**2 mean(v**2)``. Those come out of one
    pass over h and the y_i, where each norm would otherwise wait for the one inside it: a kernel for each in a decode
    step. A mean is off by about ``2**-24`` of the sum of its terms' sizes: it matters only where they all but cancel.

    Args:
      h: the residual stream.
      branches: (y_i ``[B, T, D]``, weight_i ``[D]``).
      outer: weight ``[D]`` of the norm around the sum, or None for no such norm.
      eps: of all norms.
    """
    ys = [y.astype(jnp.float32) for y, _ in branches]
    weighted = [y * w.astype(jnp.float32) for y, (_, w) in zip(ys, branches, strict=True)]
    factors = [jax.lax.rsqrt(_mean(y, y) + eps) for y in ys]
    if outer is not None:
        scale = jax.lax.rsqrt(_mean_square(weighted, factors) + eps)
        weighted = [u * outer.astype(jnp.float32) for u in weighted]
        factors = [factor * scale for factor in factors]
    one = jnp.ones_like(factors[0])
    mean_square = _mean_square([h.h, *weighted], [one, *factors])
    return Residual(sum((u * f for u, f in zip(weighted, factors, strict=True)), h.h), mean_square)


def _mean(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.mean(u * v, axis=-1, keepdims=True)


def _mean_square(vectors: list[jax.Array], factors: list[jax.Array]) -> jax.Array:
    """``mean((sum_i factor_i * vector_i)**2)`` over the last axis from the means of products of two vectors."""
    total = jnp.zeros_like(factors[0])
    for i, (u, a) in enumerate(zip(vectors, factors, strict=True)):
        for j in range(i + 1):
            total += (1 if i == j else 2) * a * factors[j] * _mean(u, vectors[j])
    return jnp.maximum(total, 0.0)
