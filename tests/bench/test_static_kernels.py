"""Hand kernels compiled for GPUs that are not there, and how their machine code is read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench import static_kernels
from bench.kernel_calls import NAMES, OPS, WEIGHT_FORMATS, Call, calls
from bench.static_kernels import hot_code, predicted_us, read_dumps
from pallas_kernels.quantized_matmul import mosaic_decode

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


def test_a_wait_that_goes_back_from_behind_the_exit_is_no_loop() -> None:
    again = "   -:-:-:Y:05        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;\n"
    back = again + "   -:-:-:Y:05        /*00e0*/                   BRA `(.L_x_1) ;\n"
    without_loops = "\n".join(line for line in SASS.splitlines() if "BRA" not in line)
    assert len(hot_code(without_loops + "\n" + back)) == 10  # the whole kernel


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


def _call(
    weight_format: str = "q4k",
    implementation: str = "mosaic",
    op: str = "quantized_matmul",
    name: str = "e4b_gate_up M=1",
) -> Call:
    [found] = [
        c
        for c in calls(ops=[op], formats=[weight_format])
        if (c.name, c.implementation) == (name, implementation)
    ]
    return found


def test_bytes_are_those_of_the_format() -> None:
    weights, x, y = 20480 * 2560, 2 * 2560, 4 * 20480
    assert _call("q4k").bytes_moved == weights * 4.5 / 8 + x + y
    assert _call("eq8_0").bytes_moved == _call("eq8_0").bytes_min == weights * 8.5 / 8 + x + y
    assert _call("bf16").bytes_moved == 2 * weights + x + y


def test_what_an_op_returns_is_counted_as_it_is_written() -> None:
    """Gated activations in bfloat16, of the head one index; candidates and products on the way to memory twice."""
    gated = _call("bf16", op="gated_matmul", name="e4b M=8")
    assert gated.bytes_moved == 2 * 20480 * 2560 + 2 * 8 * 2560 + 4 * 8 + 2 * 8 * 10240
    head, by_xla = (_call("bf16", name, "argmax_matmul", "e4b M=8") for name in ("mosaic", "xla"))
    assert by_xla.bytes_moved == head.bytes_min == 2 * 262144 * 2560 + 2 * 8 * 2560 + 4 * 8
    candidates = 8 * 262144 / (4 * mosaic_decode.default_config(*head.arguments).tiles)
    assert head.bytes_moved - head.bytes_min == 2 * 8 * candidates
    few, many = (_call("bf16", op="expert_down", name=f"26b_a4b M={t}") for t in (8, 512))
    assert few.bytes_moved == few.bytes_min
    assert few.bytes_min == 2 * 64 * (2816 * 704 + 704) + (4 + 4) * 64 + 4 * 8 * 2816
    assert many.bytes_moved - many.bytes_min == 2 * 4 * 4096 * 2816


@pytest.mark.parametrize(
    ("op", "name", "rows"),
    [
        ("quantized_matmul", "e4b_gate_up M=16", 16),
        ("gated_matmul", "e4b M=8", 8),
        ("argmax_matmul", "e4b M=1", 1),
        ("expert_matmul", "26b_a4b_gate_up M=64", 1),
        ("expert_gate_up", "26b_a4b M=512", 16),
        ("expert_down", "26b_a4b M=8", 1),
        ("expert_down", "26b_a4b M=512", 16),
    ],
)
def test_every_eight_rows_take_a_tensor_core_instruction_and_offsets_add_to_them(
    op: str, name: str, rows: int
) -> None:
    """Of experts the rows are those of a block. Q4K's offsets go at the end of 16 fragments or with each of four."""
    for weight_format in ("q4k", "eq8_0", "bf16"):
        call = _call(weight_format, op=op, name=name)
        of_q4k = (16 + 8 + 6) / 16 if call.shapes.w[-1] % 256 == 0 else 2
        expected = (of_q4k if weight_format == "q4k" else 1) * (2 if rows > 8 else 1)
        assert call.module.mmas_per_fragment(*call.arguments) == expected


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
    by_hand -= {"residual_norm"}  # whose own tests compile it
    assert by_hand <= set(NAMES)
    by_hand &= OPS.keys()
    for op in by_hand:
        [module] = [m for name, m in OPS[op].implementations.items() if "mosaic" in name]
        assert hasattr(module, "mmas_per_fragment")


