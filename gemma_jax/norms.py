"""RMS norms and residual sums in the forms that cost a decode step the fewest kernels, all in float32.

There are two. XLA fuses sums with the means they need, and a norm's division is left for after the product that follows
it (`Residual`, `NormedInput`, `add_normed`). A hand-written kernel does at once what a block's end and the beginning of
the next have to do to the stream, which until then is a `Pending`. `start` decides between them; `normed`, `plus` and
`times_scalar` serve both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.packed import Weight
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.residual_norm import Pending, has_kernel, residual_norm


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


Stream = Residual | Pending


class NormedInput(NamedTuple):
    """``rms_norm(h, weight)`` on its way into a matrix product, the division left for after it.

    ``rms_norm(h, weight) @ w.T = ((h * weight) @ w.T) * scale`` with ``scale = 1 / sqrt(mean(h**2) + eps)``. The
    product can then start before the mean over the row is known, which saves a kernel for each norm of a decode step.

    Attributes:
      x: ``h * weight``, float32 ``[B, T, D]``; the norm itself where nothing is left to do.
      scale: float32 ``[B, T, 1]``; None where nothing is left to do.
    """

    x: jax.Array
    scale: jax.Array | None

    @classmethod
    def of(cls, residual: Residual, weight: jax.Array, eps: float) -> NormedInput:
        """The RMS norm of the residual stream with a scale of its own for each of the D elements."""
        scale = jax.lax.rsqrt(residual.mean_square + eps)
        return cls(residual.h * weight.astype(jnp.float32), scale)

    def times(self, w: Weight, dtype: Any, implementation: Implementation) -> jax.Array:
        """float32 ``[B, T, N]``: the norm times ``w`` ``[N, D]`` transposed, with activations of `dtype`."""
        y = quantized_matmul(self.x.astype(dtype), w, implementation=implementation)
        return y if self.scale is None else y * self.scale

    @property
    def factor(self) -> jax.Array:
        """`scale`, or ones."""
        if self.scale is None:
            return jnp.ones((*self.x.shape[:-1], 1), jnp.float32)
        return self.scale


def start(h: jax.Array, dtype: Any, implementation: Implementation) -> Stream:
    """The stream that begins with `h` ``[B, T, D]``, in the form that `implementation` wants."""
    stream = Pending(h.astype(jnp.float32))
    if has_kernel(stream, (None,), dtype, implementation):
        return stream
    return Residual.of(h)


def normed(
    stream: Stream,
    weights: tuple[jax.Array | None, ...],
    dtype: Any,
    eps: float,
    implementation: Implementation,
) -> tuple[Stream, tuple[NormedInput, ...]]:
    """The stream with nothing left to do, and its RMS norm with each of `weights` ``[D]``; None for no norm.

    Args:
      stream: the residual stream.
      weights: of the norms.
      dtype: of the activations that they go into.
      eps: of all norms.
      implementation: of ``residual_norm``.
    """
    if isinstance(stream, Residual):
        return stream, tuple(
            NormedInput(stream.h, None) if w is None else NormedInput.of(stream, w, eps)
            for w in weights
        )
    h, out = residual_norm(stream, weights, dtype=dtype, eps=eps, implementation=implementation)
    return Pending(h), tuple(NormedInput(x, None) for x in out)


def plus(
    stream: Stream,
    branches: tuple[tuple[jax.Array, jax.Array], ...],
    outer: jax.Array | None,
    eps: float,
) -> Stream:
    """The stream and what a block adds to it: see `add_normed`."""
    if isinstance(stream, Residual):
        return add_normed(stream, list(branches), outer, eps)
    return Pending(stream.h, branches, outer)


def times_scalar(stream: Stream, scalar: jax.Array) -> Stream:
    """The stream times `scalar` ``[1]``."""
    scalar = scalar.astype(jnp.float32)
    if isinstance(stream, Residual):
        return Residual(stream.h * scalar, stream.mean_square * scalar**2)
    return stream.replace(scalar=scalar)


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
