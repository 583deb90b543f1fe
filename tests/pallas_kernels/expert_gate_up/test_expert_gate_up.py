"""Every implementation of ``expert_gate_up`` against its definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, expert_gate_up, lanes, pack_array, prefill_matmul
from pallas_kernels.decode_matmul import Config
from pallas_kernels.expert_gate_up import IMPLEMENTATIONS, mosaic
from pallas_kernels.expert_gate_up.cases import SMALL


def _arguments(case: str, tokens: int, weight_format: str, make_weight):
    e, f, k, per_token = SMALL[case]
    rng = np.random.default_rng(4)
    # Gates of a few units either way, where GELU bends.
    x = jnp.asarray(rng.standard_normal((tokens, k)) * 2 / np.sqrt(k), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, e, (tokens, per_token)), jnp.int32)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, tokens), jnp.float32)
    return x, make_weight(weight_format, (e, 2 * f, k)), ids, scale


def _check(got, x, w, ids, scale, per_weight: np.ndarray, bf16_rounding: float) -> None:
    """`per_weight`: per |x|, the tolerance of a sum, ``[E, 2 F, K]``."""
    values = np.asarray(w.dequantize() if hasattr(w, "dequantize") else w, np.float64)
    x64 = np.asarray(x, np.float64) * np.asarray(scale, np.float64)[:, None]
    gate, up = np.split(np.einsum("tk,tjnk->tjn", x64, values[ids]), 2, axis=-1)
    off = np.einsum("tk,tjnk->tjn", np.abs(x64), per_weight[ids])
    off_gate, off_up = np.split(off, 2, axis=-1)
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    want = gelu * up
    # GELU is nowhere steeper than 1.13. The float32 that goes into it and out of it has at least 20 bits.
    tolerance = 1.13 * off_gate * (np.abs(up) + off_up) + np.abs(gelu) * off_up
    tolerance += (bf16_rounding + 2.0**-20) * (np.abs(want) + tolerance) + 2.0**-20 * np.abs(up)
    assert (got.shape, got.dtype) == (want.shape, jnp.bfloat16)
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= tolerance)


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
    x, w, ids, scale = _arguments(case, tokens, weight_format, make_weight)
    got = expert_gate_up(x, w, ids, scale, implementation=implementation)
    # Beyond 16 rows the weights are dequantized to bfloat16.
    rounding = bf16_rounding if ids.size > 16 else 0
    per_weight = (sum_tolerance(w.shape[-1]) + rounding) * magnitudes(w)
    _check(got, x, w, ids, scale, per_weight, bf16_rounding)


@pytest.mark.parametrize(
    ("weight_format", "case", "tokens", "config"),
    [
        ("q4k", "small_256", 2, None),
        ("q4k", "small_256", 3, Config(tiles=2, warpgroups=2, ctas=2)),
        ("q4k", "small_192", 2, Config(tiles=4, warpgroups=1, ctas=1, units=2)),
        ("eq8_0", "small_192", 2, Config(tiles=2, warpgroups=1, ctas=2)),
        ("bf16", "small_192", 2, Config(tiles=2, warpgroups=1, ctas=2)),
        ("q4k", "small_192", 23, Config(tiles=2, warpgroups=1, ctas=2)),
        ("bf16", "small_256", 34, Config(tiles=4, warpgroups=1, ctas=2)),
    ],
)
def test_mosaic_equals_its_definition_lane_by_lane(
    weight_format, case, tokens, config, make_weight, kernel_tolerance, bf16_rounding
) -> None:
    """2 tokens are single blocks; 23 and 34 have more than 64 experts between them: blocks of 16."""
    x, w, ids, scale = _arguments(case, tokens, weight_format, make_weight)
    packed = pack_array(w) if weight_format in FORMATS else w
    with lanes.interpreted():
        got = jax.jit(lambda *a: mosaic.expert_gate_up(*a, config))(x, packed, ids, scale)
    _check(got, x, w, ids, scale, kernel_tolerance(w), bf16_rounding)


@pytest.mark.parametrize("weight_format", ["q4k", "eq8_0", "bf16"])
def test_many_tokens_on_hopper_are_multiplied_by_rounded_weights(
    weight_format, make_weight, magnitudes, sum_tolerance, bf16_rounding
) -> None:
    """24 tokens have 72 of 4 experts between them."""
    x, w, ids, scale = _arguments("small_192", 24, weight_format, make_weight)
    packed = pack_array(w) if weight_format in FORMATS else w
    with lanes.interpreted():
        assert isinstance(mosaic.default_config(x, packed, ids, scale), prefill_matmul.Config)
        got = jax.jit(lambda *a: expert_gate_up(*a, implementation="mosaic"))(x, packed, ids, scale)
    per_weight = (sum_tolerance(w.shape[-1]) + bf16_rounding) * magnitudes(w)
    _check(got, x, w, ids, scale, per_weight, bf16_rounding)


def test_ids_outside_the_experts_are_clipped(make_weight) -> None:
    x, w, _, scale = _arguments("small_192", 1, "q4k", make_weight)
    outside, inside = (jnp.array([ids], jnp.int32) for ids in ([-1, 9], [0, 3]))
    np.testing.assert_array_equal(
        expert_gate_up(x, w, outside, scale), expert_gate_up(x, w, inside, scale)
    )


def test_no_tokens_are_no_work(make_weight) -> None:
    x, w, ids, scale = _arguments("small_192", 0, "q4k", make_weight)
    assert expert_gate_up(x, w, ids, scale).shape == (0, 3, 16)


def test_errors_name_the_argument(make_weight) -> None:
    x, w, ids, scale = _arguments("small_192", 2, "q4k", make_weight)
    with pytest.raises(ValueError, match=r"x \(2, 64\) and w \(4, 32, 192\): expected \[T, K\]"):
        expert_gate_up(x[:, :64], w, ids, scale)
    with pytest.raises(ValueError, match=r"expert_ids is int32\[1, 3\]: expected int32\[2, J\]"):
        expert_gate_up(x, w, ids[:1], scale)
    with pytest.raises(ValueError, match=r"scale is float32\[1\]: expected float32\[2\]"):
        expert_gate_up(x, w, ids, scale[:1])
    with pytest.raises(ValueError, match="w is Q4K in the order of its rows: pack it"):
        expert_gate_up(x, w, ids, scale, implementation="mosaic")
    with pytest.raises(ValueError, match=r"expected \[E, 2 F, K\] with F a multiple of 16"):
        expert_gate_up(x, jnp.zeros((4, 48, 192), x.dtype), ids, scale, implementation="mosaic")
    assert list(IMPLEMENTATIONS) == ["xla", "mosaic", "reference"]
