"""The architecture of a Gemma 4 text decoder, read from a Hugging Face ``config.json`` and checked.

`Gemma4Config` is frozen and hashable, so it can be a static argument of `jax.jit`. Everything that differs from layer
to layer (head size, number of KV heads, FFN width, whose K/V a layer reads) is a method of the layer's index.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SLIDING = "sliding_attention"
GLOBAL = "full_attention"

# Keys that published configs carry and that say nothing about the text decoder's arithmetic.
_IGNORED_KEYS = frozenset(
    """_name_or_path _sliding_window_pattern architectures attention_bias attention_dropout
    attention_use_bidirectional attn_logit_softcapping chunk_size_feed_forward hidden_activation id2label
    initializer_range is_encoder_decoder label2id model_type output_attentions output_hidden_states per_layer_config
    problem_type query_pre_attn_scalar return_dict rope_parameters routed_layer_pattern sliding_window_pattern
    stream_and_decode_in_f32 tie_word_embeddings torch_dtype transformers_version use_bidirectional_attention
    use_cache enable_moe_block""".split()
)

# Our field: the names it goes by in config.json, newest first.
_KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "vocab_size_per_layer_input": ("vocab_size_per_layer_input",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_layers": ("num_hidden_layers",),
    "layer_types": ("layer_types",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "num_global_kv_heads": ("num_global_key_value_heads",),
    "head_dim": ("head_dim",),
    "global_head_dim": ("global_head_dim",),
    "sliding_window": ("sliding_window",),
    "attention_k_eq_v": ("attention_k_eq_v",),
    "num_kv_shared_layers": ("num_kv_shared_layers",),
    "ple_size": ("hidden_size_per_layer_input",),
    "use_double_wide_mlp": ("use_double_wide_mlp",),
    "num_experts": ("num_experts",),
    "num_experts_per_token": ("top_k_experts", "num_experts_per_tok"),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_intermediate_size"),
    "final_logit_softcap": ("final_logit_softcapping",),
    "rms_norm_eps": ("rms_norm_eps",),
    "max_position_embeddings": ("max_position_embeddings",),
    "bos_id": ("bos_token_id",),
    "eos_ids": ("eos_token_id",),
    "pad_id": ("pad_token_id",),
    "dtype": ("dtype", "torch_dtype"),
}
_REQUIRED = (
    "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim sliding_window"
).split()
_ALLOWED_ROPE = {SLIDING: "default", GLOBAL: "proportional"}
_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Gemma4Config:
    """Sizes and switches of one Gemma 4 text decoder.

    Axis letters used across the package: D `hidden_size`, F FFN width, H query heads, K KV heads, C head size, E
    experts, W expert width, P `ple_size`, L layers, V vocabulary. Source: the published ``config.json`` files and
    `transformers`' ``models/gemma4``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    global_head_dim: int
    sliding_window: int
    num_global_kv_heads: int | None = None
    vocab_size_per_layer_input: int = 0
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    ple_size: int = 0
    use_double_wide_mlp: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0
    global_rotary_factor: float = 0.25
    final_logit_softcap: float | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131_072
    bos_id: int = 2
    eos_ids: tuple[int, ...] = (1,)
    pad_id: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check(self)

    # --- what differs from layer to layer -----------------------------------------------------------------------

    def is_global(self, layer: int) -> bool:
        """Whether `layer` attends to the whole context instead of the sliding window."""
        return self.layer_types[layer] == GLOBAL

    def head_dim_of(self, layer: int) -> int:
        """Head size C of `layer`."""
        return self.global_head_dim if self.is_global(layer) else self.head_dim

    def kv_heads_of(self, layer: int) -> int:
        """Number of KV heads K of `layer`; the global override holds only in models with K = V layers."""
        if self.is_global(layer) and self.attention_k_eq_v and self.num_global_kv_heads:
            return self.num_global_kv_heads
        return self.num_kv_heads

    def shares_k_and_v(self, layer: int) -> bool:
        """Whether `layer` has no v projection and takes its values from the k projection."""
        return self.attention_k_eq_v and self.is_global(layer)

    @property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer without K/V of its own; `num_layers` where every layer has its own."""
        return self.num_layers - self.num_kv_shared_layers

    def is_kv_shared(self, layer: int) -> bool:
        """Whether `layer` reads another layer's K/V instead of computing its own."""
        return layer >= self.first_kv_shared_layer

    def kv_source(self, layer: int) -> int:
        """The layer whose K/V `layer` attends to: itself, or the last non-shared layer of its own type."""
        if not self.is_kv_shared(layer):
            return layer
        own = self.layer_types[: self.first_kv_shared_layer]
        return max(i for i, kind in enumerate(own) if kind == self.layer_types[layer])

    def first_like(self, layer: int) -> int:
        """The first layer that differs from `layer` in nothing but its parameters' values."""
        kinds = [(self.is_global(i), self.is_kv_shared(i)) for i in range(layer + 1)]
        return kinds.index(kinds[layer])

    def ffn_size(self, layer: int) -> int:
        """Width F of the dense FFN of `layer`; KV-shared layers may be twice as wide."""
        return self.intermediate_size * (
            2 if self.use_double_wide_mlp and self.is_kv_shared(layer) else 1
        )

    # --- config.json --------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> Gemma4Config:
        """Reads a ``config.json`` (a path to it or to its folder, or its parsed content).

        Accepts multimodal configs (the decoder is under ``text_config``) and text-only ones, with the key names of
        early and of current exports. Raises ValueError naming the key for a value that is missing, unknown or at odds
        with another; warns about keys it does not know.
        """
        data, where = _read(source)
        if not str(data.get("model_type", "")).startswith("gemma4"):
            raise ValueError(
                f"{where}: model_type is {data.get('model_type')!r}; expected a Gemma 4 checkpoint"
            )
        text = {**data, **data["text_config"]} if "text_config" in data else dict(data)
        inherited = set(data) if "text_config" in data else set()
        _refuse_unsupported(text, where)
        fields: dict[str, Any] = {}
        for field, names in _KEYS.items():
            present = {name: text[name] for name in names if text.get(name) is not None}
            if len(set(map(str, present.values()))) > 1:
                raise ValueError(f"{where}: contradictory values {present}")
            if present:
                fields[field] = next(iter(present.values()))
        for field in _REQUIRED:
            if field not in fields:
                raise ValueError(f"{where}: {_KEYS[field][0]} is missing")
        known = _IGNORED_KEYS.union(*_KEYS.values(), inherited)
        if unknown := sorted(key for key in text if key not in known):
            warnings.warn(f"{where}: ignoring unknown keys {', '.join(unknown)}", stacklevel=2)
        if "eos_token_id" in data and data["eos_token_id"] is not None:
            fields["eos_ids"] = data["eos_token_id"]  # the outer list also names the end of a turn
        _apply_layer_overrides(fields, text, where)
        _apply_rope(fields, text, where)
        _apply_switches(fields, text, where)
        try:
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The text-only ``config.json`` (current key names) that `from_hf` reads back to an equal config."""
        out: dict[str, Any] = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
        for field, names in _KEYS.items():
            value = getattr(self, field)
            out[names[0]] = list(value) if isinstance(value, tuple) else value
        out["enable_moe_block"] = self.num_experts > 0
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            out[key] = out[key] or None
        out["hidden_activation"] = "gelu_pytorch_tanh"
        out["tie_word_embeddings"] = True
        out["rope_parameters"] = {
            SLIDING: {"rope_type": "default", "rope_theta": self.rope_theta},
            GLOBAL: {
                "rope_type": "proportional",
                "rope_theta": self.global_rope_theta,
                "partial_rotary_factor": self.global_rotary_factor,
            },
        }
        return out


def _read(source: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return dict(source), "config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint folder needs a config.json") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data, str(path)


def _refuse_unsupported(text: Mapping[str, Any], where: str) -> None:
    """Values under which the arithmetic would differ from what the model computes."""
    accepted: dict[str, tuple[Any, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (0, 0.0),
        "use_bidirectional_attention": ("vision",),  # concerns image tokens only
        "attention_use_bidirectional": ("vision",),
        "tie_word_embeddings": (True,),
    }
    for key, values in accepted.items():
        value = text.get(key)
        if value is not None and value not in values:
            raise ValueError(
                f"{where}: {key} is {value!r}; supported: {', '.join(map(repr, values))}"
            )
    if text.get("routed_layer_pattern"):
        raise ValueError(
            f"{where}: routed_layer_pattern is {text['routed_layer_pattern']!r}; supported: none"
        )


def _apply_layer_overrides(fields: dict[str, Any], text: Mapping[str, Any], where: str) -> None:
    """Fills `layer_types`, and the global sizes that newer exports put into ``per_layer_config``."""
    fields.setdefault(
        "layer_types",
        [GLOBAL if (i + 1) % 6 == 0 else SLIDING for i in range(fields["num_layers"])],
    )
    fields["layer_types"] = tuple(fields["layer_types"])
    if "global_head_dim" not in fields:
        fields["global_head_dim"] = 512
    overrides = text.get("per_layer_config")
    if not overrides:
        return
    kinds = fields["layer_types"]
    expected = {str(i) for i, kind in enumerate(kinds) if kind == GLOBAL}
    if {str(i) for i in overrides} != expected:
        raise ValueError(
            f"{where}: per_layer_config names layers {sorted(overrides)}, full_attention layers are {sorted(expected)}"
        )
    head_dims = {o.get("head_dim", fields["head_dim"]) for o in overrides.values()}
    kv_heads = {o.get("num_key_value_heads", fields["num_kv_heads"]) for o in overrides.values()}
    unknown = {key for o in overrides.values() for key in o} - {"head_dim", "num_key_value_heads"}
    if unknown or len(head_dims) > 1 or len(kv_heads) > 1:
        raise ValueError(
            f"{where}: per_layer_config {overrides} is not the same for all full_attention layers"
        )
    fields["global_head_dim"] = head_dims.pop()
    fields["num_global_kv_heads"] = kv_heads.pop()


def _apply_rope(fields: dict[str, Any], text: Mapping[str, Any], where: str) -> None:
    for kind, rope in (text.get("rope_parameters") or {}).items():
        if kind not in _ALLOWED_ROPE:
            raise ValueError(f"{where}: rope_parameters has an unknown layer type {kind!r}")
        rope = rope or {}
        if rope.get("rope_type", _ALLOWED_ROPE[kind]) != _ALLOWED_ROPE[kind]:
            raise ValueError(
                f"{where}: rope_parameters.{kind}.rope_type is {rope['rope_type']!r}; "
                f"supported: {_ALLOWED_ROPE[kind]!r}"
            )
        name = "rope_theta" if kind == SLIDING else "global_rope_theta"
        if "rope_theta" in rope:
            fields[name] = float(rope["rope_theta"])
        if kind == GLOBAL and "partial_rotary_factor" in rope:
            fields["global_rotary_factor"] = float(rope["partial_rotary_factor"])


def _apply_switches(fields: dict[str, Any], text: Mapping[str, Any], where: str) -> None:
    enabled = text.get("enable_moe_block")
    experts = fields.get("num_experts", 0)
    if enabled is not None and bool(enabled) != bool(experts):
        raise ValueError(
            f"{where}: enable_moe_block is {enabled} but num_experts is {text.get('num_experts')}"
        )
    if fields.get("ple_size") and not fields.get("vocab_size_per_layer_input"):
        fields["vocab_size_per_layer_input"] = fields["vocab_size"]
    if not fields.get("ple_size"):
        fields["vocab_size_per_layer_input"] = 0
    eos = fields.get("eos_ids", 1)
    fields["eos_ids"] = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    fields["dtype"] = str(fields.get("dtype", "bfloat16")).removeprefix("torch.")


def _check(c: Gemma4Config) -> None:
    """Raises ValueError naming the first field that cannot be true of a Gemma 4 decoder."""
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if field.type == "int" and (
            not isinstance(value, int) or isinstance(value, bool) or value < 0
        ):
            raise ValueError(f"{field.name} is {value!r}; expected a non-negative integer")
    for name in (*_REQUIRED, "global_head_dim"):
        if getattr(c, name) == 0:
            raise ValueError(f"{name} is 0")
    if len(c.layer_types) != c.num_layers:
        raise ValueError(
            f"layer_types has {len(c.layer_types)} entries for num_hidden_layers {c.num_layers}"
        )
    if unknown := set(c.layer_types) - {SLIDING, GLOBAL}:
        raise ValueError(
            f"layer_types has unknown values {sorted(unknown)}; known: {SLIDING}, {GLOBAL}"
        )
    if c.num_kv_shared_layers >= c.num_layers:
        raise ValueError(
            f"num_kv_shared_layers is {c.num_kv_shared_layers} of {c.num_layers} layers"
        )
    own = set(c.layer_types[: c.first_kv_shared_layer])
    if missing := set(c.layer_types) - own:
        raise ValueError(
            f"num_kv_shared_layers {c.num_kv_shared_layers} leaves no {missing.pop()} layer with K/V of its own"
        )
    for layer in range(c.num_layers):
        if c.num_heads % c.kv_heads_of(layer):
            raise ValueError(
                f"num_attention_heads {c.num_heads} is not a multiple of the "
                f"{c.kv_heads_of(layer)} KV heads of layer {layer}"
            )
    if c.head_dim % 2 or c.global_head_dim % 2:
        raise ValueError(
            f"head_dim {c.head_dim} and global_head_dim {c.global_head_dim} must be even"
        )
    if not 0.0 < c.global_rotary_factor <= 1.0:
        raise ValueError(
            f"partial_rotary_factor is {c.global_rotary_factor}; expected 0 < factor <= 1"
        )
    if c.num_experts and not 0 < c.num_experts_per_token <= c.num_experts:
        raise ValueError(f"top_k_experts is {c.num_experts_per_token} of {c.num_experts} experts")
    if c.num_experts and not c.moe_intermediate_size:
        raise ValueError("moe_intermediate_size is missing for a mixture-of-experts model")
    if c.dtype not in _DTYPES:
        raise ValueError(f"dtype is {c.dtype!r}; supported: {', '.join(_DTYPES)}")
