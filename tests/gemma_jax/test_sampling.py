"""Settings of requests: what is refused, how a batch of them is stacked, and the counts that penalties read."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.sampling import Sampling, SamplingParams, stack_sampling

V = 19


def params_of(*rows: Sampling, vocab_size: int = V, limit: int = 64) -> SamplingParams:
    return stack_sampling(rows, max_new_tokens=limit, vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", {-1: 2.0}),
        ("logit_bias", {"a": 2.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("seed", -1),
        ("seed", 2**32),
        ("max_new_tokens", 0),
        ("stop_ids", 106),
        ("stop_ids", (-1,)),
        ("stop", "a bare string"),
        ("stop", ("",)),
        ("stop", (7,)),
        ("ignore_eos", "no"),
    ],
)
def test_a_bad_setting_is_refused_by_field_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}\b.*accepted"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_settings_are_frozen_hashable_and_keep_their_own_copy_of_the_bias() -> None:
    bias = {3: 1.0}
    settings = Sampling(logit_bias=bias, stop=["x"], stop_ids=[5, 2, 5])  # type: ignore[arg-type]
    bias[4] = 2.0
    assert settings.logit_bias == {3: 1.0}
    assert settings.stop == ("x",)
    assert settings.stop_ids == (2, 5)
    assert len({settings, dataclasses.replace(settings)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.top_k = 3  # type: ignore[misc]


def test_stacked_settings_have_padded_arrays_of_the_stated_types() -> None:
    params = params_of(
        Sampling(),
        Sampling(seed=2**32 - 1, stop_ids=(1, 2, 3), max_new_tokens=7, ignore_eos=True),
        Sampling(logit_bias={4: -math.inf}, max_new_tokens=1000),
    )
    np.testing.assert_array_equal(params.stop_ids, [[-1] * 4, [1, 2, 3, -1], [-1] * 4])
    np.testing.assert_array_equal(params.bias_values, [[0.0], [0.0], [-np.inf]])
    assert params.bias_ids[2, 0] == 4
    assert np.all(np.asarray(params.bias_ids[:2]) > 2**30)
    np.testing.assert_array_equal(params.max_new_tokens, [64, 7, 64])
    np.testing.assert_array_equal(params.seed, np.array([0, 0xFFFFFFFF, 0], np.uint32))
    np.testing.assert_array_equal(params.ignore_eos, [False, True, False])
    types = {field.name: getattr(params, field.name).dtype for field in dataclasses.fields(params)}
    integers = {"top_k", "max_new_tokens", "stop_ids", "bias_ids"}
    others = {"seed": jnp.uint32, "ignore_eos": jnp.bool_}
    for name, dtype in types.items():
        assert dtype == others.get(name, jnp.int32 if name in integers else jnp.float32), name


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9])
def test_padded_widths_are_the_next_power_of_two(count: int) -> None:
    ids = tuple(range(count))
    params = params_of(Sampling(stop_ids=ids, logit_bias=dict.fromkeys(ids, 1.0)))
    expected = next(width for width in (1, 2, 4, 8, 16) if width >= count)
    assert params.stop_ids.shape == params.bias_ids.shape == (1, expected)
    assert len(np.unique(np.asarray(params.bias_ids))) == expected


def test_stacking_names_the_row_and_field_of_an_id_outside_the_vocabulary() -> None:
    for name, row in (
        ("logit_bias", Sampling(logit_bias={V: 1.0})),
        ("stop_ids", Sampling(stop_ids=(V,))),
    ):
        with pytest.raises(ValueError, match=rf"rows\[1\]\.{name}: got token id {V}\b"):
            params_of(Sampling(), row)
    with pytest.raises(ValueError, match="rows: got none"):
        params_of()
