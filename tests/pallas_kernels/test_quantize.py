"""The quantizers against the plain methods they must never lose to, and on rows that are easy to get wrong."""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, quantize, relative_error
from pallas_kernels.arrays import super_block_size

DISTRIBUTIONS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "student_t3": lambda rng, shape: rng.standard_t(3, shape),
    "shifted_laplace": lambda rng, shape: rng.laplace(0.5, 1.0, shape),
    "positive": lambda rng, shape: rng.uniform(0.5, 1.0, shape),
    "rows_of_many_sizes": lambda rng, shape: (
        rng.standard_normal(shape) * np.exp(rng.uniform(-4, 4, (shape[0], 1)))
    ),
}


def _weights(distribution: str, k: int = 512, rows: int = 64) -> np.ndarray:
    rng = np.random.default_rng(7)
    return (DISTRIBUTIONS[distribution](rng, (rows, k)) * 0.02).astype(np.float32)


def _safe(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 1, x)


def _f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def _plain_q4k(w: np.ndarray) -> np.ndarray:
    """Range of each block cut into 15 steps, scales and minima into 63."""
    x = w.reshape(-1, super_block_size(w.shape[-1]) // 32, 32)
    minimum = -np.minimum(x.min(-1), 0)
    scale = (np.maximum(x.max(-1), 0) + minimum) / 15
    d, dmin = (_f16(v.max(-1, keepdims=True) / 63) for v in (scale, minimum))
    scale, minimum = d * np.round(scale / _safe(d)), dmin * np.round(minimum / _safe(dmin))
    scale, minimum = scale[..., None], minimum[..., None]
    q = np.clip(np.round((x + minimum) / _safe(scale)), 0, 15)
    return (scale * q - minimum).reshape(w.shape)


def _plain_q6k(w: np.ndarray) -> np.ndarray:
    """The largest magnitude of each 16 becomes -32, the largest scale of a super-block -128."""
    x = w.reshape(-1, super_block_size(w.shape[-1]) // 16, 16)

    def extreme(v: np.ndarray) -> np.ndarray:
        return np.take_along_axis(v, np.abs(v).argmax(-1)[..., None], -1)

    scale = extreme(x)[..., 0] / -32
    d = _f16(extreme(scale) / -128)
    scale = (d * np.clip(np.round(scale / _safe(d)), -128, 127))[..., None]
    return (scale * np.clip(np.round(x / _safe(scale)), -32, 31)).reshape(w.shape)


def _plain_q8_0(w: np.ndarray) -> np.ndarray:
    """The gguf package's own quantizer."""
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.dequantize(gguf.quants.quantize(w, q8_0), q8_0)


PLAIN = {"q4k": _plain_q4k, "q6k": _plain_q6k, "eq8_0": _plain_q8_0}
# What the search gains on gaussian and heavy-tailed rows, at the least, as a fraction of the plain method's error.
LEAST_GAIN = {"q4k": 0.05, "q6k": 0.03, "eq8_0": 0.05}


@pytest.mark.parametrize("k", [512, 704])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_never_worse_than_the_plain_method(name: str, distribution: str, k: int) -> None:
    w = _weights(distribution, k)
    ours = relative_error(jnp.asarray(w), quantize(jnp.asarray(w), name))
    plain = np.linalg.norm(w - PLAIN[name](w)) / np.linalg.norm(w)
    assert ours <= plain * (1 + 1e-6)
    if distribution in ("gaussian", "student_t3"):
        assert ours <= plain * (1 - LEAST_GAIN[name])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_eq8_0_is_never_worse_in_any_single_block(distribution: str) -> None:
    w = _weights(distribution)
    ours = np.asarray(quantize(jnp.asarray(w), "eq8_0").dequantize())

    def per_block(values: np.ndarray) -> np.ndarray:
        return ((w - values) ** 2).reshape(-1, 32).sum(-1)

    assert np.all(per_block(ours) <= per_block(_plain_q8_0(w)) * (1 + 1e-5))


@pytest.mark.parametrize("name", FORMATS)
def test_zero_rows_stay_zero_beside_others(name: str) -> None:
    w = _weights("gaussian").copy()
    w[3], w[5, :256], w[6, 64:96] = 0, 0, 0
    values = np.asarray(quantize(jnp.asarray(w), name).dequantize())
    assert np.isfinite(values).all()
    assert not values[3].any()
    assert not values[5, :256].any()
    assert not values[6, 64:96].any()
    assert values[4].any()


@pytest.mark.parametrize("constant", [1.0, -1.0, 0.013, -3e-3])
@pytest.mark.parametrize("name", FORMATS)
def test_constant_rows_are_as_exact_as_a_float16_scale_allows(name: str, constant: float) -> None:
    w = jnp.full((2, 256), constant)
    values = np.asarray(quantize(w, name).dequantize())
    # The scale is rounded once to 11 significant bits (2**-11) where it is not subnormal; Q6K's and Q4K's float16
    # scale is of scales, smaller by up to 128 * 32, and may be subnormal: 2**-25 absolute times what multiplies it.
    subnormal = {"eq8_0": 127, "q4k": 63 * 15, "q6k": 128 * 32}[name] * 2.0**-25
    np.testing.assert_allclose(values, constant, rtol=2.0**-11 * 1.01, atol=subnormal)


@pytest.mark.parametrize("name", FORMATS)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    w = _weights("gaussian")
    importance = np.exp(np.random.default_rng(3).uniform(-4, 4, w.shape[-1])).astype(np.float32)

    def weighted(quantized) -> float:
        return float(np.sum(importance * (w - np.asarray(quantized.dequantize())) ** 2))

    plain = weighted(quantize(jnp.asarray(w), name))
    aimed = weighted(quantize(jnp.asarray(w), name, jnp.asarray(importance)))
    assert aimed < 0.97 * plain
    scaled = weighted(quantize(jnp.asarray(w), name, jnp.asarray(importance * 1e-9)))
    assert scaled == pytest.approx(aimed, rel=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_no_importance_do_no_harm(name: str) -> None:
    w = _weights("gaussian")
    importance = np.ones(512, np.float32)
    importance[:300] = 0
    quantized = quantize(jnp.asarray(w), name, jnp.asarray(importance))
    assert relative_error(jnp.asarray(w), quantized) < 0.2
    nothing = quantize(jnp.asarray(w), name, jnp.zeros(512))
    assert relative_error(jnp.asarray(w), nothing) < 0.2


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_quantized_alike_alone_in_a_stack_and_in_chunks(name: str) -> None:
    w = jnp.asarray(_weights("student_t3", k=96, rows=30))
    whole = quantize(w, name)
    stacked = quantize(w.reshape(2, 3, 5, 96), name)
    assert stacked.shape == (2, 3, 5, 96)
    np.testing.assert_array_equal(stacked.dequantize().reshape(30, 96), whole.dequantize())
    np.testing.assert_array_equal(quantize(w[7], name).dequantize(), whole.dequantize()[7])
    inside = jax.jit(lambda w: quantize(w, name))(w)
    np.testing.assert_array_equal(inside.dequantize(), whole.dequantize())
    many = jnp.tile(w, (40, 1))  # 1200 rows of 96: more than one chunk, the last one not full
    again = quantize(many, name).dequantize().reshape(40, 30, 96)
    np.testing.assert_array_equal(again, np.broadcast_to(whole.dequantize(), (40, 30, 96)))


@pytest.mark.parametrize("name", FORMATS)
def test_huge_and_tiny_weights_stay_finite(name: str) -> None:
    w = jnp.asarray(_weights("gaussian", k=256, rows=4)) * jnp.array(
        [[1e30], [1e-30], [1e6], [1e-9]]
    )
    assert np.isfinite(np.asarray(quantize(w, name).dequantize())).all()


def test_errors_name_the_argument() -> None:
    w = jnp.zeros((2, 64))
    with pytest.raises(ValueError, match="format = 'q5k': expected one of q4k, eq8_0, q6k"):
        quantize(w, "q5k")
    with pytest.raises(ValueError, match="K = 48"):
        quantize(jnp.zeros((2, 48)), "q4k")
    with pytest.raises(ValueError, match="w has dtype int32"):
        quantize(jnp.zeros((2, 64), jnp.int32), "q4k")
    with pytest.raises(ValueError, match=r"importance has shape \(2,\): expected \(64,\)"):
        quantize(w, "q4k", jnp.ones(2))


def test_relative_error_of_nothing_is_zero() -> None:
    w = jnp.zeros((2, 64))
    assert relative_error(w, quantize(w, "q4k")) == 0.0
