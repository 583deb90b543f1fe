"""Every implementation of ``expert_matmul`` against the product of each row with its own expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, expert_matmul, pack_array
from pallas_kernels.expert_matmul import xla
from pallas_kernels.expert_matmul.cases import SMALL

# Mosaic kernels take packed weights and are in test_mosaic.
IMPLEMENTATIONS = ("xla", "reference")


def _check(got, x, w, ids, magnitudes, tolerance: float) -> None:
    values = np.asarray(w.dequantize() if hasattr(w, "dequantize") else w, np.float64)
    sizes = magnitudes(w)
    x64 = np.asarray(x, np.float64)
    want = np.einsum("mk,mnk->mn", x64, values[ids])
    scale = np.einsum("mk,mnk->mn", np.abs(x64), sizes[ids])
    assert np.all(np.abs(got - want) <= tolerance * scale)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("weight_format", [*FORMATS, "bf16", "f32"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_every_row_meets_its_own_expert(
    implementation, weight_format, case, make_weight, magnitudes, sum_tolerance, bf16_rounding
) -> None:
    e, n, k, _ = SMALL[case]
    w = make_weight(weight_format, (e, n, k))
    rng = np.random.default_rng(9)
    run = jax.jit(lambda x, w, ids: expert_matmul(x, w, ids, implementation=implementation))
    for rows, dtype in (
        (1, jnp.float32),
        (16, jnp.bfloat16),
        (17, jnp.float32),
        (50, jnp.bfloat16),
    ):
        x = jnp.asarray(rng.standard_normal((rows, k)), dtype)
        ids = rng.integers(0, e, rows).astype(np.int32)
        got = run(x, w, ids)
        assert (got.shape, got.dtype) == ((rows, n), jnp.float32)
        rounded = dtype == jnp.bfloat16 and rows > 16 and weight_format in FORMATS
        _check(got, x, w, ids, magnitudes, sum_tolerance(k) + (bf16_rounding if rounded else 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [3, 30])
def test_packed_weights_are_the_same_numbers(implementation, rows: int, make_weight) -> None:
    w = make_weight("q4k", (3, 16, 64))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((rows, 64)), jnp.float32)
    ids = jnp.arange(rows) % 3
    plain, packed = (
        expert_matmul(x, w, ids, implementation=implementation) for w in (w, pack_array(w))
    )
    np.testing.assert_array_equal(plain, packed)


@pytest.mark.parametrize("block_m", [1, 4, 8, 64])
@pytest.mark.parametrize(
    "ids",
    [
        [3] * 24,
        [0, 5] * 12,
        [5, 4, 3, 2, 1, 0] * 4,
        [0] * 8 + [1] * 16,
        [0] * 9 + [5] * 15,
    ],
    ids=["one_expert", "first_and_last", "all_unsorted", "full_blocks", "one_row_over"],
)
def test_grouping_is_right_for_any_spread_of_experts(
    ids, block_m, make_weight, magnitudes, sum_tolerance
) -> None:
    w = make_weight("eq8_0", (6, 5, 64))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((24, 64)), jnp.float32)
    config = xla.Config(max_wordwise_rows=0, block_m=block_m)
    got = jax.jit(lambda x, ids: xla.expert_matmul(x, w, ids, config))(x, jnp.array(ids, jnp.int32))
    _check(got, x, w, np.array(ids), magnitudes, sum_tolerance(64))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [3, 30])
def test_ids_outside_the_experts_are_clipped(implementation: str, rows: int, make_weight) -> None:
    w = make_weight("eq8_0", (3, 4, 64))
    x = jnp.ones((rows, 64))
    ids = jnp.resize(jnp.array([-1, 3, 99], jnp.int32), rows)
    inside = expert_matmul(x, w, jnp.clip(ids, 0, 2), implementation=implementation)
    np.testing.assert_array_equal(expert_matmul(x, w, ids, implementation=implementation), inside)


def test_more_rows_never_mean_all_experts_at_once(make_weight) -> None:
    """64 experts, 32 rows: the padded rows, their results and two dequantized experts at most, not 64."""
    e, n, k = 64, 128, 256
    x, ids = jnp.ones((32, k)), jnp.zeros(32, jnp.int32)
    w = make_weight("q4k", (e, n, k))
    compiled = {
        name: jax.jit(lambda *a, name=name: expert_matmul(*a, implementation=name)).lower(x, w, ids)
        for name in IMPLEMENTATIONS
    }
    temporary = {
        name: v.compile().memory_analysis().temp_size_in_bytes for name, v in compiled.items()
    }
    padded = (32 + 32 // 8) * 8
    assert temporary["xla"] <= 4 * (padded * (k + n) + 2 * n * k)
    assert temporary["reference"] >= e * n * k * 4


def test_errors_name_the_argument(make_weight) -> None:
    w = make_weight("q4k", (3, 6, 64))
    ids = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"x \(2, 32\) and w \(3, 6, 64\)"):
        expert_matmul(jnp.zeros((2, 32)), w, ids)
    with pytest.raises(ValueError, match=r"expert_ids is int32\[3\]: expected int32\[2\]"):
        expert_matmul(jnp.zeros((2, 64)), w, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="expert_ids is float32"):
        expert_matmul(jnp.zeros((2, 64)), w, jnp.zeros(2))
    with pytest.raises(ValueError, match="x has dtype int32"):
        expert_matmul(jnp.zeros((2, 64), jnp.int32), w, ids)
    with pytest.raises(ValueError, match="'mosaic' cannot serve this: x has dtype float32"):
        expert_matmul(jnp.zeros((2, 64)), w, ids, implementation="mosaic")
    with pytest.raises(ValueError, match="w is Q4K in the order of its rows: pack it"):
        expert_matmul(jnp.zeros((2, 64), jnp.bfloat16), w, ids, implementation="mosaic")
    none = jnp.zeros((0, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="there are no rows"):
        expert_matmul(none, w, ids[:0], implementation="mosaic")
