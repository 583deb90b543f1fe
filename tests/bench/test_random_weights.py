"""Random weights are what conversion would write, in numbers that a model can be run with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.published import SMALL, published
from bench.random_weights import abstract_params, random_params
from convert.load import load_checkpoint
from convert.policy import FORMATS
from gemma_jax.cache import init_cache
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import prefill
from gemma_jax.model import Gemma4, param_shapes
from pallas_kernels.arrays import Q4K, QuantizedArray, super_block_size

BUNDLED = Path(__file__).parents[2] / "gemma_jax/checkpoints"


def described(params: Any) -> Any:
    """The structure with every plane's shape and type."""
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), jnp.dtype(leaf.dtype)), params)


@pytest.mark.parametrize(
    ("name", "weight_format"), [*(("tiny-moe", f) for f in FORMATS), ("tiny-dense", "bf16")]
)
def test_shapes_and_types_are_those_of_a_converted_checkpoint(
    name: str, weight_format: str
) -> None:
    config, converted, _ = load_checkpoint(BUNDLED / name, format=weight_format)
    made = random_params(config, weight_format)
    assert described(made) == described(converted)
    assert described(made) == described(abstract_params(config, weight_format))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("model", ["e2b", "26b_a4b"])
def test_matrices_have_the_standard_deviation_of_one_over_root_k(
    model: str, weight_format: str
) -> None:
    """Scales uniform in 0.75 .. 1.25 put the root mean square 1 % above 1.

    A sample of n weights whose blocks of 256 share a scale, and whose Q4K and Q6K integers are few, has a root mean
    square that is off by at most about 1 / sqrt(n / 256) of itself; four times that never happens.
    """
    params = random_params(narrowed(published(model)), weight_format)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedArray))
    for leaf in {(type(x), x.shape[-1]): x for x in leaves if len(x.shape) > 1}.values():
        values = jax.jit(lambda x: x.dequantize() if isinstance(x, QuantizedArray) else x)(leaf)
        rms = math.sqrt(leaf.shape[-1] * np.mean(np.asarray(values, np.float64) ** 2))
        assert abs(rms - 1.01) < 0.01 + 4 / math.sqrt(values.size / 256), leaf.shape
    for vector in (x for x in leaves if len(x.shape) == 1):
        assert (vector >= 0.75).all()
        assert (vector <= 1.25).all()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("model", ["e2b", "26b_a4b"])
def test_two_layers_of_every_kind_give_finite_logits(model: str, weight_format: str) -> None:
    """Two layers that keep the architecture's switches, narrowed to what a test has time for."""
    config = narrowed(published(model))
    params = random_params(config, weight_format)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    cache = init_cache(config, 2, 16, jnp.float32)
    logits, _ = prefill(params, tokens, jnp.array([9, 4]), cache, model=Gemma4(config))
    assert np.isfinite(logits).all()
    # Embeddings of size 1 and a norm before the head: logits of about 1, neither all equal nor saturated.
    assert 0.3 < np.std(logits) < 3


def narrowed(config: Gemma4Config) -> Gemma4Config:
    """One sliding and one global layer of the same kind; sizes in the same order, powers of two and small."""
    return Gemma4Config(
        vocab_size=512,
        vocab_size_per_layer_input=512 if config.ple_size else 0,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        layer_types=("sliding_attention", "full_attention"),
        num_heads=4,
        num_kv_heads=2,
        num_global_kv_heads=1 if config.num_global_kv_heads else None,
        head_dim=32,
        global_head_dim=64,
        sliding_window=8,
        attention_k_eq_v=config.attention_k_eq_v,
        ple_size=64 if config.ple_size else 0,
        num_experts=8 if config.num_experts else 0,
        num_experts_per_token=2 if config.num_experts else 0,
        moe_intermediate_size=96 if config.num_experts else 0,
        final_logit_softcap=config.final_logit_softcap,
    )


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    config = narrowed(published("e260m"))
    first, again, other = (random_params(config, "q4k", seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    codes = [p["layers_0"]["ffn"]["down"].codes for p in (first, other)]
    assert (codes[0] != codes[1]).mean() > 0.99


def test_no_two_parameters_are_alike() -> None:
    params = random_params(narrowed(published("e260m")), "eq8_0")
    a, b = (params[layer]["ffn"]["down"].codes for layer in ("layers_0", "layers_1"))
    assert (a != b).mean() > 0.99


def test_the_unused_nibble_of_an_odd_number_of_blocks_is_zero() -> None:
    params = random_params(narrowed(published("26b_a4b")), "q4k")
    down = params["layers_0"]["moe"]["down"]  # three blocks of 32
    assert isinstance(down, Q4K)
    assert not (down.scales_high[..., -1] >> 4).any()
    assert (down.scales_high[..., 0] >> 4).any()


def test_the_small_architecture_is_an_e_type_that_every_format_can_hold() -> None:
    config = published("e260m")
    shapes = param_shapes(config)
    assert round(sum(math.prod(s.shape) for s in shapes.values()) / 1e6) == 255
    assert config.ple_size
    assert config.num_kv_shared_layers
    # Where llama.cpp looks for the keys and values that are shared.
    own = config.first_kv_shared_layer
    assert [config.is_global(i) for i in (own - 2, own - 1)] == [False, True]
    assert config.head_dim != config.global_head_dim
    assert len(set(config.layer_types)) == 2
    # Peers have no super-blocks of less than 256.
    assert {super_block_size(s.shape[-1]) for s in shapes.values() if len(s.shape) > 1} == {256}


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=rf"'e5b'.*{SMALL[0]}"):
        published("e5b")
