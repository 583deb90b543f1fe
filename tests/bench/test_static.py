"""The decode step as XLA compiles it for an H200 that is not there: held to what was reached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import static
from bench.least_work import decode_bytes_min, prefill_flops_min
from bench.prediction_model import LAUNCH_SECONDS
from bench.published import PUBLISHED, published
from bench.static import DEPTH, abstract_params


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "weight_format", "most_kernels_per_layer"),
    [("e4b", "eq8_0", 22), ("e4b", "q4k", 22.7), ("e2b", "eq8_0", 22.8), ("e2b", "q4k", 23.3)],
)
def test_decode_copies_no_cache_and_materialises_no_weight(
    tmp_path: Path, model: str, weight_format: str, most_kernels_per_layer: float
) -> None:
    """Eight layers, in E4B two of them KV-shared; the head and the loop are in the count of kernels."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    file = tmp_path / "static.json"
    command = [sys.executable, "-m", "bench.static", "--target", "h200", "--layers", "8"]
    command += ["--model", model, "--format", weight_format, "--no-prefill", "--no-kernels"]
    command += ["--implementation", "xla"]
    command += ["--json", str(file)]
    subprocess.run(command, check=True)
    [entry] = json.loads(file.read_text())["decode"]
    assert entry["cache_copies"] == 0
    assert entry["kernels_per_layer"] <= most_kernels_per_layer
    assert 1 <= entry["bytes_per_token"] / entry["bytes_min"] <= 1.03
    # The smallest matrix of a layer that is worth naming, o, would take 10 MB in bfloat16.
    assert entry["temp_bytes"] < 4e6
    # A kernel takes the longer of its bytes and its instructions, and every one a launch.
    launches = 1e6 * LAUNCH_SECONDS * entry["kernels"]
    longest = max(entry["bytes_us"], entry["instructions_us"])
    assert (
        longest <= entry["predicted_us"] - launches <= entry["bytes_us"] + entry["instructions_us"]
    )
    # Read off the assembled products: 4 to 13 instructions a weight and thread; weights have 0.56 to 1.1 bytes.
    per_byte = 32 * entry["instructions_per_token"] / entry["bytes_per_token"]
    assert 4 < per_byte < 20


@pytest.mark.heavy
@pytest.mark.parametrize(("model", "most_kernels"), [("31b", 42), ("e4b", 58), ("26b_a4b", 78)])
def test_hand_kernels_leave_little_between_them(
    tmp_path: Path, model: str, most_kernels: int
) -> None:
    """Four layers, whose kernels are 7 (31B), 10 (E4B) and 16 (26B-A4B) each; the rest is the head and the loop."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    file = tmp_path / "static.json"
    command = [sys.executable, "-m", "bench.static", "--target", "h200", "--layers", "4"]
    command += ["--model", model, "--format", "q4k", "--no-prefill", "--no-kernels"]
    command += ["--implementation", "mosaic", "--json", str(file)]
    subprocess.run(command, check=True)
    [entry] = json.loads(file.read_text())["decode"]
    assert entry["cache_copies"] == 0
    assert entry["kernels"] <= most_kernels
    assert entry["temp_bytes"] < 4e6
    assert 1 <= entry["bytes_per_token"] / entry["bytes_min"] <= 1.03


def test_a_file_is_completed_where_it_ended_and_not_if_it_is_of_another_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []

    def decode_entry(config: Any, weight_format: str, *_: Any) -> dict[str, Any]:
        compiled.append(weight_format)
        if compiled == ["bf16", "eq8_0"]:
            raise KeyboardInterrupt
        return {"batch": 1}

    monkeypatch.setenv("XLA_FLAGS", "")  # main completes it
    monkeypatch.setattr(static, "decode_entry", decode_entry)
    monkeypatch.setattr(static, "_decode_line", str)
    file = tmp_path / "static.json"
    command = ["--json", str(file), "--target", "h200", "--model", "e2b", "--no-prefill"]
    command += ["--no-kernels", "--implementation", "xla"]
    with pytest.raises(KeyboardInterrupt):
        static.main(command)
    assert static.main(command) == 0
    assert compiled == ["bf16", "eq8_0", "eq8_0", "q4k"]
    content = json.loads(file.read_text())
    assert [entry["format"] for entry in content["decode"]] == ["bf16", "eq8_0", "q4k"]
    content["environment"]["commit"] = "f00"
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        static.main(command)
    assert "is of commit f00" in capsys.readouterr().err


@pytest.mark.heavy
def test_prefill_dequantizes_one_layer_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    temporaries = {}
    for layers in (2, 4):
        file = tmp_path / f"{layers}.json"
        command = [sys.executable, "-m", "bench.static", "--target", "h200", "--json", str(file)]
        command += ["--model", "e4b", "--format", "eq8_0", "--layers", str(layers), "--batch"]
        command += ["--no-kernels", "--implementation", "xla"]
        subprocess.run(command, check=True)
        [entry] = json.loads(file.read_text())["prefill"]
        assert 1 <= entry["flops"] / entry["flops_min"] < 1.1
        temporaries[layers] = entry["temp_bytes"]
    largest_matrix = 2 * 20480 * 2560  # in bfloat16
    assert temporaries[4] - temporaries[2] < largest_matrix / 4
    assert temporaries[4] < 2 * largest_matrix


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_least_traffic_of_bfloat16_is_two_bytes_a_weight_read(model: str) -> None:
    config = published(model)
    params: Any = abstract_params(config, "bf16")
    weights = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == jnp.bfloat16
        names = [key.key for key in path]
        if names == ["ple", "embedding"]:
            continue
        share = config.num_experts_per_token / config.num_experts if leaf.ndim == 3 else 1
        weights += int(leaf.size * share)
    cache = sum(
        2 * 2 * config.kv_heads_of(i) * config.head_dim_of(i) * DEPTH
        for i in range(config.num_layers)
    )
    assert decode_bytes_min(config, params, 1, depth=DEPTH) == 2 * weights + cache
    # Parameters read per decoded token as published: 2.28, 4.64, 11.9, 3.82 and 30.7 billion.
    expected = {"e2b": 2.28e9, "e4b": 4.64e9, "12b": 11.9e9, "26b_a4b": 3.82e9, "31b": 30.7e9}
    assert abs(weights / expected[model] - 1) < 0.02


def test_the_fewest_flops_of_prefill_leave_out_the_shared_layers() -> None:
    config = published("e2b")
    long, short = (prefill_flops_min(config, n) for n in (512, 1))
    # What grows with the prompt: 15 of 35 layers, whose FFN is half as wide as the others', and the projection of
    # per-layer embeddings. What does not: the other layers and the head.
    assert 0.25 < (long - short) / 511 / short < 0.26


def test_hand_kernels_leave_the_experts_alone_that_nobody_chooses() -> None:
    config = published("26b_a4b", 2)
    for weight_format in ("bf16", "q4k"):
        _, params = static._served(config, weight_format, "mosaic")
        left_alone = static._left_alone(config, params, "mosaic", 1)
        # 120 of 128 experts of 704 and 2816 in two layers, gate, up and down; chunks of 64 take 5 bits.
        bits = {"bf16": (16, 16), "q4k": (4.5, 5)}[weight_format]
        weights = 2 * 120 * 704 * 2816
        assert left_alone == weights * (2 * bits[0] + bits[1]) / 8
        assert static._left_alone(config, params, "mosaic", 16) == 0
        assert static._left_alone(config, params, "xla", 1) == 0
