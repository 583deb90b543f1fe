"""What the hand kernels compile to on GPUs that are not here: registers, spills, shared memory, instructions.

    python -m bench.static_kernels --target h200 [--only REGEX]
    python -m bench.static --json FILE --batch --no-prefill --target h200 b200 gb10

Compiles every Mosaic implementation of an op on every named case and prints a JSON object for each; the second command
puts them under ``"kernels"`` of a file, and nothing else. One process per target, as everywhere (`bench.aot`). A call
that is served without a kernel of Mosaic's is left out. Registers, spills and shared memory are what the assembler and
Mosaic report. Instructions are counted in the machine code, which needs NVIDIA's disassembler
(``nvidia-cuda-nvdisasm``, in the `test` extra on Linux); without it what hangs on them is None.

`instructions_per_weight` is of the *hot* code: the innermost loop with a tensor-core instruction in it, or the whole
kernel where a warp's work is no loop. Its instructions are divided by the weights that a lane multiplies there. A
compiler may have unrolled the loop, so these are not read from the source but from the tensor-core instructions: each
takes a 16 x 16 fragment of weights, eight a lane, and the implementation's `mmas_per_fragment` says how many of them
take the same one.

`predicted_us` is a model, not a measurement, and a lower bound: the longest of three times (the bytes at the target's
bandwidth, the instructions at four a cycle and SM, the products at the nominal rate of the tensor cores) and a launch.
Uneven work and latency take none. No card has checked it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench import aot
from bench.attention_calls import AttentionCall
from bench.kernel_calls import Call, calls, is_hand_kernel
from bench.prediction_model import LAUNCH_SECONDS, device
from pallas_kernels.target import compiling_for

# Nominal operations per second on dense bfloat16.
TENSOR_FLOPS = {"h200": 989e12, "h100": 989e12, "b200": 2250e12, "gb10": 125e12}
_LANES = 32
# In an A fragment of mma.m16n8k16; wgmma's 64 rows are four of them, one for each warp.
_WEIGHTS_OF_A_LANE = 16 * 16 // _LANES

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_JUMP = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")
_MMA = re.compile(r"(?:H|HG|UTCH)MMA\b")
_KERNEL = re.compile(r'kernel_hash = "(.*?)", module = ')
_WIDE_LOAD = re.compile(r"LDG\.E\.NA\b[\w.]*\.128\b")  # past L1, as only weights are read


def hot_code(sass: str) -> list[str]:
    """The instructions of the innermost loop that has a tensor-core instruction; all of the kernel's without one."""
    places: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append(found[1].strip())
    loops = []
    for i, instruction in enumerate(code):
        jump = _JUMP.search(instruction)
        if jump and places.get(jump[1], i + 1) <= i:
            loop = code[places[jump[1]] : i + 1]
            if any(map(_MMA.match, loop)) and not _is_retry(loop):
                loops.append(loop)
    return min(loops, key=len) if loops else [c for c in code if not c.startswith("NOP")]


def _is_retry(loop: list[str]) -> bool:
    """Whether it is a wait that goes back into the kernel from behind its end: a barrier is asked again after EXIT."""
    exits = [i for i, c in enumerate(loop) if c.startswith("EXIT")]
    return bool(exits) and any(c.startswith("SYNCS") for c in loop[exits[-1] :])


class Hot(NamedTuple):
    """What is counted in a kernel's hot code; of the loads those of 16 bytes that bypass L1."""

    instructions: int
    mmas: int
    wide_loads: int


class Machine(NamedTuple):
    """What a kernel was compiled to; `hot` is None without a disassembler."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    hot: Hot | None = None


def read_dumps(folder: Path) -> list[Machine]:
    """The kernels whose dumps Mosaic has written to a folder; of kernels of one name the most shared memory.

    Shared memory is written down when a kernel is traced, the rest when it is assembled, which an equal one is spared:
    the numbers in the names of their files count different things.
    """
    machines = []
    for report in sorted(folder.glob("*.ptxas")):
        text, name = report.read_text(), report.stem.rpartition("_")[0]
        machine = Machine(
            registers=_number(r"Used (\d+) registers", text),
            spill_bytes=_number(r"(\d+) bytes spill stores", text),
            shared_bytes=max(
                _number(r"smem_scratch_bytes=(\d+)", resources.read_text())
                for resources in folder.glob(f"{name}_*.resources.txt")
            ),
        )
        sass = report.with_suffix(".sass_ctrl")
        if sass.exists():
            hot = hot_code(sass.read_text())
            counts = [sum(p.match(line) is not None for line in hot) for p in (_MMA, _WIDE_LOAD)]
            machine = machine._replace(hot=Hot(len(hot), *counts))
        machines.append(machine)
    return machines


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"a dump of Mosaic's has no {pattern!r}: {text[:200]!r}")
    return int(found[1])


@contextlib.contextmanager
def dumped() -> Iterator[Path]:
    """A folder that gets Mosaic's dumps of what is compiled inside, machine code too if there is a disassembler."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"MOSAIC_GPU_DUMP_TO": folder}
        if root := disassembler():
            # Importing Mosaic has set the last of these to where JAX has CUDA, which need not have a disassembler.
            wanted |= {"MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_CUDA_ROOT": str(root)}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def can_compile() -> bool:
    """Whether JAX's compiler for CUDA is installed."""
    return any(
        importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.{name}")
        for name in ("xla_cuda12", "xla_cuda13")
    )


