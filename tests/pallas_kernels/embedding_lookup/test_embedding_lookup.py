"""Every implementation of ``embedding_lookup`` returns exactly the rows of the dequantized table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, embedding_lookup
from pallas_kernels.embedding_lookup import IMPLEMENTATIONS
from pallas_kernels.embedding_lookup.cases import SMALL


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("weight_format", [*FORMATS, "bf16", "f32"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_rows_are_those_of_the_table(implementation, weight_format, case, make_weight) -> None:
    v, k = SMALL[case]
    w = make_weight(weight_format, (v, k))
    table = np.asarray(w.dequantize() if weight_format in FORMATS else w, np.float32)
    # Q4K's multiply and subtract may be one rounding in one program and two in another.
    atol = 2.0**-22 * np.abs(table).max() * 2 if weight_format == "q4k" else 0
    run = jax.jit(lambda w, ids: embedding_lookup(w, ids, implementation=implementation))
    for ids in (np.int32(3), np.array([0, v - 1, 3, 3], np.int32), np.array([[1, 2]], np.uint8)):
        got = run(w, jnp.asarray(ids))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, table[ids], rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ids_outside_the_table_are_clipped(implementation: str, make_weight) -> None:
    w = make_weight("eq8_0", (5, 64))
    got = embedding_lookup(w, jnp.array([-1, 5, 1000]), implementation=implementation)
    np.testing.assert_array_equal(got, w.dequantize()[jnp.array([0, 4, 4])])
    large = jnp.arange(300 * 32, dtype=jnp.float32).reshape(300, 32)
    got = embedding_lookup(large, jnp.array([255], jnp.uint8), implementation=implementation)
    np.testing.assert_array_equal(got, large[255:256])


def test_errors_name_the_argument(make_weight) -> None:
    with pytest.raises(ValueError, match="ids has dtype float32"):
        embedding_lookup(make_weight("q6k", (5, 64)), jnp.zeros(2))
    with pytest.raises(ValueError, match="w has shape"):
        embedding_lookup(make_weight("q6k", (2, 5, 64)), jnp.zeros(2, jnp.int32))
