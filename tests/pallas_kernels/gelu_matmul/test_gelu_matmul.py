"""Every implementation of ``gelu_matmul`` against float64 GELU of float64 products."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, gelu_matmul, lanes, pack_array
from pallas_kernels.gelu_matmul import IMPLEMENTATIONS
from pallas_kernels.gelu_matmul.cases import SMALL
from pallas_kernels.packed import why_not_packed

BF16_EPS = float(jnp.finfo(jnp.bfloat16).eps)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("weight_format", [*FORMATS, "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_gelu_of_the_product_times_the_factor(
    implementation, weight_format, case, make_weight, magnitudes, sum_tolerance, offset_rounding
) -> None:
    n, k = SMALL[case]
    w = make_weight(weight_format, (n, k))
    served = w
    if implementation == "mosaic" and weight_format in FORMATS:
        if why_not_packed(type(w), w.shape):
            pytest.skip(f"{weight_format} has no packed form at K = {k}")
        served = pack_array(w)
    values = np.asarray(w.dequantize() if weight_format in FORMATS else w, np.float64)
    rng = np.random.default_rng(7)
    run = jax.jit(lambda x, w, f: gelu_matmul(x, w, f, implementation=implementation))
    for shape in ((1, k), (2, 5, k)):
        x = jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16)
        factor = jnp.asarray(rng.standard_normal((*shape[:-1], n)), jnp.float32)
        with lanes.interpreted():
            got = np.asarray(run(x, served, factor), np.float64)
        assert got.shape == (*shape[:-1], n)
        x64, factor64 = np.asarray(x, np.float64), np.asarray(factor, np.float64)
        want = _gelu(x64 @ values.T) * factor64
        # A product is off by the order of its sum (ten rows are also dequantized to bfloat16 by XLA); GELU grows no
        # faster than 1.13 x its argument; the result is rounded to bfloat16.
        relative = sum_tolerance(k) + offset_rounding(weight_format)
        if implementation == "xla" and weight_format in FORMATS and len(shape) == 3:
            relative += BF16_EPS / 2
        spread = 1.13 * relative * (np.abs(x64) @ magnitudes(w).T) * np.abs(factor64)
        assert np.all(np.abs(got - want) <= spread * (1 + BF16_EPS) + BF16_EPS / 2 * np.abs(want))


def test_errors_name_the_argument(make_weight) -> None:
    w, x = make_weight("q4k", (64, 64)), jnp.zeros((2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=re.escape("expected [..., K], [N, K]")):
        gelu_matmul(x[:, :32], w, jnp.ones((2, 64)))
    with pytest.raises(
        ValueError, match=re.escape("factor is float32[2, 1]: expected float32[2, 64]")
    ):
        gelu_matmul(x, w, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="w is Q4K in the order of its rows: pack it"):
        gelu_matmul(x, w, jnp.ones((2, 64)), implementation="mosaic")
