"""The decoder against `transformers`, and against itself cut into chunks, steps and batches.

The goldens come from `tests/goldens/make_goldens.py`. Tolerance: float32 sums of a few hundred terms in another order
differ by about 1e-6 of their size, and eight layers of random weights amplify that up to tenfold, so 1e-4 of the
logit range leaves an order of magnitude and still shows any wrong term, which moves logits by percents of the range.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoint import FAMILIES

import pallas_kernels.attention
from convert.load import load_checkpoint
from gemma_jax import generation
from gemma_jax.cache import KVCache, init_cache
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import decode_step, prefill
from gemma_jax.model import Gemma4, Params, param_shapes

families = pytest.mark.parametrize("family", FAMILIES)
SAME = 1e-4  # of the logit range
CAPACITY = 96


@pytest.fixture(scope="module")
def loaded(random_checkpoints: dict[str, Path]) -> dict[str, tuple[Gemma4Config, Params]]:
    return {name: load_checkpoint(folder)[:2] for name, folder in random_checkpoints.items()}


@functools.partial(jax.jit, static_argnames="model")
def apply(
    params: Params, tokens: jax.Array, positions: jax.Array, cache: KVCache, *, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    return model.apply({"params": params}, tokens, positions, cache)


def full(model: Gemma4, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, T, V]`` of one pass over rows of equal length."""
    batch, length = tokens.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    cache = init_cache(model.config, batch, CAPACITY, model.dtype)
    return np.asarray(apply(params, jnp.asarray(tokens), positions, cache, model=model)[0])


def golden(data: Path, family: str) -> tuple[np.ndarray, np.ndarray, float]:
    stored = np.load(data / f"parity_{family}.npz")
    return stored["tokens"].astype(np.int32), stored["logits"], float(stored["bf16_error"])


@families
def test_float32_logits_equal_those_of_transformers(data: Path, loaded: dict, family: str) -> None:
    config, params = loaded[family]
    tokens, want, _ = golden(data, family)
    assert len(tokens) > 6 * config.sliding_window
    have = full(Gemma4(config), params, tokens[None])[0]
    assert np.abs(have - want).max() <= SAME * np.ptp(want)


@families
def test_bfloat16_loses_no_more_than_transformers_does_in_bfloat16(
    data: Path, loaded: dict, family: str
) -> None:
    config, params = loaded[family]
    tokens, want, reference_error = golden(data, family)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    have = full(Gemma4(config, jnp.bfloat16), params, tokens[None])[0]
    error = np.sqrt(np.mean((have - want) ** 2))
    assert 0 < error <= reference_error


@families
def test_ragged_rows_equal_each_row_alone(loaded: dict, family: str) -> None:
    config, params = loaded[family]
    model = Gemma4(config)
    lengths = np.array([40, 7, 1, 29], np.int32)
    tokens = np.random.default_rng(2).integers(3, config.vocab_size, (4, 40)).astype(np.int32)
    cache = init_cache(config, 4, CAPACITY, jnp.float32)
    together, cache = prefill(params, tokens, lengths, cache, model=model)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, length in enumerate(lengths):
        alone = full(model, params, tokens[row : row + 1, :length])[0, -1]
        assert np.abs(together[row] - alone).max() <= SAME * np.ptp(alone), f"row {row}"


@families
def test_prefill_and_decode_equal_one_pass(loaded: dict, family: str) -> None:
    config, params = loaded[family]
    model = Gemma4(config)
    tokens = np.random.default_rng(3).integers(3, config.vocab_size, (1, 60)).astype(np.int32)
    want = full(model, params, tokens)[0]
    prompt = 25  # two windows
    cache = init_cache(config, 1, CAPACITY, jnp.float32)
    have, cache = prefill(params, tokens[:, :prompt], np.array([prompt]), cache, model=model)
    assert np.abs(have[0] - want[prompt - 1]).max() <= SAME * np.ptp(want)
    for position in range(prompt, tokens.shape[1]):
        have, cache = decode_step(params, tokens[:, position], np.array([True]), cache, model=model)
        assert np.abs(have[0] - want[position]).max() <= SAME * np.ptp(want), position


@families
def test_chunked_prefill_equals_unchunked(
    loaded: dict, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params = loaded[family]
    model = Gemma4(config)
    lengths = np.array([61, 32, 33], np.int32)
    tokens = np.random.default_rng(4).integers(3, config.vocab_size, (3, 64)).astype(np.int32)

    def run(chunk: int) -> tuple[jax.Array, KVCache]:
        monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
        cache = init_cache(config, 3, CAPACITY, jnp.float32)
        fresh = jax.jit(prefill.__wrapped__, static_argnames="model")
        return fresh(params, tokens, lengths, cache, model=model)

    whole, whole_cache = run(64)
    chunked, chunked_cache = run(16)
    assert np.abs(chunked - whole).max() <= SAME * np.ptp(whole)
    for a, b in zip(
        jax.tree.leaves(chunked_cache.layers), jax.tree.leaves(whole_cache.layers), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_prefill_continues_what_the_cache_holds(loaded: dict) -> None:
    config, params = loaded["e_type"]
    model = Gemma4(config)
    tokens = np.random.default_rng(5).integers(3, config.vocab_size, (1, 50)).astype(np.int32)
    want = full(model, params, tokens)[0, -1]
    cache = init_cache(config, 1, CAPACITY, jnp.float32)
    _, cache = prefill(params, tokens[:, :25], np.array([25]), cache, model=model)
    have, _ = prefill(params, tokens[:, 25:], np.array([25]), cache, model=model)
    assert np.abs(have[0] - want).max() <= SAME * np.ptp(want)


def test_a_parameter_of_the_wrong_shape_is_named(loaded: dict) -> None:
    config, params = loaded["k_eq_v"]
    wrong = params | {"final_norm": jnp.ones((3,))}
    with pytest.raises(ValueError, match=r"final_norm has shape \(3,\)"):
        full(Gemma4(config), wrong, np.ones((1, 4), np.int32))


@families
def test_param_shapes_are_those_of_a_checkpoint(loaded: dict, family: str) -> None:
    config, params = loaded[family]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    have = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    assert have == {path: leaf.shape for path, leaf in param_shapes(config).items()}


@families
def test_layers_of_a_kind_are_traced_once(
    loaded: dict, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    config, params = loaded[family]
    traced = []

    def attention(*args: jax.Array, **options: Any) -> jax.Array:
        traced.append(args)
        return pallas_kernels.attention.attention(*args, **options)

    monkeypatch.setattr("gemma_jax.model.attention", attention)
    tokens = jax.ShapeDtypeStruct((3, 11), jnp.int32)  # a shape of this test alone
    cache = jax.eval_shape(lambda: init_cache(config, 3, CAPACITY))
    jax.eval_shape(functools.partial(apply, model=Gemma4(config)), params, tokens, tokens, cache)
    kinds = {(config.is_global(i), config.is_kv_shared(i)) for i in range(config.num_layers)}
    assert len(traced) == len(kinds) < config.num_layers


def test_the_scopes_of_a_program_name_each_layer(loaded: dict) -> None:
    config, params = loaded["moe"]
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, 1, CAPACITY))
    program = apply.lower(params, tokens, tokens, cache, model=Gemma4(config))
    text = program.as_text("hlo", debug_info=True)
    for i in range(config.num_layers):
        assert f"/layers_{i}/" in text, i
    for phase in ("attention", "ffn", "router", "experts", "head"):
        assert f"/{phase}/" in text, phase
