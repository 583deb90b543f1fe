"""The matmul for more than 16 rows: values in interpret mode, what serves which call, and what the assembler says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lanes, pack_array, quantized_matmul, target
from pallas_kernels.packed import PACKED
from pallas_kernels.quantized_matmul import mosaic, mosaic_decode, mosaic_dense, mosaic_prefill
from pallas_kernels.quantized_matmul.cases import REAL

ROOT = Path(__file__).parents[3]
Config = mosaic_prefill.Config


def _exact(x: jax.Array, w: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The product with weights that are rounded to bfloat16 once, in float64, and the sums of its terms' sizes."""
    x64, w64 = np.asarray(x, np.float64), np.asarray(w.dequantize(jnp.bfloat16), np.float64)
    return x64 @ w64.T, np.abs(x64) @ np.abs(w64).T


def _bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


@pytest.mark.parametrize(
    ("weight_format", "n", "k", "rows", "config"),
    [
        ("q4k", 32, 512, 20, Config(32, stages=3)),  # rows of x that no block divides
        ("q4k", 144, 704, 17, Config(24, splits=3, stages=4)),  # a second block of w; chunks of 64
        ("q4k", 16, 256, 70, Config(32, stages=6)),  # fewer steps than stages; several blocks of x
        ("eq8_0", 48, 768, 33, Config(40, stages=3)),
        ("eq8_0", 64, 2112, 18, Config(32, splits=2, stages=4)),
        ("q6k", 208, 512, 40, Config(40, splits=2, stages=3)),
        ("q6k", 32, 256, 257, Config(256)),
    ],
)
def test_multiplies_by_weights_rounded_to_bfloat16_once(
    weight_format, n, k, rows, config, make_weight, sum_tolerance
) -> None:
    w = make_weight(weight_format, (n, k))
    x = _bfloat16(np.random.default_rng(1), (rows, k))
    with lanes.interpreted():
        run = jax.jit(lambda x, w: mosaic_prefill.quantized_matmul(x, w, config))
        got = run(x, pack_array(w))
    assert got.dtype == jnp.float32
    want, scale = _exact(x, w)
    assert np.all(np.abs(got - want) <= sum_tolerance(k) * scale)


@pytest.mark.parametrize(
    ("weight_format", "k"), [("q4k", 512), ("q4k", 192), ("eq8_0", 320), ("q6k", 256)]
)
def test_dequantized_has_the_bits_of_the_format(weight_format, k, make_weight) -> None:
    w = make_weight(weight_format, (64, k))
    with lanes.interpreted():
        got = jax.jit(lambda w: mosaic_dense.dequantized(w, 16, 32))(pack_array(w))
    assert np.array_equal(
        np.asarray(got, np.float32), np.asarray(w.dequantize(jnp.bfloat16)[16:48], np.float32)
    )


def test_many_rows_are_multiplied_by_a_dense_matrix_block_by_block(
    make_weight, sum_tolerance
) -> None:
    w = make_weight("q4k", (80, 256))
    x = _bfloat16(np.random.default_rng(2), (2, 20, 256))
    config = mosaic_dense.Config(max_bytes=32 * 256 * 2)
    with lanes.interpreted():
        got = jax.jit(lambda x, w: mosaic.quantized_matmul(x, w, config))(x, pack_array(w))
    want, scale = _exact(x, w)
    assert got.shape == (2, 20, 80)
    assert np.all(np.abs(got - want) <= sum_tolerance(256) * scale)


def test_serves_whoever_asks_for_mosaic(make_weight, sum_tolerance) -> None:
    w = make_weight("eq8_0", (32, 256))
    x = _bfloat16(np.random.default_rng(3), (3, 7, 256))
    with lanes.interpreted():
        run = jax.jit(lambda x, w: quantized_matmul(x, w, implementation="mosaic"))
        got = run(x, pack_array(w))
    want, scale = _exact(x, w)
    assert np.all(np.abs(got - want) <= sum_tolerance(256) * scale)


def _serving(rows: int, w: object) -> type:
    x = jax.ShapeDtypeStruct((rows, 2560), jnp.bfloat16)
    assert mosaic.why_not(x, w) is None
    return type(mosaic.default_config(x, w))


def test_rows_and_gpu_decide_which_kernel_serves() -> None:
    w = PACKED["q4k"].abstract((2560, 2560))
    with target.compiling_for(target.HOPPER):
        assert _serving(16, w) is mosaic_decode.Config
        assert _serving(17, w) is mosaic_prefill.Config
        assert _serving(mosaic.DEQUANTIZE_ROWS, w) is mosaic_dense.Config
        assert _serving(17, jax.ShapeDtypeStruct((2560, 2560), jnp.bfloat16)) is mosaic_dense.Config
    with target.compiling_for("10.0"):
        assert _serving(16, w) is mosaic_decode.Config
        assert _serving(17, w) is mosaic_dense.Config


def test_refusals_name_their_reason() -> None:
    w = PACKED["q4k"].abstract((64, 256))
    x = jax.ShapeDtypeStruct((17, 256), jnp.bfloat16)
    with target.compiling_for("10.0"):
        assert "compute capability 10.0: wgmma is Hopper's" in mosaic_prefill.why_not(x, w)
    assert "compute capability None" in mosaic_prefill.why_not(x, w)
    with target.compiling_for(target.HOPPER):
        assert mosaic_prefill.why_not(x, w) is None
        few = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)
        assert "x has 16 rows: expected more than 16" in mosaic_prefill.why_not(few, w)
        floats = jax.ShapeDtypeStruct((17, 256), jnp.float32)
        assert "x has dtype float32" in mosaic_prefill.why_not(floats, w)
        plain = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
        assert "only packed arrays" in mosaic_prefill.why_not(x, plain)


def test_errors_name_the_setting() -> None:
    for wrong in ({"block_m": 264}, {"block_m": 20}, {"splits": 0}, {"stages": 2}):
        with pytest.raises(ValueError, match=r"block_m must be .* stages at least 3"):
            Config(**wrong)


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("rows", [17, 100, 512, 2047])
def test_default_configs_fit_shared_memory(case: str, rows: int) -> None:
    for weight_format, packed in PACKED.items():
        n, k = REAL[case]
        if weight_format == "q6k" and k % 256:
            continue
        x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
        config = mosaic_prefill.default_config(x, packed.abstract((n, k)))
        assert config.stages * config.block_m * 128 <= 200 * 1024
        assert config.block_m < rows + 32


COMPILE = """
import jax, jax.numpy as jnp
from bench import aot
from pallas_kernels import target
from pallas_kernels.packed import PACKED
from pallas_kernels.quantized_matmul import mosaic_prefill

jax.config.update("jax_platforms", "cpu")
for weight_format, k, rows in (
    ("q4k", 2560, 512), ("eq8_0", 2560, 512), ("q6k", 2560, 512), ("q4k", 2112, 100), ("eq8_0", 704, 40)
):
    w = PACKED[weight_format].abstract((2816, k))
    config = mosaic_prefill.Config(256 if rows == 512 else 64)
    with target.compiling_for(target.HOPPER):
        call = lambda x, w: mosaic_prefill.quantized_matmul(x, w, config)
        aot.compile_for("h200", call, jax.ShapeDtypeStruct((rows, k), jnp.bfloat16), w)
"""


def test_compiles_for_h200_without_spills_and_with_products_in_flight() -> None:
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin of JAX compiles for GPUs")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout + run.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spilled == [("0", "0")] * 5
    assert "serialized" not in said