# Served by wgmma on Hopper: more registers, and x is gathered.
MANY_ROWS = ("26b_a4b_down M=4096", "26b_a4b M=512")


@cache
def compiled(target: str) -> list[dict[str, Any]]:
    """A shape of decoding of every op; matmuls also of 26B-A4B, whose K has chunks of 64."""
    only = "|".join(
        (
            r"quantized_matmul (e4b_gate_up|26b_a4b_dense_down) M=(1|8|16) ",
            r"gated_matmul e4b M=(1|16) ",
            r"gelu_matmul e4b M=(1|16) ",
            r"argmax_matmul e4b M=8 ",
            r"expert_matmul 26b_a4b_(gate_up M=8|down M=4096) ",
            r"expert_gate_up 26b_a4b M=(8|512) ",
            r"expert_down 26b_a4b M=8 ",
        )
    )
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
    by_op = {op: {e["format"] for e in found if e["op"] == op} for op in OPS}
    for op, formats in by_op.items():
        # Q6K needs K in 256s: the experts' 704 are not.
        assert formats == set(WEIGHT_FORMATS) - ({"q6k"} if op == "expert_down" else set()), op
    for entry in found:
        assert entry["spill_bytes"] == 0, entry
        if target == "h200" and entry["case"] in MANY_ROWS:
            continue
        # Or 16 warps would not fit an SM, 12 of Q6K.
        assert 0 < entry["registers"] <= (168 if entry["format"] == "q6k" else 128), entry
        # In fragment order a Q4K with super-blocks of 64 has its scales in bytes.
        assert 1 <= entry["bytes_moved"] / entry["bytes_min"] < 1.03, entry


@needs_compiler
@needs_disassembler
@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_loaded_16_bytes_at_a_time_by_few_instructions(target: str) -> None:
    """More of them than this, and an H200 would wait for them and not for the weights."""
    most = {("q4k", 1): 2.25, ("q4k", 8): 2.5, ("q4k", 16): 3.35, ("eq8_0", 1): 4, ("eq8_0", 8): 4}
    most |= {("q6k", 1): 4, ("q6k", 8): 4}
    for entry in compiled(target):
        assert entry["wide_loads"] >= 1, entry
        assert entry["instructions_per_weight"] > 0, entry
        case, rows = entry["case"].split(" M=")
        if target == "h200" and entry["case"] in MANY_ROWS:
            assert entry["instructions_per_weight"] <= 9.5, (
                entry
            )  # dequantized once for all rows of a block
        # A GB10 has bandwidth for far fewer weights a cycle than its SMs can multiply.
        if case == "e4b_gate_up" and target != "gb10":
            limit = most.get((entry["format"], int(rows)), math.inf)
            assert entry["instructions_per_weight"] <= limit, entry


SHARED = """
import jax
from bench.kernel_calls import KernelCase
from bench.static_kernels import entry
jax.config.update("jax_platforms", "cpu")
keys = "registers", "shared_bytes", "instructions_per_weight"
for case in (
    KernelCase("expert_matmul", "26b_a4b_down", "mosaic", "q4k", 4096),
    KernelCase("expert_down", "26b_a4b", "mosaic", "q4k", 512),
):
    print([entry("h200", case.call)[key] for key in keys])
print(entry("h200", KernelCase("quantized_matmul", "e4b_gate_up", "mosaic", "bf16", 512).call))
"""


@needs_compiler
@pytest.mark.heavy
def test_a_kernel_that_another_call_had_is_known_and_a_call_without_one_has_no_entry() -> None:
    """Mosaic compiles a kernel once in a process; bfloat16 weights with many rows are multiplied by XLA."""
    run = subprocess.run([sys.executable, "-c", SHARED], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second, without = run.stdout.splitlines()
    assert first == second
    assert without == "None"


def test_dumps_belong_together_by_name_and_not_by_number(tmp_path: Path) -> None:
    """Mosaic counts what it traces and what it assembles, and assembles equal kernels once."""
    (tmp_path / "some_kernel_12.ptxas").write_text("Used 96 registers, 8 bytes spill stores")
    (tmp_path / "some_kernel_15.resources.txt").write_text("Resources(smem_scratch_bytes=2048)")
    (tmp_path / "other_15.resources.txt").write_text("Resources(smem_scratch_bytes=4096)")
    [machine] = read_dumps(tmp_path)
    assert (machine.registers, machine.spill_bytes, machine.shared_bytes) == (96, 8, 2048)
