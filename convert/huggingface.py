"""Which Hugging Face tensors make up each parameter, and whether a checkpoint holds them in the right shapes.

`SHARED` and `LAYER` are the one table of names. Parameters made of several tensors (q, k and v; gate and up) are
those tensors one after the other along the rows.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from convert.safetensors_source import READABLE_DTYPES, SafetensorsSource, TensorInfo
from gemma_jax.config import Gemma4Config

# Parameter path -> tensor names below the decoder's prefix.
SHARED: dict[str, tuple[str, ...]] = {
    "embed/weight": ("embed_tokens.weight",),
    "ple/embedding": ("embed_tokens_per_layer.weight",),
    "ple/projection": ("per_layer_model_projection.weight",),
    "ple/norm": ("per_layer_projection_norm.weight",),
    "final_norm": ("norm.weight",),
}
# Path below layers_{i} -> tensor names below layers.{i}.
LAYER: dict[str, tuple[str, ...]] = {
    "input_norm": ("input_layernorm.weight",),
    "post_attention_norm": ("post_attention_layernorm.weight",),
    "pre_ffn_norm": ("pre_feedforward_layernorm.weight",),
    "post_ffn_norm": ("post_feedforward_layernorm.weight",),
    "layer_scalar": ("layer_scalar",),
    "attention/qkv": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "attention/o": ("self_attn.o_proj.weight",),
    "attention/q_norm": ("self_attn.q_norm.weight",),
    "attention/k_norm": ("self_attn.k_norm.weight",),
    "ffn/gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn/down": ("mlp.down_proj.weight",),
    "moe/router": ("router.proj.weight",),
    "moe/router_scale": ("router.scale",),
    "moe/per_expert_scale": ("router.per_expert_scale",),
    "moe/gate_up": ("experts.gate_up_proj",),
    "moe/down": ("experts.down_proj",),
    "moe/pre_norm": ("pre_feedforward_layernorm_2.weight",),
    "moe/dense_post_norm": ("post_feedforward_layernorm_1.weight",),
    "moe/post_norm": ("post_feedforward_layernorm_2.weight",),
    "ple/gate": ("per_layer_input_gate.weight",),
    "ple/projection": ("per_layer_projection.weight",),
    "ple/post_norm": ("post_per_layer_input_norm.weight",),
}
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")

# Other modalities, whatever they are nested in, and the head, which is the embedding's own tensor.
_OTHER_PARTS = re.compile(
    r"^(model\.|language_model\.)*(vision_tower|audio_tower|embed_vision|embed_audio|lm_head)\."
)
_KEY_OR_VALUE = re.compile(r"^layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of the model and the checkpoint's tensors that it consists of, in the order of its rows.

    `shape` is the parameter's own, `dtype` the one it has in the checkpoint (the widest of its tensors').
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[TensorInfo, ...]

    @property
    def group(self) -> str:
        """The top-level key of the parameter tree: what is stored together."""
        return self.path.split("/")[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def find_parameters(
    source: SafetensorsSource,
    config: Gemma4Config,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> list[Parameter]:
    """The model's parameters in the tensors of a Hugging Face checkpoint.

    Vision and audio towers, the tied head and the k/v tensors that KV-shared layers carry but never use are ignored.

    Args:
        source: the checkpoint.
        config: its architecture.
        shapes: path -> shape of every parameter (`gemma_jax.model.param_shapes(config)`).

    Returns:
        One `Parameter` per path, in the order of `shapes`.

    Raises:
        ValueError: a tensor is missing, has another shape or a dtype that is not bfloat16, float16 or float32, or the
            checkpoint has a tensor that nothing uses. The message names the tensor and its file.
    """
    prefix = _find_prefix(source)
    parameters = [
        _find_parameter(source, config, prefix, path, tuple(expected.shape))
        for path, expected in shapes.items()
    ]
    used = {tensor.name for parameter in parameters for tensor in parameter.tensors}
    for name in source:
        if name not in used and not _is_ignored(name, prefix, config):
            raise ValueError(
                f"{source[name]} is not part of a model with this config.json "
                f"({config.num_layers} layers)"
            )
    return parameters


def _find_prefix(source: SafetensorsSource) -> str:
    (embedding,) = SHARED["embed/weight"]
    for prefix in PREFIXES:
        if prefix + embedding in source:
            return prefix
    tried = ", ".join(prefix + embedding for prefix in PREFIXES)
    raise ValueError(f"tensor {embedding!r} is missing from {source.folder}; looked for {tried}")


def _is_ignored(name: str, prefix: str, config: Gemma4Config) -> bool:
    if _OTHER_PARTS.match(name):
        return True
    key_or_value = _KEY_OR_VALUE.match(name.removeprefix(prefix))
    if key_or_value is None:
        return False
    layer = int(key_or_value[1])
    return layer < config.num_layers and config.is_kv_shared(layer)


def _find_parameter(
    source: SafetensorsSource,
    config: Gemma4Config,
    prefix: str,
    path: str,
    shape: tuple[int, ...],
) -> Parameter:
    tensors = []
    for name, expected in _expected_tensors(config, path, shape):
        if prefix + name not in source:
            raise ValueError(
                f"tensor {prefix + name!r} (parameter {path}) is missing from {source.folder}"
            )
        info = source[prefix + name]
        if info.shape != expected:
            raise ValueError(f"{info} has shape {info.shape}; this config.json needs {expected}")
        if info.dtype not in READABLE_DTYPES:
            accepted = ", ".join(READABLE_DTYPES)
            raise ValueError(f"{info} has dtype {info.dtype}; accepted: {accepted}")
        tensors.append(info)
    dtype = jnp.result_type(*(READABLE_DTYPES[info.dtype] for info in tensors))
    return Parameter(path, shape, np.dtype(dtype), tuple(tensors))


def _expected_tensors(
    config: Gemma4Config, path: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """Names (without the prefix) and shapes of the tensors that `path` of `shape` consists of."""
    if path in SHARED:
        (name,) = SHARED[path]
        return [(name, shape)]
    layer_key, _, suffix = path.partition("/")
    layer = int(layer_key.removeprefix("layers_"))
    names = [f"layers.{layer}.{name}" for name in LAYER[suffix]]
    if suffix == "attention/qkv":
        head_dim = config.head_dim_of(layer)
        rows = [config.num_heads * head_dim]
        if not config.is_kv_shared(layer):
            projections = 1 if config.shares_k_and_v(layer) else 2
            rows += [config.kv_heads_of(layer) * head_dim] * projections
        names = names[: len(rows)]
    else:
        rows = [shape[0] // len(names)] * len(names)
    if sum(rows) != shape[0]:
        raise ValueError(f"parameter {path} has {shape[0]} rows, its tensors have {rows}")
    return [(name, (count, *shape[1:])) for name, count in zip(names, rows, strict=True)]
