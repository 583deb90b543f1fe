"""Every implementation of ``argmax_matmul`` against the largest of float64 products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, argmax_matmul, lanes, pack_array
from pallas_kernels.argmax_matmul import IMPLEMENTATIONS, mosaic
from pallas_kernels.argmax_matmul.cases import SMALL
from pallas_kernels.decode_matmul import Config
from pallas_kernels.packed import why_not_packed


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("weight_format", [*FORMATS, "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finds_the_largest_product(implementation, weight_format, case, make_weight) -> None:
    n, k = SMALL[case]
    w = make_weight(weight_format, (n, k))
    served = w
    if implementation == "mosaic" and weight_format in FORMATS:
        if why_not_packed(type(w), w.shape):
            pytest.skip(f"{weight_format} has no packed form at K = {k}")
        served = pack_array(w)
    values = np.asarray(w.dequantize() if weight_format in FORMATS else w, np.float64)
    run = jax.jit(lambda x, w: argmax_matmul(x, w, implementation=implementation))
    for rows in (1, 5):
        x = np.random.default_rng(rows).standard_normal((rows, k))
        # The runner-up is far enough behind for float32 sums of any order.
        x = x + 0.1 * values[[7, n - 1, 0, 40, 33][:rows]]
        x = jnp.asarray(x, jnp.bfloat16)
        products = np.asarray(x, np.float64) @ values.T
        first, second = np.sort(products, axis=-1)[:, -1], np.sort(products, axis=-1)[:, -2]
        assert np.all(first - second > 1e-3 * np.abs(first))
        with lanes.interpreted():
            got = run(x, served)
        assert got.dtype == jnp.int32
        assert np.array_equal(got, np.argmax(products, axis=-1))


@pytest.mark.parametrize("tiles", [1, 4])
def test_the_lowest_of_equals_wins_and_rows_that_are_not_there_never(tiles: int) -> None:
    w = (
        jnp.zeros((48, 64), jnp.bfloat16).at[:, 0].set(-1.0)
    )  # all products are -1: sums of nothing would win
    w = w.at[20].set(w[45] * 0.5).at[45].set(w[45] * 0.5)
    x = jnp.zeros((2, 64), jnp.bfloat16).at[:, 0].set(1.0)
    with lanes.interpreted():
        got = mosaic.argmax_matmul(x, w, Config(tiles=tiles, warpgroups=1, ctas=2))
    assert got.tolist() == [20, 20]


def test_errors_name_the_argument(make_weight) -> None:
    with pytest.raises(ValueError, match="differ in their last axis"):
        argmax_matmul(jnp.zeros((2, 32)), make_weight("q4k", (16, 64)))
    with pytest.raises(ValueError, match="x has dtype int32"):
        argmax_matmul(jnp.zeros((2, 64), jnp.int32), make_weight("q4k", (16, 64)))
