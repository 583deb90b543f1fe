"""Config: every published config.json is read, and what cannot be right is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.published import CONFIGS, PUBLISHED
from gemma_jax.config import GLOBAL, SLIDING, Gemma4Config
from gemma_jax.model import param_shapes


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"gemma4_{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "layers", "globals_", "hidden", "kv_heads", "global_kv_heads", "own_layers"),
    [
        ("e2b", 35, 7, 1536, 1, 1, 15),
        ("e4b", 42, 7, 2560, 2, 2, 24),
        ("12b", 48, 8, 3840, 8, 1, 48),
        ("26b_a4b", 30, 5, 2816, 8, 2, 30),
        ("31b", 60, 10, 5376, 16, 4, 60),
    ],
)
def test_published_configs_have_the_published_sizes(
    name: str,
    layers: int,
    globals_: int,
    hidden: int,
    kv_heads: int,
    global_kv_heads: int,
    own_layers: int,
) -> None:
    config = Gemma4Config.from_hf(published(name))
    assert config.num_layers == layers
    assert config.layer_types.count(GLOBAL) == globals_
    assert config.hidden_size == hidden
    assert config.kv_heads_of(config.layer_types.index(SLIDING)) == kv_heads
    assert config.kv_heads_of(config.layer_types.index(GLOBAL)) == global_kv_heads
    assert config.first_kv_shared_layer == own_layers
    assert config.final_logit_softcap == 30.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_written_config_reads_back_equal(name: str) -> None:
    config = Gemma4Config.from_hf(published(name))
    assert Gemma4Config.from_hf(config.to_hf()) == config


def test_old_and_new_names_of_the_expert_width_mean_the_same() -> None:
    old = published("26b_a4b")
    new = json.loads(json.dumps(old))
    new["text_config"]["moe_intermediate_size"] = new["text_config"].pop("expert_intermediate_size")
    assert Gemma4Config.from_hf(old) == Gemma4Config.from_hf(new)
    assert Gemma4Config.from_hf(new).moe_intermediate_size == 704


def test_global_sizes_may_come_as_per_layer_config() -> None:
    old = published("31b")["text_config"]
    new = dict(old)
    head_dim, kv_heads = new.pop("global_head_dim"), new.pop("num_global_key_value_heads")
    new["per_layer_config"] = {
        str(i): {"head_dim": head_dim, "num_key_value_heads": kv_heads}
        for i, kind in enumerate(old["layer_types"])
        if kind == GLOBAL
    }
    assert Gemma4Config.from_hf(new) == Gemma4Config.from_hf(old)


def test_kv_shared_layers_read_the_last_own_layer_of_their_type() -> None:
    config = Gemma4Config.from_hf(published("e2b"))
    assert {config.kv_source(i) for i in range(15, 35)} == {13, 14}
    assert config.kv_source(15) == 13
    assert config.kv_source(19) == 14
    assert config.ffn_size(14) == 6144
    assert config.ffn_size(15) == 12288


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "2560"}, "hidden_size"),
        ({"layer_types": ["sliding_attention"] * 41}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 42}, "linear_attention"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"num_kv_shared_layers": 42}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 38}, "num_kv_shared_layers"),
        ({"enable_moe_block": True}, "enable_moe_block"),
        ({"num_experts": 8, "enable_moe_block": True}, "top_k_experts"),
        ({"moe_intermediate_size": 4, "expert_intermediate_size": 5}, "contradictory"),
        ({"dtype": "int8"}, "dtype"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], named: str) -> None:
    text = {**published("e4b")["text_config"], **changes}
    with pytest.raises(ValueError, match=named):
        Gemma4Config.from_hf(text)


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="llama"):
        Gemma4Config.from_hf({"model_type": "llama"})


def test_an_unknown_key_is_mentioned() -> None:
    text = {**published("e4b")["text_config"], "flux_capacitor": 1}
    with pytest.warns(UserWarning, match="flux_capacitor"):
        Gemma4Config.from_hf(text)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        Gemma4Config.from_hf(tmp_path)


@pytest.mark.parametrize(("name", "kinds"), [("e2b", 4), ("e4b", 4), ("26b_a4b", 2), ("31b", 2)])
def test_layers_of_a_kind_have_parameters_of_the_same_shapes(name: str, kinds: int) -> None:
    config = Gemma4Config.from_hf(published(name))
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, spec in param_shapes(config).items():
        layer, _, rest = path.partition("/")
        layers.setdefault(layer, {})[rest] = spec.shape
    for i in range(config.num_layers):
        first = config.first_like(i)
        assert layers[f"layers_{i}"] == layers[f"layers_{first}"]
        assert config.is_global(i) == config.is_global(first)
        assert config.is_kv_shared(i) == config.is_kv_shared(first)
    assert len({config.first_like(i) for i in range(config.num_layers)}) == kinds
