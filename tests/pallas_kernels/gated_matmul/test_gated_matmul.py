"""Every implementation of ``gated_matmul`` against float64 GELU of float64 products."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, gated_matmul, lanes, pack_array
from pallas_kernels.gated_matmul import IMPLEMENTATIONS
from pallas_kernels.gated_matmul.cases import SMALL
from pallas_kernels.packed import why_not_packed

BF16_EPS = float(jnp.finfo(jnp.bfloat16).eps)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("weight_format", [*FORMATS, "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_gelu_of_gate_times_up(
    implementation, weight_format, case, make_weight, magnitudes, sum_tolerance, offset_rounding
) -> None:
    f, k = SMALL[case]
    w = make_weight(weight_format, (2 * f, k))
    served = w
    if implementation == "mosaic" and weight_format in FORMATS:
        if why_not_packed(type(w), w.shape):
            pytest.skip(f"{weight_format} has no packed form at K = {k}")
        served = pack_array(w)
    values = np.asarray(w.dequantize() if weight_format in FORMATS else w, np.float64)
    rng = np.random.default_rng(7)
    run = jax.jit(lambda x, w, s: gated_matmul(x, w, s, implementation=implementation))
    for shape in ((1, k), (2, 5, k)):
        x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        scale = jnp.asarray(rng.uniform(0.05, 0.2, (*shape[:-1], 1)), jnp.float32)
        with lanes.interpreted():
            got = np.asarray(run(x, served, scale), np.float64)
        assert got.shape == (*shape[:-1], f)
        x64, scale64 = np.asarray(x, np.float64), np.asarray(scale, np.float64)
        gate, up = np.split(x64 @ values.T * scale64, 2, axis=-1)
        want = _gelu(gate) * up
        # A product is off by the order of its sum (ten rows are also dequantized to bfloat16 by XLA); GELU grows no
        # faster than 1.13 x its argument; the result is rounded to bfloat16.
        relative = sum_tolerance(k) + offset_rounding(weight_format)
        if implementation == "xla" and weight_format in FORMATS and len(shape) == 3:
            relative += BF16_EPS / 2
        error = np.split(relative * (np.abs(x64) @ magnitudes(w).T) * scale64, 2, axis=-1)
        spread = 1.13 * error[0] * (np.abs(up) + error[1]) + np.abs(_gelu(gate)) * error[1]
        assert np.all(np.abs(got - want) <= spread * (1 + BF16_EPS) + BF16_EPS / 2 * np.abs(want))


def test_errors_name_the_argument(make_weight) -> None:
    w, x = make_weight("q4k", (64, 64)), jnp.zeros((2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=re.escape("expected [..., K], [2 F, K]")):
        gated_matmul(x[:, :32], w, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=re.escape("scale is float32[2]: expected float32[2, 1]")):
        gated_matmul(x, w, jnp.ones(2))
    with pytest.raises(ValueError, match="w is Q4K in the order of its rows: pack it"):
        gated_matmul(x, w, jnp.ones((2, 1)), implementation="mosaic")
    narrow = jnp.zeros((48, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="F a multiple of 16"):
        gated_matmul(x, narrow, jnp.ones((2, 1)), implementation="mosaic")
