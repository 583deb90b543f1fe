"""An engine without a model, importable by the processes that `bench.processes` starts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench.plan import Case


class ToyEngine:
    """Takes a thousandth of a second per position; batches say what goes wrong."""

    FAILS, DIES, HANGS = 3, 4, 7

    def __init__(self, log: Path) -> None:
        self.log = log
        if log.name == "does-not-start":
            raise OSError("no such weights")
        self._note("open")

    def close(self) -> None:
        self._note("close")

    def measure(self, case: Case) -> dict[str, Any]:
        self._note(str(case))
        if case.batch == self.FAILS:
            raise MemoryError(f"{case.size} positions do not fit")
        if case.batch == self.DIES:
            os._exit(9)
        if case.batch == self.HANGS:
            time.sleep(600)
        return measured(case)

    def _note(self, text: str) -> None:
        with self.log.open("a") as file:
            print(text, file=file)


def measured(case: Case) -> dict[str, Any]:
    """Three samples whose median is a millisecond per position."""
    seconds = [case.size * n / 1e3 for n in (3.0, 1.0, 0.5)]
    values: dict[str, Any] = {"seconds": seconds, "compile_seconds": 2.0, "weight_bytes": 10**9}
    values |= {"peak_bytes": 10**9 + 1000 * case.size, "peak_bytes_of": "a toy", "layers": 2}
    least = {"bytes_min": 2e8} if case.phase == "decode" else {"flops_min": 10**9 * case.size}
    return values | least


ENVIRONMENT: dict[str, Any] = {
    "device": "NVIDIA Toy",
    "platform": "gpu",
    "driver": "toy driver",
    "cores": 2,
    "python": "3.12",
    "versions": {"jax": "1"},
    "commit": "abc",
    "uncommitted_changes": False,
    "time": "2026-01-01T00:00:00+00:00",
}
CEILINGS: dict[str, dict[str, Any]] = {
    "copy_bytes_per_second": {"seconds": [0.1], "bytes": 10**12, "what": "copy of toys"},
    "gemm_flops_per_second": {"seconds": [0.1], "flops": 10**15, "what": "product of toys"},
}
