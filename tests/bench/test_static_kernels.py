"""Hand kernels compiled for GPUs that are not there, and how their machine code is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench import static_kernels
from bench.kernel_calls import OPS, WEIGHT_FORMATS, Call, calls
from bench.static_kernels import hot_code, predicted_us, read_dumps

ROOT = Path(__file__).parents[2]
TARGETS = ("h200", "b200", "gb10")

# An outer loop around an inner one around a third without a tensor-core instruction, and what follows them.
SASS = """
        .text.kernel:
   -:-:0:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
   -:-:0:Y:01        /*0010*/                   MOV R2, R3 ;
.L_x_1:
   -:-:5:Y:01        /*0020*/              @!P2 LDG.E.NA.LTC256B.128.CONSTANT R16, desc[UR8][R2.64] ;
   -:-:5:Y:01        /*0030*/                   LDG.E.128 R16, desc[UR8][R2.64+0x100] ;
   -:-:5:Y:01        /*0040*/                   LDG.E.NA.LTC256B.64 R16, desc[UR8][R2.64+0x128] ;
   -:-:-:Y:07        /*0050*/                   HMMA.16816.F32.BF16 R16, R16, R96, R48 ;
   -:-:-:Y:07        /*0060*/                   HMMA.16816.F32.BF16 R16, R16, R98, R48 ;
   -:-:-:Y:05        /*0070*/               @P2 BRA `(.L_x_1) ;
   -:-:-:Y:05        /*0080*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
   -:-:-:Y:05        /*0090*/              @!P1 BRA `(.L_x_2) ;
   -:-:-:Y:05        /*00a0*/              @!P1 BRA `(.L_x_0) ;
.L_x_3:
   -:-:-:Y:05        /*00b0*/                   EXIT ;
   -:-:-:Y:00        /*00c0*/                   NOP ;
"""


def test_the_hot_code_is_the_innermost_loop_with_a_tensor_core_instruction() -> None:
    hot = hot_code(SASS)
    assert [line.split()[0].split(".")[0] for line in hot] == [
        "LDG", "LDG", "LDG", "HMMA", "HMMA", "BRA",
    ]  # fmt: skip


def test_without_such_a_loop_it_is_the_whole_kernel() -> None:
    straight = "\n".join(line for line in SASS.splitlines() if "BRA" not in line)
    assert len(hot_code(straight)) == 8  # all but the NOP
    without = SASS.replace("HMMA.16816.F32.BF16", "FFMA")
    assert len(hot_code(without)) == 12


PTXAS = """
ptxas info    : Function properties for kernel
ptxas         .     0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 17 bytes smem
"""


def test_dumps_are_read(tmp_path: Path) -> None:
    (tmp_path / "kernel_0.ptxas").write_text(PTXAS)
    (tmp_path / "kernel_0.resources.txt").write_text("Resources(smem_scratch_bytes=2048, …)")
    assert read_dumps(tmp_path) == [(128, 12, 2048, None)]
    (tmp_path / "kernel_0.sass_ctrl").write_text(SASS)
    assert read_dumps(tmp_path) == [(128, 12, 2048, (6, 2, 1))]


def test_a_dump_that_says_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernel_0.ptxas").write_text("ptxas info : 0 bytes gmem")
    (tmp_path / "kernel_0.resources.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no 'Used .* registers'"):
        read_dumps(tmp_path)


def _call(weight_format: str = "q4k", implementation: str = "mosaic") -> Call:
    [found] = [
        c
        for c in calls(ops=["quantized_matmul"], formats=[weight_format])
        if (c.name, c.implementation) == ("e4b_gate_up M=1", implementation)
    ]
    return found


def test_bytes_are_those_of_the_format() -> None:
    weights, x, y = 20480 * 2560, 2 * 2560, 4 * 20480
    assert _call("q4k").bytes_moved == weights * 4.5 / 8 + x + y
    assert _call("eq8_0").bytes_moved == _call("eq8_0").bytes_min == weights * 8.5 / 8 + x + y
    assert _call("bf16").bytes_moved == 2 * weights + x + y


def test_experts_count_as_often_as_they_can_be_chosen() -> None:
    by_rows = {
        c.shapes.x[0]: c.weights_read
        for c in calls(ops=["expert_matmul"], formats=["bf16"])
        if c.case == "26b_a4b_down"
    }
    assert by_rows == {8: 8 * 2816 * 704, 64: 64 * 2816 * 704, 4096: 128 * 2816 * 704}


def test_the_prediction_is_the_longest_of_bytes_and_instructions() -> None:
    call = _call()
    by_bytes = 1e6 * (call.bytes_moved / 4.3e12 + 2e-6)
    assert predicted_us("h200", call, 2.4) == pytest.approx(by_bytes)
    issue = 20480 * 2560 * 40 / 32 / (4 * 132 * 1.98e9)
    assert predicted_us("h200", call, 40) == pytest.approx(1e6 * (issue + 2e-6))
    assert predicted_us("h200", call, None) is None


def test_each_op_with_a_hand_kernel_is_registered() -> None:
    """A new one is found by its IMPLEMENTATIONS; only `OPS` has to name the op."""
    root = ROOT / "pallas_kernels"
    by_hand = {path.parent.name for path in root.glob("*/mosaic.py")}
    assert by_hand <= OPS.keys()
    for op in by_hand:
        assert any("mosaic" in name for name in OPS[op].implementations)


@cache
def compiled(target: str) -> list[dict[str, Any]]:
    """Shapes of decoding: long rows, many rows, and 26B-A4B's, whose K has chunks of 64."""
    only = r"quantized_matmul (e4b_gate_up|e4b_down|26b_a4b_dense_down) M=(1|8) "
    command = [sys.executable, "-m", "bench.static_kernels", "--target", target, "--only", only]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


needs_compiler = pytest.mark.skipif(
    not static_kernels.can_compile(), reason="the CUDA plugin of JAX compiles for GPUs"
)
needs_disassembler = pytest.mark.skipif(
    static_kernels.disassembler() is None, reason="nvidia-cuda-nvdisasm reads machine code"
)


@needs_compiler
@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_every_format_compiles_without_spills(target: str) -> None:
    found = compiled(target)
    assert {e["format"] for e in found} == set(WEIGHT_FORMATS)
    # Q6K needs K in 256s.
    assert len(found) == 2 * (3 * len(WEIGHT_FORMATS) - 1)
    for entry in found:
        assert entry["spill_bytes"] == 0, entry
        assert 0 < entry["registers"] <= 128, entry  # or 16 warps would not fit an SM
        # In fragment order a Q4K with super-blocks of 64 has its scales in bytes.
        assert 1 <= entry["bytes_moved"] / entry["bytes_min"] < 1.03, entry


@needs_compiler
@needs_disassembler
@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_loaded_16_bytes_at_a_time_by_few_instructions(target: str) -> None:
    """More of them than this, and an H200 would wait for them and not for the weights."""
    most = {("q4k", 1): 2.5, ("q4k", 8): 2.8, ("eq8_0", 1): 4, ("eq8_0", 8): 4}
    most |= {("q6k", 1): 4, ("q6k", 8): 4}
    for entry in compiled(target):
        assert entry["wide_loads"] >= 1, entry
        case, rows = entry["case"].split(" M=")
        limit = most.get((entry["format"], int(rows)))
        # Units of 64 columns share their header's work among fewer weights; a GB10 has bandwidth for far fewer
        # weights a cycle than its SMs can multiply.
        if limit and case != "26b_a4b_dense_down" and target != "gb10":
            assert 0 < entry["instructions_per_weight"] <= limit, entry
