"""A GGUF file says the same as the parameters, names what llama.cpp asks for, and is whole or not there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

from bench import gguf_file
from bench.gguf_file import main, write_gguf
from bench.published import PUBLISHED, published
from convert.policy import format_of
from gemma_jax.checkpoints import resolve
from gemma_jax.config import GLOBAL, SLIDING, Gemma4Config
from gemma_jax.model import Params, param_shapes
from pallas_kernels import quantize
from pallas_kernels.arrays import FORMATS, QuantizedArray

LAYERS = (SLIDING, GLOBAL, SLIDING, GLOBAL)
BASE = Gemma4Config(
    vocab_size=640,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    layer_types=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    global_head_dim=128,
    sliding_window=32,
    final_logit_softcap=30.0,
    eos_ids=(1, 106),
)
CONFIGS = {
    "per_layer_embeddings": dataclasses.replace(
        BASE,
        ple_size=32,
        vocab_size_per_layer_input=640,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    "k_is_v": dataclasses.replace(BASE, attention_k_eq_v=True, num_global_kv_heads=1),
    "experts": dataclasses.replace(
        BASE,
        intermediate_size=320,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=192,
        attention_k_eq_v=True,
        num_global_kv_heads=1,
    ),
}
WHOLE = {
    "input_norm": "attn_norm.weight",
    "post_attention_norm": "post_attention_norm.weight",
    "pre_ffn_norm": "ffn_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "attention/o": "attn_output.weight",
    "attention/q_norm": "attn_q_norm.weight",
    "ffn/down": "ffn_down.weight",
}
PLE = {
    "ple/gate": "inp_gate.weight",
    "ple/projection": "proj.weight",
    "ple/post_norm": "post_norm.weight",
}
MOE = {
    "moe/router": "ffn_gate_inp.weight",
    "moe/router_scale": "ffn_gate_inp.scale",
    "moe/per_expert_scale": "ffn_down_exps.scale",
    "moe/gate_up": "ffn_gate_up_exps.weight",
    "moe/down": "ffn_down_exps.weight",
    "moe/pre_norm": "pre_ffw_norm_2.weight",
    "moe/dense_post_norm": "post_ffw_norm_1.weight",
    "moe/post_norm": "post_ffw_norm_2.weight",
}
GLOBAL_PLE = {
    "ple/embedding": "per_layer_token_embd.weight",
    "ple/projection": "per_layer_model_proj.weight",
    "ple/norm": "per_layer_proj_norm.weight",
}


def _params(config: Gemma4Config, weight_format: str) -> Params:
    rng = np.random.default_rng(7)
    leaves: dict[tuple[str, ...], Any] = {}
    for path, leaf in param_shapes(config).items():
        name = format_of(path, leaf.shape, weight_format)
        values = jnp.asarray(rng.standard_normal(leaf.shape), jnp.bfloat16)
        leaves[tuple(path.split("/"))] = quantize(values, name) if name in FORMATS else values
    return unflatten_dict(leaves)


def _values(weight: Any) -> np.ndarray:
    dense = weight.dequantize() if isinstance(weight, QuantizedArray) else weight
    return np.asarray(dense, np.float32)


def _expected(params: Params, config: Gemma4Config) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Tensor name, values and the leaf that they come from, one line for each name that llama.cpp asks for."""
    leaves = flatten_dict(params, sep="/")

    def whole(path: str, name: str) -> tuple[str, np.ndarray, Any]:
        return name, _values(leaves[path]), leaves[path]

    yield whole("embed/weight", "token_embd.weight")
    yield whole("final_norm", "output_norm.weight")
    for path, name in GLOBAL_PLE.items() if config.ple_size else ():
        yield whole(path, name)
    for i in range(config.num_layers):
        at = f"layers_{i}"
        extra = (PLE if config.ple_size else {}) | (MOE if config.num_experts else {})
        if not config.is_kv_shared(i):
            extra = extra | {"attention/k_norm": "attn_k_norm.weight"}
        for path, name in (WHOLE | extra).items():
            yield whole(f"{at}/{path}", f"blk.{i}.{name}")
        qkv = leaves[f"{at}/attention/qkv"]
        head, kv = config.head_dim_of(i), config.kv_heads_of(i)
        ends = np.cumsum([config.num_heads * head, kv * head, kv * head])
        parts = np.split(_values(qkv), ends[:2])
        for name, part in zip("qkv", parts, strict=True):
            if len(part):
                yield f"blk.{i}.attn_{name}.weight", part, qkv
        gate_up = leaves[f"{at}/ffn/gate_up"]
        for name, part in zip(("gate", "up"), np.split(_values(gate_up), 2), strict=True):
            yield f"blk.{i}.ffn_{name}.weight", part, gate_up


