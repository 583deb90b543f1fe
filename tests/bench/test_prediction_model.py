"""The model of a step's time: what binds each kernel, on kernels whose answers are known."""

from __future__ import annotations

import pytest

from bench.aot import TARGETS
from bench.hlo import Kernel
from bench.prediction_model import COPY_SHARE, LAUNCH_SECONDS, device, predict
from bench.ptx import Launch


def kernel(name: str, nbytes: int) -> Kernel:
    return Kernel(name, "fusion", "f32[8]", read=nbytes - 32, written=32)


def test_an_h200_copies_4_3_terabytes_and_issues_a_trillion_instructions_a_second() -> None:
    gpu = device("h200")
    assert gpu.bandwidth == pytest.approx(4.3e12)
    assert gpu.sms * gpu.issue_rate == pytest.approx(132 * 4 * 1.98e9)


@pytest.mark.parametrize("target", TARGETS)
def test_each_kernel_takes_the_longer_of_its_bytes_and_its_instructions(target: str) -> None:
    gpu = device(target)
    ms = int(gpu.bandwidth * 1e-3)
    issued = round(gpu.sms * gpu.issue_rate * 1e-3)
    launches = {
        "bytes": Launch(10_000, issued),
        "instructions": Launch(10_000, 4 * issued),
    }
    kernels = [kernel("bytes", 3 * ms), kernel("instructions", 2 * ms), kernel("copy.1", ms)]
    found = predict(kernels, launches, target)
    assert found.bytes_seconds == pytest.approx(6e-3)
    assert found.instruction_seconds == pytest.approx(5e-3)
    assert found.seconds == pytest.approx(3e-3 + 4e-3 + 1e-3 + 3 * LAUNCH_SECONDS)


def test_a_kernel_of_one_block_has_one_sm() -> None:
    gpu = device("h200")
    launches = {"small": Launch(blocks=1, instructions=8000)}
    found = predict([kernel("small", 64)], launches, "h200")
    assert found.seconds == pytest.approx(8000 / gpu.issue_rate + LAUNCH_SECONDS)


def test_without_instructions_the_time_is_that_of_bytes_and_launches() -> None:
    found = predict([kernel("a", 4_300_000)], {}, "h200")
    assert found.seconds == pytest.approx(4.3e6 / (4.8e12 * COPY_SHARE) + LAUNCH_SECONDS)
