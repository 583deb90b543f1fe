"""Every implementation of ``expert_down`` against its definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, expert_down, lanes, pack_array, prefill_matmul
from pallas_kernels.decode_matmul import Config
from pallas_kernels.expert_down import mosaic
from pallas_kernels.expert_down.cases import SMALL


def _arguments(case: str, tokens: int, weight_format: str, make_weight):
    e, n, f, per_token = SMALL[case]
    rng = np.random.default_rng(6)
    h = jnp.asarray(rng.standard_normal((tokens, per_token, f)), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, e, (tokens, per_token)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, (tokens, per_token)), jnp.float32)
    return h, make_weight(weight_format, (e, n, f)), ids, weights


def _check(got, h, w, ids, weights, per_weight: np.ndarray) -> None:
    """`per_weight`: per |h|, the tolerance of a sum, ``[E, N, F]``."""
    values = np.asarray(w.dequantize() if hasattr(w, "dequantize") else w, np.float64)
    weighted = np.asarray(h, np.float64) * np.asarray(weights, np.float64)[..., None]
    want = np.einsum("tjf,tjnf->tn", weighted, values[ids])
    tolerance = np.einsum("tjf,tjnf->tn", np.abs(weighted), per_weight[ids])
    assert (got.shape, got.dtype) == (want.shape, jnp.float32)
    assert np.all(np.abs(np.asarray(got) - want) <= tolerance)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("weight_format", ["q4k", "eq8_0", "bf16"])
@pytest.mark.parametrize("implementation", ["xla", "reference", None])
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_equals_its_definition(
    implementation,
    weight_format,
    case,
    tokens,
    make_weight,
    magnitudes,
    sum_tolerance,
    bf16_rounding,
) -> None:
    h, w, ids, weights = _arguments(case, tokens, weight_format, make_weight)
    got = expert_down(h, w, ids, weights, implementation=implementation)
    # Beyond 16 rows the weights are dequantized to bfloat16.
    rounding = bf16_rounding if ids.size > 16 else 0
    terms = w.shape[-1] * ids.shape[1]
    _check(got, h, w, ids, weights, (sum_tolerance(terms) + rounding) * magnitudes(w))


@pytest.mark.parametrize(
    ("weight_format", "case", "tokens", "config"),
    [
        ("q4k", "small_256", 2, None),
        ("q4k", "small_256", 3, Config(tiles=2, warpgroups=2, ctas=2)),
        ("q4k", "small_704", 1, Config(tiles=1, warpgroups=1, ctas=2, units=3)),
        ("eq8_0", "small_704", 2, Config(tiles=4, warpgroups=1, ctas=2, units=2)),
        ("bf16", "small_704", 1, Config(tiles=2, warpgroups=1, ctas=1)),
        ("q4k", "small_256", 33, Config(tiles=2, warpgroups=1, ctas=2)),
    ],
)
def test_mosaic_equals_its_definition_lane_by_lane(
    weight_format, case, tokens, config, make_weight, kernel_tolerance, sum_tolerance
) -> None:
    """33 tokens have 66 experts between them: ``expert_matmul`` and a sum."""
    h, w, ids, weights = _arguments(case, tokens, weight_format, make_weight)
    packed = pack_array(w) if weight_format in FORMATS else w
    with lanes.interpreted():
        got = jax.jit(lambda *a: mosaic.expert_down(*a, config))(h, packed, ids, weights)
    longer = sum_tolerance(w.shape[-1] * ids.shape[1]) / sum_tolerance(w.shape[-1])
    _check(got, h, w, ids, weights, longer * kernel_tolerance(w))


def test_many_tokens_on_hopper_are_multiplied_by_rounded_weights(
    make_weight, magnitudes, sum_tolerance, bf16_rounding
) -> None:
    """24 tokens have 72 of 4 experts between them."""
    h, w, ids, weights = _arguments("small_704", 24, "q4k", make_weight)
    packed = pack_array(w)
    with lanes.interpreted():
        assert isinstance(mosaic.default_config(h, packed, ids, weights), prefill_matmul.Config)
        run = jax.jit(lambda *a: expert_down(*a, implementation="mosaic"))
        got = run(h, packed, ids, weights)
    terms = w.shape[-1] * ids.shape[1]
    _check(got, h, w, ids, weights, (sum_tolerance(terms) + bf16_rounding) * magnitudes(w))


def test_mosaic_adds_in_one_order(make_weight) -> None:
    """Another number of CTAs is another timing and the same bits."""
    h, w, ids, weights = _arguments("small_256", 2, "bf16", make_weight)
    with lanes.interpreted():
        one, other = (
            jax.jit(lambda *a, ctas=ctas: mosaic.expert_down(*a, Config(1, 1, ctas)))(
                h, w, ids, weights
            )
            for ctas in (1, 3)
        )
    np.testing.assert_array_equal(one, other)


def test_no_tokens_are_no_work(make_weight) -> None:
    h, w, ids, weights = _arguments("small_256", 0, "q4k", make_weight)
    assert expert_down(h, w, ids, weights).shape == (0, 32)


def test_errors_name_the_argument(make_weight) -> None:
    h, w, ids, weights = _arguments("small_256", 2, "q4k", make_weight)
    with pytest.raises(ValueError, match=r"h \(2, 2, 64\) and w \(6, 32, 256\): expected \[T, J,"):
        expert_down(h[..., :64], w, ids, weights)
    with pytest.raises(ValueError, match=r"expert_ids is int32\[2, 1\]: expected int32\[2, 2\]"):
        expert_down(h, w, ids[:, :1], weights)
    with pytest.raises(ValueError, match=r"weights is float32\[1, 2\]: expected float32\[2, 2\]"):
        expert_down(h, w, ids, weights[:1])
    with pytest.raises(ValueError, match="w is Q4K in the order of its rows: pack it"):
        expert_down(h, w, ids, weights, implementation="mosaic")
