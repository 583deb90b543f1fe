"""Random, well-conditioned Gemma 4 checkpoints of three families, made by numpy alone.

The same seed gives the same weights to `make_goldens.py` (which runs `transformers` on them) and to the tests (which
run this package), so that the goldens need to hold tokens and logits only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "architectures": ["Gemma4ForCausalLM"],
    "dtype": "float32",
    "vocab_size": 160,
    "vocab_size_per_layer_input": 160,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 12,
    "max_position_embeddings": 4096,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
}


def _layers(pattern: str) -> dict[str, Any]:
    kinds = {"s": "sliding_attention", "g": "full_attention"}
    return {"layer_types": [kinds[c] for c in pattern], "num_hidden_layers": len(pattern)}


FAMILIES: dict[str, dict[str, Any]] = {
    # Per-layer embeddings, KV-shared layers of both types, double-wide FFN.
    "e_type": _COMMON
    | _layers("ssgsgssg")
    | {
        "intermediate_size": 96,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "attention_k_eq_v": False,
    },
    # K = V in the global layers, with fewer KV heads there.
    "k_eq_v": _COMMON
    | _layers("ssgssg")
    | {"intermediate_size": 128, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    # Experts beside a dense FFN; widths that 256 does not divide.
    "moe": _COMMON
    | _layers("sgsg")
    | {
        "intermediate_size": 96,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
}


def random_checkpoint(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Tensors in the published layout (``model.layers.N.…``), float32 arrays of values that bfloat16 holds exactly.

    Matrices are normal with variance 1 / fan-in, so activations stay of order one through any depth; norms and
    scalars are spread around one, so that a forgotten one shows.
    """
    rng = np.random.default_rng(seed)
    hidden, ple = config["hidden_size"], config["hidden_size_per_layer_input"]
    layers = config["num_hidden_layers"]
    tensors: Tensors = {}

    def matrix(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[-1])
        tensors[f"model.{name}"] = _bf16_values(values)

    def vector(name: str, size: int) -> None:
        tensors[f"model.{name}"] = _bf16_values(rng.uniform(0.6, 1.4, size))

    matrix("embed_tokens.weight", config["vocab_size"], hidden)
    vector("norm.weight", hidden)
    if ple:
        matrix("embed_tokens_per_layer.weight", config["vocab_size_per_layer_input"], layers * ple)
        matrix("per_layer_model_projection.weight", layers * ple, hidden)
        vector("per_layer_projection_norm.weight", ple)
    for i in range(layers):
        _layer(config, i, matrix, vector)
    return tensors


def _layer(config: dict[str, Any], i: int, matrix: Any, vector: Any) -> None:
    hidden, ple = config["hidden_size"], config["hidden_size_per_layer_input"]
    is_global = config["layer_types"][i] == "full_attention"
    tied = config["attention_k_eq_v"] and is_global
    head_dim = config["global_head_dim"] if is_global else config["head_dim"]
    kv_heads = config["num_global_key_value_heads"] if tied else config["num_key_value_heads"]
    heads, layer = config["num_attention_heads"], f"layers.{i}"
    shared = i >= config["num_hidden_layers"] - config.get("num_kv_shared_layers", 0)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        vector(f"{layer}.{norm}_layernorm.weight", hidden)
    vector(f"{layer}.layer_scalar", 1)
    matrix(f"{layer}.self_attn.q_proj.weight", heads * head_dim, hidden)
    vector(f"{layer}.self_attn.q_norm.weight", head_dim)
    if not shared:
        matrix(f"{layer}.self_attn.k_proj.weight", kv_heads * head_dim, hidden)
        vector(f"{layer}.self_attn.k_norm.weight", head_dim)
        if not tied:
            matrix(f"{layer}.self_attn.v_proj.weight", kv_heads * head_dim, hidden)
    matrix(f"{layer}.self_attn.o_proj.weight", hidden, heads * head_dim)
    width = config["intermediate_size"] * (2 if shared and config.get("use_double_wide_mlp") else 1)
    matrix(f"{layer}.mlp.gate_proj.weight", width, hidden)
    matrix(f"{layer}.mlp.up_proj.weight", width, hidden)
    matrix(f"{layer}.mlp.down_proj.weight", hidden, width)
    if config.get("enable_moe_block"):
        experts, expert_width = config["num_experts"], config["moe_intermediate_size"]
        matrix(f"{layer}.router.proj.weight", experts, hidden)
        vector(f"{layer}.router.scale", hidden)
        vector(f"{layer}.router.per_expert_scale", experts)
        matrix(f"{layer}.experts.gate_up_proj", experts, 2 * expert_width, hidden)
        matrix(f"{layer}.experts.down_proj", experts, hidden, expert_width)
        for norm in (
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
        ):
            vector(f"{layer}.{norm}.weight", hidden)
    if ple:
        matrix(f"{layer}.per_layer_input_gate.weight", ple, hidden)
        matrix(f"{layer}.per_layer_projection.weight", hidden, ple)
        vector(f"{layer}.post_per_layer_input_norm.weight", hidden)


def _bf16_values(x: np.ndarray) -> np.ndarray:
    """Rounds to bfloat16 (half up), so that a bfloat16 copy of the checkpoint is the same checkpoint."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Writes ``config.json`` and ``model.safetensors`` of a random checkpoint into a new folder."""
    import json

    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_checkpoint(config, seed), folder / "model.safetensors", {"format": "pt"})
    return folder
