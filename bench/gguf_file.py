"""Our parameters as a GGUF file that llama.cpp loads, so that both engines run the very same weights.

    python -m bench.gguf_file MODEL FORMAT OUT.gguf

MODEL is a bundled model, a folder, a hub id, or the name of an architecture in `bench.published`, which gets random
weights.

| ours | GGML | |
|---|---|---|
| Q4K, 256 divides K | Q4_K | byte for byte |
| Q4K otherwise | Q4_1 | scale and minimum of each 32 rounded to float16: 2**-11 of each |
| Q6K, 256 divides K | Q6_K | byte for byte |
| Q6K otherwise | Q8_0 | quantized again: half a step of 8 bits |
| EQ8_0 | Q8_0 | byte for byte |
| plain matrix | BF16, F16, F32 | as it is |
| norm, scale, router | F32 | exact |

Names of tensors and keys are those of llama.cpp's architecture ``gemma4``; the format is specified at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from gguf import GGMLQuantizationType as Kind

from bench.gguf_vocabulary import add_vocabulary
from bench.published import PUBLISHED, SMALL, published
from bench.random_weights import random_params
from convert.policy import AS_STORED, format_of
from gemma_jax.checkpoints import resolve
from gemma_jax.config import Gemma4Config
from gemma_jax.model import Params, param_shapes
from pallas_kernels import quantize
from pallas_kernels.arrays import EQ8_0, FORMATS, Q4K, Q6K, QuantizedArray
from pallas_kernels.gguf_blocks import to_blocks
from pallas_kernels.packed import Weight

FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "eq8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4k": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}

# Elements that are turned into bytes at a time; more would only take memory.
_PIECE = 2**24

# What GGML divides a rotary frequency by so that it vanishes.
_NO_ROTATION = 1e30

_GLOBAL_NAMES = {
    "embed/weight": "token_embd.weight",
    "ple/embedding": "per_layer_token_embd.weight",
    "ple/projection": "per_layer_model_proj.weight",
    "ple/norm": "per_layer_proj_norm.weight",
    "final_norm": "output_norm.weight",
}
_LAYER_NAMES = {
    "input_norm": "attn_norm.weight",
    "post_attention_norm": "post_attention_norm.weight",
    "pre_ffn_norm": "ffn_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "attention/o": "attn_output.weight",
    "attention/q_norm": "attn_q_norm.weight",
    "attention/k_norm": "attn_k_norm.weight",
    "ffn/down": "ffn_down.weight",
    "moe/router": "ffn_gate_inp.weight",
    "moe/router_scale": "ffn_gate_inp.scale",
    "moe/per_expert_scale": "ffn_down_exps.scale",
    "moe/gate_up": "ffn_gate_up_exps.weight",
    "moe/down": "ffn_down_exps.weight",
    "moe/pre_norm": "pre_ffw_norm_2.weight",
    "moe/dense_post_norm": "post_ffw_norm_1.weight",
    "moe/post_norm": "post_ffw_norm_2.weight",
    "ple/gate": "inp_gate.weight",
    "ple/projection": "proj.weight",
    "ple/post_norm": "post_norm.weight",
}


class Tensor(NamedTuple):
    """One tensor of the file: entries `start` to `end` of the first axis of `weight`, stored as `kind`."""

    name: str
    kind: Kind
    weight: Weight
    start: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.start, *self.weight.shape[1:])


def write_gguf(
    params: Params,
    config: Gemma4Config,
    path: Path,
    *,
    weight_format: str,
    tokenizer: Path | None = None,
) -> None:
    """Writes `params` as a GGUF file of llama.cpp's architecture ``gemma4``, a piece of a tensor at a time.

    Args:
      params: the parameters, in the formats that `convert.policy` gives for `weight_format`.
      config: the architecture.
      path: the file; it appears, or is replaced, only when it is complete.
      weight_format: "q4k", "eq8_0" or "bf16" (plain matrices, which keep the type that they have).
      tokenizer: a ``tokenizer.json`` to write; None writes tokens without meaning, as many as the embedding has.

    Raises:
      ValueError: an unknown format, a parameter that is missing, misshaped or in another format, a tokenizer that does
        not fit the model, KV-shared layers that llama.cpp would give other keys. `path` is left as it was.
      OSError: the file cannot be written. Likewise.
    """
    if weight_format not in FILE_TYPES:
        raise ValueError(
            f"weight_format is {weight_format!r}; expected one of {', '.join(FILE_TYPES)}"
        )
    _check_sharing(config)
    weights = _checked(params, config, weight_format)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA4])
    try:
        writer.add_file_type(FILE_TYPES[weight_format])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_architecture(writer, config)
        add_vocabulary(writer, config, tokenizer)
        tensors = list(_tensors(weights, config))
        for tensor in tensors:
            size = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
            writer.add_tensor_info(
                tensor.name, size, np.dtype(np.uint8), math.prod(size), raw_dtype=tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        [out] = writer.fout
        for tensor in tensors:
            writer.write_padding(out, out.tell())
            for piece in _pieces(tensor):
                out.write(np.ascontiguousarray(piece).data)
        writer.write_padding(out, out.tell())
        out.flush()
        os.fsync(out.fileno())
        writer.close()
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the reason is the one on its way out
            writer.close()
        partial.unlink(missing_ok=True)
        raise


def _check_sharing(config: Gemma4Config) -> None:
    """Raises ValueError unless the last two layers with K/V of their own are a sliding and a global one, in this order.

    llama.cpp takes the keys and values of shared layers from these two places without looking at what they are.
    """
    own = config.first_kv_shared_layer
    kinds = [config.is_global(i) for i in range(max(0, own - 2), own)]
    if config.num_kv_shared_layers and kinds != [False, True]:
        raise ValueError(
            f"num_kv_shared_layers is {config.num_kv_shared_layers}: for llama.cpp the layers before "
            "the shared ones must end with a sliding and a global one"
        )


def _checked(params: Params, config: Gemma4Config, weight_format: str) -> dict[str, Weight]:
    """The parameters by path, each of the shape and format that it must have."""
    weights: dict[str, Weight] = flatten_dict(params, sep="/")
    expected = param_shapes(config)
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"params: {missing[0]} is missing")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"params: {unknown[0]} is no parameter of this architecture")
    for path, leaf in expected.items():
        weight = weights[path]
        if tuple(weight.shape) != leaf.shape:
            raise ValueError(
                f"params: {path} has shape {tuple(weight.shape)}; the config says {leaf.shape}"
            )
        wanted = FORMATS.get(format_of(path, leaf.shape, weight_format))
        found = type(weight) if isinstance(weight, QuantizedArray) else None
        if found is not wanted:
            names = [kind.__name__ if kind else "a plain array" for kind in (found, wanted)]
            raise ValueError(f"params: {path} is {names[0]}; {weight_format} has {names[1]} there")
    return weights


# ----------------------------------------------------------------------------------------------------- tensors


def _tensors(weights: dict[str, Weight], config: Gemma4Config) -> Iterator[Tensor]:
    """Every tensor of the file, fused matrices split by rows."""
    for path, weight in weights.items():
        layer, _, rest = path.partition("/")
        if not layer.startswith("layers_"):
            yield _whole(_GLOBAL_NAMES[path], path, weight)
            continue
        i = int(layer.removeprefix("layers_"))
        if rest == "attention/qkv":
            rows = {"attn_q": config.num_heads, "attn_k": config.kv_heads_of(i)}
            rows["attn_v"] = rows["attn_k"]
            names = ["attn_q", "attn_k", "attn_v"]
            if config.is_kv_shared(i):
                names = names[:1]
            elif config.shares_k_and_v(i):
                names = names[:2]
            yield from _split(
                i, {name: rows[name] * config.head_dim_of(i) for name in names}, path, weight
            )
        elif rest == "ffn/gate_up":
            width = config.ffn_size(i)
            yield from _split(i, {"ffn_gate": width, "ffn_up": width}, path, weight)
        else:
            yield _whole(f"blk.{i}.{_LAYER_NAMES[rest]}", path, weight)
    if any(config.is_global(i) for i in range(config.num_layers)):
        half = config.global_head_dim // 2
        rotating = int(config.global_rotary_factor * half)
        factors = jnp.full((half,), _NO_ROTATION, jnp.float32).at[:rotating].set(1.0)
        yield Tensor("rope_freqs.weight", Kind.F32, factors, 0, half)


def _whole(name: str, path: str, weight: Weight) -> Tensor:
    return Tensor(name, _kind(path, weight), weight, 0, weight.shape[0])


def _split(layer: int, rows: dict[str, int], path: str, weight: Weight) -> Iterator[Tensor]:
    """Consecutive rows of `weight` as tensors of their own."""
    start = 0
    for name, count in rows.items():
        kind = _kind(path, weight)
        yield Tensor(f"blk.{layer}.{name}.weight", kind, weight, start, start + count)
        start += count
    assert start == weight.shape[0]


def _kind(path: str, weight: Weight) -> Kind:
    """How GGML stores a parameter; see the table above."""
    in_super_blocks = weight.shape[-1] % gguf.QK_K == 0
    if isinstance(weight, Q4K):
        return Kind.Q4_K if in_super_blocks else Kind.Q4_1
    if isinstance(weight, Q6K):
        return Kind.Q6_K if in_super_blocks else Kind.Q8_0
    if isinstance(weight, EQ8_0):
        return Kind.Q8_0
    plain = {"bfloat16": Kind.BF16, "float16": Kind.F16}
    if format_of(path, weight.shape, "bf16") == AS_STORED:
        return Kind.F32
    return plain.get(weight.dtype.name, Kind.F32)


def _pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes of a tensor, some entries of its first axis at a time."""
    step = max(1, _PIECE // math.prod(tensor.shape[1:]))
    for start in range(tensor.start, tensor.end, step):
        size = min(step, tensor.end - start)
        # With a dynamic start all pieces of a size share a program.
        part = jax.tree.map(
            lambda plane, at=start, n=size: jax.lax.dynamic_slice_in_dim(plane, at, n),
            tensor.weight,
        )
        yield _encoded(part, tensor.kind)


def _encoded(part: Weight, kind: Kind) -> np.ndarray:
    """Bytes of `part`: uint8 blocks, or the numbers themselves."""
    if isinstance(part, Q4K) and kind == Kind.Q4_1:
        return _q4_1_blocks(part)
    if isinstance(part, Q6K) and kind == Kind.Q8_0:
        return to_blocks(quantize(part.dequantize(), "eq8_0"))
    if isinstance(part, QuantizedArray):
        return to_blocks(part)
    if kind == Kind.F32:
        return np.asarray(part, np.float32)
    return np.asarray(part).view(np.uint16)


def _q4_1_blocks(part: Q4K) -> np.ndarray:
    """uint8 ``[..., N, K/32 * 20]``: each block a float16 scale and offset, then byte i with elements i and 16 + i."""
    scale, minimum = (np.asarray(plane) for plane in part.block_scales())
    words = np.ascontiguousarray(np.asarray(part.codes)).view(np.uint8)
    nibbles = np.stack([words & 15, words >> 4], axis=-1).reshape(*scale.shape, 2, 16)
    header = np.stack([scale, -minimum], axis=-1).astype(np.float16).view(np.uint8)
    codes = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    blocks = np.concatenate([header, codes], axis=-1)
    return blocks.reshape(*blocks.shape[:-2], -1)


# ---------------------------------------------------------------------------------------------------- metadata


def _add_architecture(writer: gguf.GGUFWriter, config: Gemma4Config) -> None:
    layers = range(config.num_layers)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_embedding_length_per_layer_input(config.ple_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([config.ffn_size(i) for i in layers])
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv([config.kv_heads_of(i) for i in layers])
    writer.add_key_length(config.global_head_dim)
    writer.add_value_length(config.global_head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([not config.is_global(i) for i in layers])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    # "Proportional" RoPE rotates the whole head; the tensor rope_freqs stops what is not to turn.
    writer.add_rope_dimension_count(config.global_head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base(config.global_rope_theta)
    writer.add_rope_freq_base_swa(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.final_logit_softcap is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcap)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_token)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """Writes one file; bad input gives one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.gguf_file", description=__doc__)
    parser.add_argument("model", help="bundled or published name, folder or hub id")
    parser.add_argument("format", choices=tuple(FILE_TYPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    options = parser.parse_args(argv)
    try:
        config, params, tokenizer = _load(options.model, options.format, options.seed)
        write_gguf(params, config, options.out, weight_format=options.format, tokenizer=tokenizer)
    except (ValueError, OSError) as error:
        print(f"gguf_file: error: {error}", file=sys.stderr)
        return 2
    return 0


def _load(model: str, weight_format: str, seed: int) -> tuple[Gemma4Config, Params, Path | None]:
    """Architecture, parameters and, where the checkpoint has one, its ``tokenizer.json``."""
    if model in (*PUBLISHED, *SMALL):
        config = published(model)
        return config, random_params(config, weight_format, seed), None
    from convert import hub  # Orbax is slow to import
    from convert.load import load_checkpoint

    folder = Path(hub.resolve(resolve(model)))
    config, params, _ = load_checkpoint(folder, format=weight_format)
    tokenizer = folder / "tokenizer.json"
    return config, params, tokenizer if tokenizer.exists() else None


if __name__ == "__main__":
    sys.exit(main())