def disassembler() -> Path | None:
    """The folder whose ``bin`` has nvdisasm, as NVIDIA's wheel installs it."""
    spec = importlib.util.find_spec("nvidia")
    for packages in (spec and spec.submodule_search_locations) or ():
        for found in sorted(Path(packages).glob("*/bin/nvdisasm")):
            return found.parents[1]
    return None


# By the kernels of a program: one that is compiled for several calls is compiled, and dumped, once in a process.
_compiled: dict[frozenset[str], list[Machine]] = {}


def entry(target: str, call: Call | AttentionCall) -> dict[str, Any] | None:
    """Compiles a call and returns what there is to say about it, ready for JSON; None if it has no kernel of Mosaic's.

    Of a call with several kernels: the most registers, shared memory and instructions per weight, and all spills.

    Raises:
        RuntimeError: Mosaic dumped nothing.
    """
    with dumped() as folder:
        program = aot.compile_for(target, call.run, *call.arguments)
        kernels = frozenset(_KERNEL.findall(program.as_text() or ""))
        machines = read_dumps(folder) or _compiled.get(kernels)
    if not kernels:
        return None
    if not machines:
        raise RuntimeError(f"{call.op} {call.name} {call.format}: Mosaic dumped nothing")
    _compiled[kernels] = machines
    # Which kernel serves, an implementation also tells from the GPU.
    with compiling_for(aot.compute_capability(target)):
        return _entry(target, call, machines)


def _entry(target: str, call: Call | AttentionCall, machines: Sequence[Machine]) -> dict[str, Any]:
    """What `entry` says of a call that was compiled to `machines`."""
    # Attention of prompts has no weights: two products of tensor cores meet in its loop.
    counts_weights = hasattr(call.module, "mmas_per_fragment")
    hot = [m.hot for m in machines if counts_weights and m.hot and m.hot.mmas]
    shared_by = call.module.mmas_per_fragment(*call.arguments) if hot else 1
    per_weight = [h.instructions * shared_by / (_WEIGHTS_OF_A_LANE * h.mmas) for h in hot]
    instructions = max(per_weight, default=None)
    return {
        "op": call.op,
        "case": call.name,
        "implementation": call.implementation,
        "format": call.format,
        "target": target,
        "registers": max(m.registers for m in machines),
        "spill_bytes": sum(m.spill_bytes for m in machines),
        "shared_bytes": max(m.shared_bytes for m in machines),
        "instructions_per_weight": instructions,
        "wide_loads": sum(h.wide_loads for h in hot) if hot else None,
        "bytes_moved": call.bytes_moved,
        "bytes_min": call.bytes_min,
        "predicted_us": predicted_us(target, call, instructions),
    }


def predicted_us(
    target: str, call: Call | AttentionCall, instructions_per_weight: float | None
) -> float | None:
    """The lower bound that the module's docstring describes; None without instructions."""
    if instructions_per_weight is None:
        return None
    gpu = device(target)
    seconds = max(
        call.bytes_moved / gpu.bandwidth,
        instructions_per_weight * call.weights_read / (_LANES * gpu.sms * gpu.issue_rate),
        call.flops / TENSOR_FLOPS[target],
    )
    return 1e6 * (seconds + LAUNCH_SECONDS)


def entries(
    target: str, only: str = "", without: Sequence[Mapping[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """The entry of every Mosaic implementation's calls on a target that have a kernel, of those that match `only`.

    Those that are in `without` already are left out.
    """
    done = {tuple(e[key] for key in ("op", "case", "format", "target")) for e in without}
    with compiling_for(aot.compute_capability(target)):
        served = list(calls(implementations=is_hand_kernel))
    for call in served:
        is_new = (call.op, call.name, call.format, target) not in done
        is_wanted = is_new and re.search(only, f"{call.op} {call.name} {call.format}")
        if is_wanted and (found := entry(target, call)):
            yield found


def main(argv: list[str] | None = None) -> int:
    """Prints a JSON object a line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.static_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=aot.TARGETS, required=True)
    parser.add_argument("--only", default="", help="regular expression: 'op case M=rows format'")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    for found in entries(options.target, options.only):
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
