"""How long a GPU will take for a program that was compiled for it: a model, not a measurement.

    time = sum over kernels of  max(bytes / bandwidth, instructions / issue rate) + launch        seconds

    bytes         what the kernel reads and writes in device memory (`bench.hlo`)
    bandwidth     `COPY_SHARE` of the nominal one, bytes/s
    instructions  that all its warps issue (`bench.ptx`)
    issue rate    min(blocks, SMs) * 4 schedulers * clock, one instruction of a warp per cycle and scheduler
    launch        `LAUNCH_SECONDS`, whatever runs before and after a kernel included

SMs and clock are those that the compiler is told (`bench/gpu_targets`), the clock the highest that the chip may run at.
Every instruction takes one slot, though conversions and shuffles take more, and no kernel waits for its loads: so it is
optimistic. No card has checked it; `bench.report` computes its error for every step that a sweep has measured.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from bench.aot import TARGETS_FOLDER
from bench.hlo import Kernel
from bench.ptx import Launch

COPY_SHARE = (
    4.3 / 4.8
)  # of an H200, in TB/s: a copy within its memory, and nominal; the others are taken to be alike
LAUNCH_SECONDS = 2e-6


class Device(NamedTuple):
    """Bytes per second of a copy, SMs, and warp instructions per second of one of them."""

    bandwidth: float
    sms: int
    issue_rate: float


class Prediction(NamedTuple):
    """Seconds of a program, and of its bytes and instructions if it consisted of nothing else."""

    seconds: float
    bytes_seconds: float
    instruction_seconds: float


@functools.cache
def device(target: str) -> Device:
    """The facts of a target that the model needs."""
    text = (TARGETS_FOLDER / f"{target}.txtpb").read_text()

    def fact(name: str) -> float:
        found = re.search(rf"^ *{name}: ([\d.]+)$", text, re.MULTILINE)
        if not found:
            raise ValueError(f"the description of {target} has no {name}")
        return float(found[1])

    schedulers = fact("fpus_per_core") / fact("threads_per_warp")
    return Device(
        bandwidth=fact("memory_bandwidth") * COPY_SHARE,
        sms=int(fact("core_count")),
        issue_rate=schedulers * fact("clock_rate_ghz") * 1e9,
    )


def predict(kernels: Sequence[Kernel], launches: dict[str, Launch], target: str) -> Prediction:
    """The model for `kernels`, of which those without a launch (copies) issue nothing."""
    gpu = device(target)
    total = bytes_total = instruction_total = 0.0
    for kernel in kernels:
        moving = kernel.bytes / gpu.bandwidth
        issuing = 0.0
        if launch := launches.get(kernel.name):
            issuing = launch.instructions / (min(launch.blocks, gpu.sms) * gpu.issue_rate)
        total += max(moving, issuing) + LAUNCH_SECONDS
        bytes_total += moving
        instruction_total += issuing
    return Prediction(total, bytes_total, instruction_total)
