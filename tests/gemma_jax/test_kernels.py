"""Whole decode steps through the hand-written kernels, emulated on a CPU, beside XLA on the same numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_jax
from bench.published import published
from bench.random_weights import random_params
from gemma_jax.cache import init_cache
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import decode_step
from gemma_jax.model import Gemma4, Params
from gemma_jax.parameters import pack_params
from pallas_kernels import PackedArray, lanes


def _small(model: str) -> Gemma4Config:
    """An architecture of the family with two layers of few, narrow matrices."""
    config = published(model, 2)
    return dataclasses.replace(
        config,
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size=256,
        intermediate_size=256,
        use_double_wide_mlp=False,
        num_heads=2,
        num_kv_heads=1,
        num_global_kv_heads=1,
        head_dim=128,
        global_head_dim=256,
        ple_size=64 if config.ple_size else 0,
        num_experts=4 if config.num_experts else 0,
        num_experts_per_token=2 if config.num_experts else 0,
        moe_intermediate_size=64 if config.num_experts else 0,
    )


def _copy(params: Params) -> Params:
    return jax.tree.map(lambda x: x, params)


@pytest.mark.heavy
@pytest.mark.parametrize(("model", "weight_format"), [("e4b", "q4k"), ("26b_a4b", "eq8_0")])
def test_a_decode_step_through_the_kernels_equals_xla(model: str, weight_format: str) -> None:
    config = _small(model)
    params = random_params(config, weight_format)
    packed = pack_params(_copy(params))
    assert any(isinstance(x, PackedArray) for x in jax.tree.leaves(packed, is_leaf=_is_packed))
    token, active = jnp.asarray([17]), jnp.ones(1, bool)

    def logits(params: Params, implementation: tuple[str, ...]) -> np.ndarray:
        decoder = Gemma4(config, jnp.bfloat16, implementation)
        cache = init_cache(config, 1, 64, jnp.bfloat16)
        return np.asarray(decode_step(params, token, active, cache, model=decoder)[0][0])

    want = logits(params, ("xla",))
    with lanes.interpreted():
        got = logits(packed, ("mosaic", "xla"))
    # Both round the same activations to bfloat16; sums in another order may flip a rounding here and there.
    assert np.max(np.abs(got - want)) < 2 * float(jnp.finfo(jnp.bfloat16).eps) * np.ptp(want)
    assert np.argmax(got) == np.argmax(want)


@pytest.mark.heavy
def test_rows_decode_through_the_attention_kernel_as_through_xla() -> None:
    """Own, tied and shared keys and values, rows that pause, and rings of 4 slots that wrap around."""
    config = dataclasses.replace(
        _small("12b"),
        num_layers=4,
        layer_types=("sliding_attention", "full_attention") * 2,
        num_kv_shared_layers=2,
        sliding_window=4,
    )
    params = random_params(config, "eq8_0")  # not packed: no kernel takes them but attention's
    tokens = jax.random.randint(jax.random.key(3), (6, 2), 0, config.vocab_size)
    active = jax.random.bernoulli(jax.random.key(4), 0.8, tokens.shape)

    def steps(
        *implementation: str, dtype: jnp.dtype = jnp.bfloat16
    ) -> tuple[np.ndarray, jax.Array]:
        decoder = Gemma4(config, dtype, implementation)
        cache, logits = init_cache(config, 2, 16, dtype), []
        for token, on in zip(tokens, active, strict=True):
            step, cache = decode_step(params, token, on, cache, model=decoder)
            logits.append(np.where(on[:, None], step, 0))
        return np.stack(logits), cache.lengths

    exact, _ = steps("xla", dtype=jnp.float32)
    by_xla, lengths = steps("xla")
    with lanes.interpreted():
        got, same_lengths = steps("mosaic", "xla")
    assert np.array_equal(lengths, same_lengths)
    assert len(tokens) > max(lengths) > config.sliding_window
    # What flips a rounding in one step moves all later ones, so each step is held to what bfloat16 loses there by XLA.
    lost, allowed = (np.max(np.abs(x - exact), axis=(1, 2)) for x in (got, by_xla))
    assert np.all(lost < 2 * allowed), (lost, allowed)


def _is_packed(x: object) -> bool:
    return isinstance(x, PackedArray)


def test_packing_empties_what_it_is_given_and_leaves_tables_that_are_only_looked_up() -> None:
    params = random_params(_small("e4b"), "q4k")
    table = params["ple"]["embedding"]
    copy = {
        name: dict(group) if isinstance(group, dict) else group for name, group in params.items()
    }
    packed = pack_params(copy)
    assert copy == {}
    assert packed["ple"]["embedding"] is table
    assert isinstance(packed["embed"]["weight"], PackedArray)
    assert packed["final_norm"] is params["final_norm"]


def test_loading_for_the_kernels_packs_the_same_weights() -> None:
    plain = gemma_jax.load("tiny-dense", format="eq8_0")
    packed = gemma_jax.load("tiny-dense", format="eq8_0", implementation=("mosaic", "xla"))
    assert packed.model.implementation == ("mosaic", "xla")
    before, after = (lm.params["layers_0"]["attention"]["o"] for lm in (plain, packed))
    assert isinstance(after, PackedArray)
    assert np.array_equal(after.dequantize(), before.dequantize())
