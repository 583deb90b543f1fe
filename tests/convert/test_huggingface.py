"""Finding the model's parameters among a checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoint import Tensors, random_checkpoint
from small_checkpoints import CONFIGS

from convert.huggingface import PREFIXES, Parameter, find_parameters
from convert.safetensors_source import SafetensorsSource
from gemma_jax.config import Gemma4Config
from gemma_jax.model import param_shapes


def find(folder: Path) -> list[Parameter]:
    config = Gemma4Config.from_hf(folder / "config.json")
    with SafetensorsSource(folder) as source:
        return find_parameters(source, config, param_shapes(config))


def names(parameters: list[Parameter]) -> dict[str, list[str]]:
    return {p.path: [t.name.removeprefix("model.") for t in p.tensors] for p in parameters}


def fails(folder: Path, *parts: str) -> None:
    with pytest.raises(ValueError, match=".*".join(re.escape(part) for part in parts)):
        find(folder)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_belongs_to_one_parameter(write: Callable[..., Path], family: str) -> None:
    tensors = random_checkpoint(CONFIGS[family])
    parameters = find(write(tensors, CONFIGS[family]))
    used = [t.name for p in parameters for t in p.tensors]
    assert sorted(used) == sorted(tensors)
    assert sum(p.size for p in parameters) == sum(array.size for array in tensors.values())


def test_fused_parameters_list_their_tensors_in_order(write: Callable[..., Path]) -> None:
    config = CONFIGS["e_type"]  # layers 5 to 7 have no keys and values
    found = names(find(write(random_checkpoint(config), config)))
    attention = "layers.{}.self_attn.{}_proj.weight"
    assert found["layers_0/attention/qkv"] == [attention.format(0, x) for x in "qkv"]
    assert found["layers_5/attention/qkv"] == [attention.format(5, "q")]
    assert "layers_5/attention/k_norm" not in found
    assert found["layers_3/ffn/gate_up"] == [
        f"layers.3.mlp.{x}_proj.weight" for x in ("gate", "up")
    ]


def test_layers_that_share_k_and_v_have_no_v_tensor(write: Callable[..., Path]) -> None:
    config = CONFIGS["k_eq_v"]  # layers 2 and 5 are global
    found = names(find(write(random_checkpoint(config), config)))
    attention = "layers.{}.self_attn.{}_proj.weight"
    assert found["layers_2/attention/qkv"] == [attention.format(2, x) for x in "qk"]
    assert found["layers_1/attention/qkv"] == [attention.format(1, x) for x in "qkv"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_is_recognised(
    write: Callable[..., Path], moe_tensors: Tensors, prefix: str
) -> None:
    renamed = {prefix + name.removeprefix("model."): a for name, a in moe_tensors.items()}
    assert all(t.name.startswith(prefix) for p in find(write(renamed)) for t in p.tensors)


def test_towers_and_tied_head_are_ignored(write: Callable[..., Path], moe_tensors: Tensors) -> None:
    other = np.ones((2, 2), np.float32)
    extra = {
        "model.vision_tower.encoder.weight": other,
        "model.audio_tower.x": np.arange(4),
        "model.embed_vision.embedding_projection.weight": other,
        "model.embed_audio.embedding_projection.weight": other,
        "lm_head.weight": other,
    }
    used = {t.name for p in find(write(moe_tensors | extra)) for t in p.tensors}
    assert used == set(moe_tensors)


def test_unused_keys_and_values_are_ignored_only_in_kv_shared_layers(
    write: Callable[..., Path],
) -> None:
    config = CONFIGS["e_type"]
    tensors = random_checkpoint(config)
    own = {name: a for name, a in tensors.items() if ".layers.0.self_attn." in name}
    unused = {
        name.replace("layers.0", "layers.6"): a
        for name, a in own.items()
        if re.search("(k|v)_(proj|norm)", name)
    }
    assert len(unused) == 3
    used = {t.name for p in find(write(tensors | unused, config)) for t in p.tensors}
    assert used == set(tensors)
    beyond = {name.replace("layers.6", "layers.8"): a for name, a in unused.items()}
    fails(write(tensors | beyond, config, name="beyond"), "layers.8.self_attn", "not part")


@pytest.mark.parametrize(
    "name", ["model.layers.1.experts.down_proj", "model.layers.0.layer_scalar", "model.norm.weight"]
)
def test_missing_tensor_is_named(
    write: Callable[..., Path], moe_tensors: Tensors, name: str
) -> None:
    del moe_tensors[name]
    folder = write(moe_tensors)
    fails(folder, f"'{name}'", "missing", str(folder))


def test_missing_embedding_lists_the_names_tried(
    write: Callable[..., Path], moe_tensors: Tensors
) -> None:
    del moe_tensors["model.embed_tokens.weight"]
    fails(write(moe_tensors), "embed_tokens.weight", "model.language_model.embed_tokens.weight")


def test_extra_tensor_is_named_with_its_file(
    write: Callable[..., Path], moe_tensors: Tensors
) -> None:
    extra = {"model.layers.0.self_attn.q_proj.bias": np.ones(4, np.float32)}
    folder = write(moe_tensors | extra)
    fails(folder, "'model.layers.0.self_attn.q_proj.bias'", str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.self_attn.k_proj.weight", lambda a: a[:-1]),
        ("model.layers.0.mlp.up_proj.weight", lambda a: np.concatenate([a, a])),
        ("model.layers.0.experts.gate_up_proj", lambda a: a.reshape(-1, a.shape[-1])),
        ("model.norm.weight", lambda a: a[None]),
    ],
)
def test_misshaped_tensor_names_both_shapes(
    write: Callable[..., Path], moe_tensors: Tensors, name: str, change: Callable[[Any], Any]
) -> None:
    expected = moe_tensors[name].shape
    moe_tensors[name] = np.ascontiguousarray(change(moe_tensors[name]))
    folder = write(moe_tensors)
    found = str(moe_tensors[name].shape)
    fails(folder, f"'{name}'", str(folder / "model.safetensors"), found, str(expected))


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_wrong_dtype_is_named(
    write: Callable[..., Path], moe_tensors: Tensors, dtype: type
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    moe_tensors[name] = moe_tensors[name].astype(dtype)
    fails(write(moe_tensors), f"'{name}'", "dtype", "BF16, F16, F32")
