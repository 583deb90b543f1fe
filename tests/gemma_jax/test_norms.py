"""Residual sums whose norms come from the means of products, against the definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.moe import top_k
from gemma_jax.norms import Residual, add_normed

EPS = 1e-6
SIZE = 384


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("has_outer", [False, True])
@pytest.mark.parametrize("size_of_h", [1e-3, 1.0, 1e3])
def test_a_residual_sum_and_its_mean_square(
    branches: int, has_outer: bool, size_of_h: float
) -> None:
    rng = np.random.default_rng(branches)
    h = size_of_h * rng.standard_normal((2, 3, SIZE))
    ys = [10.0**i * rng.standard_normal((2, 3, SIZE)) for i in range(branches)]
    weights = [rng.uniform(0.5, 2.0, SIZE) for _ in ys]
    outer = rng.uniform(0.5, 2.0, SIZE) if has_outer else None

    def f32(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x, jnp.float32)

    pairs = [(f32(y), f32(w)) for y, w in zip(ys, weights, strict=True)]
    have = add_normed(Residual.of(f32(h)), pairs, None if outer is None else f32(outer), EPS)
    added = np.sum([norm(y, w) for y, w in zip(ys, weights, strict=True)], axis=0)
    want = h + (added if outer is None else norm(added, outer))
    # A sum over SIZE elements in float32, a handful of them in each mean.
    relative = 8 * SIZE * 2.0**-24
    np.testing.assert_allclose(have.h, want, rtol=0, atol=relative * np.abs(want).max())
    mean_square = np.mean(want**2, axis=-1, keepdims=True)
    np.testing.assert_allclose(have.mean_square, mean_square, rtol=4 * relative)


def test_a_sum_that_cancels_gives_no_negative_mean_square() -> None:
    h = jnp.ones((1, 1, SIZE))
    have = add_normed(Residual.of(h), [(-h, jnp.ones(SIZE))], None, 0.0)
    assert float(jnp.abs(have.h).max()) < 1e-6
    assert 0 <= float(have.mean_square[0, 0, 0]) < 1e-6


def test_top_k_by_counting_is_that_of_sorting_also_among_equals() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 12, (5, 2, 64)), jnp.float32)
    for have, want in zip(top_k(x, 8), jax.lax.top_k(x, 8), strict=True):
        np.testing.assert_array_equal(have, want)
