"""Programs compiled for GPUs that are not there: what they allocate, and that every target is understood.

One process per target, because JAX's kernel caches do not know the target; ``bench.aot`` is run as a user would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin of JAX compiles for GPUs")

from bench import aot
from pallas_kernels import FORMATS

ROOT = Path(__file__).parents[2]
# The shapes of decoding one token: small, odd, long and wide, the head, a table, and eight experts out of 128.
ONE_TOKEN = (
    r"quantized_matmul (small_704|e4b_gate_up|e4b_down|26b_a4b_dense_down|e4b_head) M=1$"
    r"|embedding_lookup (e4b_embed|26b_a4b_embed) M=1$"
    r"|expert_matmul 26b_a4b_(gate_up|down) M=8$"
)


@cache
def compiled(target: str, only: str) -> list[dict]:
    """What ``bench.aot`` reports for the calls that match ``only``."""
    command = [sys.executable, "-m", "bench.aot", "--json", "--target", target, "--only", only]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.heavy
@pytest.mark.parametrize("weight_format", aot.WEIGHT_FORMATS)
def test_one_token_on_h200_needs_no_full_size_dequantized_weight(weight_format: str) -> None:
    """All temporaries together hold less than a byte per weight; a bf16 copy would hold two."""
    calls = [c for c in compiled("h200", ONE_TOKEN) if c["format"] == weight_format]
    assert len(calls) == 9
    for call in calls:
        assert call["temp_bytes"] < call["weights_read"], call


@pytest.mark.heavy
@pytest.mark.parametrize("weight_format", FORMATS)
def test_eight_rows_on_h200_need_none_either(weight_format: str) -> None:
    calls = compiled("h200", "quantized_matmul e4b_(gate_up|down|head) M=8$")
    calls = [c for c in calls if c["format"] == weight_format]
    assert len(calls) == 3
    for call in calls:
        assert call["temp_bytes"] < call["weights_read"], call


@pytest.mark.heavy
def test_the_measure_sees_a_dequantized_weight_where_there_is_one() -> None:
    """512 rows dequantize first: two bytes per weight must show, or the tests above could not fail."""
    calls = compiled("h200", "quantized_matmul e4b_down M=512$")
    for call in calls:
        dequantized = call["temp_bytes"] >= 2 * call["weights_read"]
        assert dequantized == (call["format"] in FORMATS), call


@pytest.mark.heavy
@pytest.mark.parametrize("target", [t for t in aot.TARGETS if t != "h200"])
def test_every_target_compiles_every_op(target: str) -> None:
    calls = compiled(target, r"small_704 M=(1|2|8)$")
    assert len(calls) == len(aot.WEIGHT_FORMATS) * 4
    assert all(call["kernels"] >= 1 for call in calls)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target = 'h300': expected one of h200, h100, b200, gb10"):
        aot.sharding("h300")
