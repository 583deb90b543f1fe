"""Every implementation of ``quantized_matmul`` against a float64 product of the values it stands for.

Those for GPUs run in Pallas' interpret mode, their inline blocks emulated lane by lane.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, lanes, pack_array, quantized_matmul
from pallas_kernels.packed import why_not_packed
from pallas_kernels.quantized_matmul import IMPLEMENTATIONS, mosaic_decode
from pallas_kernels.quantized_matmul.cases import SMALL

WEIGHT_FORMATS = (*FORMATS, "bf16", "f32")
X_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def _values(w) -> np.ndarray:
    return np.asarray(w.dequantize() if hasattr(w, "dequantize") else w, np.float64)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_equals_the_product_of_the_values(
    implementation,
    weight_format,
    x_dtype,
    case,
    make_weight,
    magnitudes,
    sum_tolerance,
    bf16_rounding,
    offset_rounding,
) -> None:
    n, k = SMALL[case]
    w = make_weight(weight_format, (n, k))
    served = w
    if implementation == "mosaic" and weight_format in FORMATS:
        if why_not_packed(type(w), (n, k)):
            with pytest.raises(ValueError, match=r"cannot serve this: w is .* pack it"):
                quantized_matmul(jnp.zeros((1, k), jnp.bfloat16), w, implementation=implementation)
            return
        served = pack_array(w)
    rng = np.random.default_rng(5)
    run = jax.jit(lambda x, w: quantized_matmul(x, w, implementation=implementation))
    for shape in ((k,), (1, k), (2, 3, k), (20, k)):
        x = jnp.asarray(rng.standard_normal(shape), X_DTYPES[x_dtype])
        reason = implementation and IMPLEMENTATIONS[implementation].why_not(x, served)
        if reason:
            with pytest.raises(ValueError, match=re.escape(reason)):
                run(x, served)
            continue
        with lanes.interpreted():
            got = run(x, served)
        assert got.dtype == jnp.float32
        assert got.shape == (*shape[:-1], n)
        x64 = np.asarray(x, np.float64)
        scale = np.abs(x64) @ magnitudes(w).T
        # Beyond eight rows the weights are dequantized to the type of x.
        rounded = weight_format in FORMATS and x_dtype == "bf16" and implementation != "reference"
        tolerance = sum_tolerance(k) + (bf16_rounding if rounded and shape[0] == 20 else 0)
        if implementation == "mosaic":
            tolerance += offset_rounding(weight_format)
        assert np.all(np.abs(got - x64 @ _values(w).T) <= tolerance * scale)


@pytest.mark.parametrize(
    ("weight_format", "rows", "tiles", "warpgroups", "ctas"),
    [
        ("q4k", 3, 4, 1, 2),  # more tiles than there are: the last CTA's are cut off
        ("q4k", 1, 1, 2, 1),  # fewer chunks than warps, several groups for one CTA
        ("eq8_0", 16, 2, 1, 8),  # two tiles of columns
        ("q4k", 16, 1, 1, 4),
        ("q6k", 9, 1, 1, 2),
        ("q6k", 2, 3, 3, 1),  # warps that are no power of two
        ("bf16", 16, 1, 1, 2),
    ],
)
def test_a_decode_matmul_does_not_depend_on_how_it_is_spread(
    weight_format,
    rows,
    tiles,
    warpgroups,
    ctas,
    make_weight,
    magnitudes,
    sum_tolerance,
    offset_rounding,
) -> None:
    n, k = 80, 768
    w = make_weight(weight_format, (n, k))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((rows, k)), jnp.bfloat16)
    config = mosaic_decode.Config(tiles=tiles, warpgroups=warpgroups, ctas=ctas)
    served = pack_array(w) if weight_format in FORMATS else w
    with lanes.interpreted():
        got = jax.jit(lambda x, w: mosaic_decode.quantized_matmul(x, w, config))(x, served)
    x64 = np.asarray(x, np.float64)
    tolerance = (sum_tolerance(k) + offset_rounding(weight_format)) * (
        np.abs(x64) @ magnitudes(w).T
    )
    assert np.all(np.abs(got - x64 @ _values(w).T) <= tolerance)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_implementation_serves_packed_weights(
    weight_format, implementation, make_weight
) -> None:
    w = make_weight(weight_format, (16, 256))
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 256)), jnp.float32)
    plain, packed = (
        quantized_matmul(x, v, implementation=implementation) for v in (w, pack_array(w))
    )
    assert np.array_equal(plain, packed)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_works_under_vmap_and_grad(weight_format: str, make_weight) -> None:
    w = make_weight(weight_format, (4, 6, 64))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 64)), jnp.float32)
    stacked = jax.vmap(quantized_matmul)(x, w)
    for i in range(4):
        np.testing.assert_allclose(stacked[i], quantized_matmul(x[i], w[i]), rtol=0, atol=1e-4)
    slope = jax.grad(lambda x: jnp.sum(quantized_matmul(x, w[0])))(x[0])
    np.testing.assert_allclose(slope[1], w[0].dequantize().sum(0), rtol=0, atol=1e-4)


def test_no_rows_are_no_work(make_weight) -> None:
    assert quantized_matmul(jnp.zeros((0, 64)), make_weight("q4k", (6, 64))).shape == (0, 6)


def test_errors_name_the_argument(make_weight) -> None:
    w = make_weight("q4k", (6, 64))
    with pytest.raises(ValueError, match=r"x \(2, 32\) and w \(6, 64\) differ"):
        quantized_matmul(jnp.zeros((2, 32)), w)
    with pytest.raises(ValueError, match="x has dtype int32"):
        quantized_matmul(jnp.zeros((2, 64), jnp.int32), w)
    with pytest.raises(ValueError, match=r"w has shape .* expected 2 axes"):
        quantized_matmul(jnp.zeros((2, 64)), make_weight("q4k", (2, 6, 64)))
    with pytest.raises(ValueError, match="w has dtype int8"):
        quantized_matmul(jnp.zeros((2, 64)), jnp.zeros((6, 64), jnp.int8))
    with pytest.raises(ValueError, match="of xla, mosaic, reference"):
        quantized_matmul(jnp.zeros((2, 64)), w, implementation="cutlass")