def _tolerance(kind: Kind, values: np.ndarray, leaf: Any) -> np.ndarray | float:
    """What the table in `gguf_file` says is lost, element by element."""
    scale = np.abs(values).max()
    if kind == Kind.Q4_1:
        # Scale and minimum rounded to float16, times codes up to 15 and 1: 2**-11 of each, at most 2**-11 of their sum.
        scales, minimum = (np.asarray(x) for x in leaf.block_scales())
        return 2.0**-11 * float((15 * scales + minimum).max())
    if kind == Kind.Q8_0 and type(leaf).__name__ == "Q6K":
        return float(scale) / 127  # half a step and the float16 scale
    # Q4_K's multiply and subtract may be one rounding in one place and two in another.
    return 2.0**-22 * float(scale) if kind == Kind.Q4_K else 0.0


@pytest.mark.parametrize("weight_format", gguf_file.FILE_TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_holds_our_values(name: str, weight_format: str, tmp_path: Path) -> None:
    config, path = CONFIGS[name], tmp_path / "model.gguf"
    params = _params(config, weight_format)
    write_gguf(params, config, path, weight_format=weight_format)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    rope = tensors.pop("rope_freqs.weight").data
    half = config.global_head_dim // 2
    rotating = int(config.global_rotary_factor * half)
    np.testing.assert_array_equal(rope, np.float32([1] * rotating + [1e30] * (half - rotating)))
    for tensor_name, values, leaf in _expected(params, config):
        tensor = tensors.pop(tensor_name)
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        atol = _tolerance(tensor.tensor_type, values, leaf)
        np.testing.assert_allclose(found, values, rtol=0, atol=atol, err_msg=tensor_name)
    assert not tensors


def test_formats_are_ggmls_own_where_ggml_has_them(tmp_path: Path) -> None:
    config, path = CONFIGS["experts"], tmp_path / "model.gguf"
    write_gguf(_params(config, "q4k"), config, path, weight_format="q4k")
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == Kind.Q4_K
    assert kinds["token_embd.weight"] == Kind.Q6_K
    assert kinds["blk.0.ffn_down.weight"] == Kind.Q4_1  # 320 columns
    assert kinds["blk.0.ffn_down_exps.weight"] == Kind.Q4_1  # 192
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == Kind.F32


def test_metadata_describes_every_layer(tmp_path: Path) -> None:
    config, path = CONFIGS["per_layer_embeddings"], tmp_path / "model.gguf"
    write_gguf(_params(config, "bf16"), config, path, weight_format="bf16")
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "gemma4"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    expected = {
        "block_count": 4,
        "context_length": config.max_position_embeddings,
        "embedding_length": 256,
        "embedding_length_per_layer_input": 32,
        "vocab_size": 640,
        "feed_forward_length": [512, 512, 1024, 1024],
        "attention.head_count": 4,
        "attention.head_count_kv": [2, 2, 2, 2],
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.key_length_swa": 64,
        "attention.value_length_swa": 64,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": [True, False, True, False],
        "attention.shared_kv_layers": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 128,
        "rope.dimension_count_swa": 64,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
    }
    found = {key.removeprefix("gemma4."): fields[key] for key in fields if key.startswith("gemma4")}
    assert found == expected


def test_experts_and_narrower_global_heads_are_in_the_metadata(tmp_path: Path) -> None:
    config, path = CONFIGS["experts"], tmp_path / "model.gguf"
    write_gguf(_params(config, "eq8_0"), config, path, weight_format="eq8_0")
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert fields["gemma4.attention.head_count_kv"] == [2, 1, 2, 1]
    assert fields["gemma4.expert_count"] == 4
    assert fields["gemma4.expert_used_count"] == 2
    assert fields["gemma4.expert_feed_forward_length"] == 192


def test_a_made_up_vocabulary_has_the_right_size_and_no_token_twice(tmp_path: Path) -> None:
    config, path = CONFIGS["k_is_v"], tmp_path / "model.gguf"
    write_gguf(_params(config, "bf16"), config, path, weight_format="bf16")
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == len(fields["tokenizer.ggml.token_type"]) == 640
    assert tokens[config.bos_id] == "<bos>"
    assert {f"<0x{byte:02X}>" for byte in range(256)} < set(tokens)
    assert fields["tokenizer.ggml.bos_token_id"] == config.bos_id
    assert fields["tokenizer.ggml.eot_token_id"] == 106


def test_a_checkpoints_own_vocabulary_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert main(["tiny-dense", "q4k", str(path)]) == 0
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    data = json.loads((Path(resolve("tiny-dense")) / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    assert {token: i for i, token in enumerate(tokens)} == data["model"]["vocab"]
    assert [m.split(" ") for m in fields["tokenizer.ggml.merges"]] == data["model"]["merges"]
    types = fields["tokenizer.ggml.token_type"]
    assert types[tokens.index("<|turn>")] == gguf.TokenType.CONTROL
    assert types[tokens.index("<0x0A>")] == gguf.TokenType.BYTE
    assert fields["tokenizer.ggml.eot_token_id"] == tokens.index("<turn|>")


def test_big_tensors_are_written_in_pieces_of_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS["experts"]
    params = _params(config, "q4k")
    write_gguf(params, config, tmp_path / "whole.gguf", weight_format="q4k")
    monkeypatch.setattr(gguf_file, "_PIECE", 7 * 256)
    write_gguf(params, config, tmp_path / "pieces.gguf", weight_format="q4k")
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = CONFIGS["k_is_v"], tmp_path / "model.gguf"
    path.write_bytes(b"old")
    calls = []

    def fails_in_the_middle(*_: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return np.zeros(0, np.uint8)

    monkeypatch.setattr(gguf_file, "_encoded", fails_in_the_middle)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(_params(config, "bf16"), config, path, weight_format="bf16")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_parameter(tmp_path: Path) -> None:
    config, path = CONFIGS["k_is_v"], tmp_path / "model.gguf"
    good = _params(config, "q4k")
    with pytest.raises(ValueError, match="weight_format is 'q5k'"):
        write_gguf(good, config, path, weight_format="q5k")
    with pytest.raises(ValueError, match="embed/weight is Q6K; eq8_0 has EQ8_0 there"):
        write_gguf(good, config, path, weight_format="eq8_0")
    lacking = {key: value for key, value in good.items() if key != "final_norm"}
    with pytest.raises(ValueError, match="final_norm is missing"):
        write_gguf(lacking, config, path, weight_format="q4k")
    misshaped = good | {"final_norm": jnp.ones((3,))}
    with pytest.raises(ValueError, match="final_norm has shape"):
        write_gguf(misshaped, config, path, weight_format="q4k")
    with pytest.raises(ValueError, match="extra is no parameter"):
        write_gguf(good | {"extra": jnp.ones((3,))}, config, path, weight_format="q4k")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"model": {"type": "BPE", "vocab": {"a": 640}, "merges": []}}')
    with pytest.raises(ValueError, match="token 640, but the embedding has 640 rows"):
        write_gguf(good, config, path, weight_format="q4k", tokenizer=tokenizer)
    tokenizer.write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        write_gguf(good, config, path, weight_format="q4k", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == [tokenizer]


def test_sharing_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIGS["per_layer_embeddings"],
        num_kv_shared_layers=1,
        layer_types=(SLIDING, GLOBAL, SLIDING, SLIDING),
    )
    with pytest.raises(ValueError, match="num_kv_shared_layers is 1"):
        write_gguf({}, config, tmp_path / "model.gguf", weight_format="bf16")
    for name in PUBLISHED:
        gguf_file._check_sharing(published(name))


def test_the_command_line_reports_bad_input_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing"), "q4k", str(tmp_path / "model.gguf")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nothing" in err
    assert not list(tmp_path.iterdir())


def test_plain_float32_matrices_stay_float32(tmp_path: Path) -> None:
    config, path = CONFIGS["k_is_v"], tmp_path / "model.gguf"
    params = jax.tree.map(lambda x: x.astype(jnp.float32), _params(config, "bf16"))
    write_gguf(params, config, path, weight_format="bf16")
    assert {tensor.tensor_type for tensor in GGUFReader(path).tensors} == {Kind.F32}
