"""The KV cache: what it holds, what it costs, and that it is written in place."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from bench.published import published
from gemma_jax.cache import KeysAndValues, cache_bytes, extend, init_cache, slot_positions
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import decode_step, prefill
from gemma_jax.model import Gemma4, param_shapes


def abstract_params(config: Gemma4Config, dtype: jnp.dtype = jnp.bfloat16) -> dict:
    """Parameters of `config` as shapes alone: enough to compile with, and free."""
    leaves = param_shapes(config).items()
    return unflatten_dict(
        {tuple(k.split("/")): jax.ShapeDtypeStruct(v.shape, dtype) for k, v in leaves}
    )


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.fixture(scope="module")
def e2b() -> Gemma4Config:
    return published("e2b")


def test_sliding_layers_hold_the_window_and_shared_layers_nothing(e2b: Gemma4Config) -> None:
    cache = jax.eval_shape(lambda: init_cache(e2b, 3, 8192))
    assert len(cache.layers) == 15
    for i, kv in enumerate(cache.layers):
        slots, head_dim = (8192, 512) if e2b.is_global(i) else (512, 256)
        assert kv.keys.shape == kv.values.shape == (3, slots, 1, head_dim)
    assert cache_bytes(e2b, 3, 8192) == sum(x.size * 2 for kv in cache.layers for x in kv)


def test_a_short_capacity_shortens_the_rings(e2b: Gemma4Config) -> None:
    cache = jax.eval_shape(lambda: init_cache(e2b, 1, 100))
    assert {x.shape[1] for kv in cache.layers for x in kv} == {100}


@pytest.mark.parametrize("capacity", [0, -1, 131_073])
def test_an_impossible_capacity_is_refused(e2b: Gemma4Config, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity is {capacity}"):
        init_cache(e2b, 1, capacity)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 20])
def test_slots_hold_the_last_positions(length: int) -> None:
    have = np.asarray(slot_positions(8, jnp.array([length])))[0]
    want = np.full(8, -1)
    for position in range(length):
        want[position % 8] = position
    np.testing.assert_array_equal(np.where(have < 0, -1, have), want)


@pytest.mark.parametrize("chunks", [[5], [8], [3, 1, 1, 9], [20], [1] * 11])
def test_a_ring_keeps_exactly_the_last_window_of_any_sequence_of_chunks(chunks: list[int]) -> None:
    """Two rows, the second one token shorter in the last chunk; each token's K/V is its position + 1."""
    kv = KeysAndValues(jnp.zeros((2, 8, 1, 4)), jnp.zeros((2, 8, 1, 4)))
    lengths = jnp.zeros(2, jnp.int32)
    for i, count in enumerate(chunks):
        positions = lengths[:, None] + jnp.arange(count)
        if i == len(chunks) - 1:
            positions = positions.at[1, -1].set(-1)
        new = jnp.broadcast_to((positions + 1.0)[:, :, None, None], (2, count, 1, 4))
        before = lengths
        kv, context = extend(kv, KeysAndValues(new, -new), positions, lengths, is_ring=True)
        lengths += jnp.sum(positions >= 0, axis=1)
        # Every position that some query of the chunk may see (the 8 up to it) is in its context.
        for row in range(2):
            held = {int(p) for p in context.positions[row] if p >= 0}
            first = max(0, int(before[row]) - 7)
            assert held >= set(range(first, int(lengths[row])))
            stored = np.asarray(context.kv.keys[row, :, 0, 0])
            np.testing.assert_array_equal(context.kv.values, -context.kv.keys)
            valid = np.asarray(context.positions[row]) >= 0
            np.testing.assert_array_equal(
                stored[valid], np.asarray(context.positions[row])[valid] + 1
            )
    for row in range(2):
        held = np.asarray(slot_positions(8, lengths))[row]
        np.testing.assert_array_equal(kv.keys[row, held >= 0, 0, 0], held[held >= 0] + 1)


def test_decode_updates_the_donated_cache_in_place(random_checkpoints: dict[str, Path]) -> None:
    from convert.load import load_checkpoint

    config, params, _ = load_checkpoint(random_checkpoints["e_type"])
    cache = init_cache(config, 1, 64, jnp.float32)
    where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)]
    token, active = jnp.array([5], jnp.int32), jnp.array([True])
    _, cache = decode_step(params, token, active, cache, model=Gemma4(config))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)] == where


@pytest.mark.heavy
def test_prefill_of_e2b_runs_15_of_35_layers_over_the_prompt(e2b: Gemma4Config) -> None:
    """Counted by XLA in the compiled program of the true shapes, against the sum over the weights."""
    length = 512
    cache = jax.eval_shape(lambda: init_cache(e2b, 1, 1024, jnp.float32))
    program = prefill.lower(
        abstract_params(e2b), int32(1, length), int32(1), cache, model=Gemma4(e2b)
    ).compile()
    flops = program.cost_analysis()["flops"]

    def matmul_flops(first: int, end: int) -> int:
        return sum(
            2 * length * int(np.prod(leaf.shape))
            for path, leaf in param_shapes(e2b).items()
            if path.startswith("layers_") and len(leaf.shape) == 2
            if first <= int(path.split("/")[0].removeprefix("layers_")) < end
        )

    assert matmul_flops(0, 15) <= flops <= 1.1 * matmul_flops(0, 15)
    assert flops < 0.4 * matmul_flops(0, 35)


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["e_type", "k_eq_v", "moe"])
def test_prefill_of_32k_tokens_allocates_nothing_quadratic(
    random_checkpoints: dict[str, Path], family: str
) -> None:
    import dataclasses

    config = Gemma4Config.from_hf(random_checkpoints[family])
    config = dataclasses.replace(config, max_position_embeddings=2**16)
    length = 2**15
    cache = jax.eval_shape(lambda: init_cache(config, 1, 2**16, jnp.float32))
    program = prefill.lower(
        abstract_params(config), int32(1, length), int32(1), cache, model=Gemma4(config)
    ).compile()
    # A mask alone, a byte for each pair of positions, would take 1 GiB.
    assert program.memory_analysis().temp_size_in_bytes < length**2 / 16
