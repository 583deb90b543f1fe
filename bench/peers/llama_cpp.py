"""llama.cpp, measured by its own ``llama-bench`` on our parameters written as GGUF."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from bench.plan import PREFILL, Case
from bench.processes import in_own_process

# What llama-bench says of itself, and is kept.
_FACTS = ("build_commit", "build_number", "cpu_info", "gpu_info", "backends")
_OF_A_CASE = ("model_type", "model_size", "flash_attn", "n_gpu_layers", "n_threads")
_SECONDS_TO_END = 10.0
_REASON = re.compile(r"error|assert|fail|unable|out of memory", re.IGNORECASE)


class LlamaCpp:
    """``llama-bench`` as a `bench.processes.Engine`.

    One process of it serves as many cases of a phase as follow each other, so that the model is loaded once. If it ends
    early, that fails the case at hand, and a new process starts with the next one.
    """

    def __init__(
        self, binary: Path, gguf: Path | None, cases: Sequence[Case], samples: int, *, on_gpu: bool
    ) -> None:
        """`gguf` is a file to run; without one, the cases' model is written to a temporary one.

        Raises:
          OSError: `binary` or `gguf` is not there.
          RuntimeError: the file cannot be written.
        """
        self._binary, self._samples, self._on_gpu = binary.resolve(), samples, on_gpu
        if not os.access(self._binary, os.X_OK):
            raise OSError(f"{binary} is not there or not a program")
        self._folder = tempfile.TemporaryDirectory(prefix="gguf-")
        name = f"{Path(cases[0].model).name}-{cases[0].format}.gguf"
        self._gguf = gguf or Path(self._folder.name) / name
        self._waiting = list(cases)
        self._expected: list[Case] = []
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._command: list[str] = []
        if gguf is None:
            model, weight_format = cases[0].model, cases[0].format
            try:
                in_own_process(write_model, model, weight_format, self._gguf)
            except BaseException:
                self._folder.cleanup()
                raise
        elif not gguf.is_file():
            raise OSError(f"{gguf}: no such GGUF file")

    def close(self) -> None:
        """Ends ``llama-bench`` and deletes the file that was written for it."""
        self._end()
        self._folder.cleanup()

    def measure(self, case: Case) -> dict[str, Any]:
        """The samples of one case.

        Raises:
          RuntimeError: ``llama-bench`` ended without them; its last words are in the message.
        """
        if case not in self._expected:
            self._start(case)
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue
            values = json.loads(line)
            answered = self._expected.pop(0)
            if answered != case:
                continue  # one that nobody asked for any more
            return {
                "seconds": [nanoseconds / 1e9 for nanoseconds in values["samples_ns"]],
                "command": shlex.join(_without_folders(self._command)),
                "weight_bytes": values.get("model_size"),
                "engine_settings": {k: values[k] for k in _OF_A_CASE if k in values},
                "peer": {k: values[k] for k in _FACTS if k in values},
            }
        status, words = self._process.wait(), self._last_words()
        self._end()
        raise RuntimeError(f"llama-bench ended with status {status}: {words}")

    def _start(self, case: Case) -> None:
        """Starts a process for `case` and those of its phase that come after it."""
        self._end()
        rest = self._waiting[self._waiting.index(case) :] if case in self._waiting else [case]
        self._expected = [c for c in rest if c.phase == case.phase]
        command = [
            str(self._binary),
            "-m",
            str(self._gguf),
            "-o",
            "jsonl",
            "-r",
            str(self._samples),
        ]
        command += ["-ngl", "99", "-fa", "1"] if self._on_gpu else ["-t", str(_cores())]
        if case.phase == PREFILL:
            command += ["-n", "0", "-p", ",".join(str(c.tokens) for c in self._expected)]
        else:
            # One length of generation for all: a sweep has only one.
            depths = ",".join(str(c.depth) for c in self._expected)
            command += ["-p", "0", "-n", str(case.new_tokens), "-d", depths]
        folder = str(self._binary.parent)
        search = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - _end closes it
        self._command = command
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"LD_LIBRARY_PATH": ":".join(search)},
        )

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        # A crash prints a backtrace after its reason.
        reasons = [line for line in lines if _REASON.search(line)]
        return " | ".join((reasons or lines)[-3:]) or "(nothing on standard error)"

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        if self._errors is not None:
            self._errors.close()
        self._process, self._errors, self._expected = None, None, []


def write_model(model: str, weight_format: str, path: Path) -> None:
    """Writes the parameters that our engine is measured with as a GGUF file."""
    from bench.gguf_file import write_gguf  # the gguf package is optional
    from bench.measure import load_weights

    config, params = load_weights(model, weight_format)
    write_gguf(params, config, path, weight_format=weight_format)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _without_folders(command: list[str]) -> list[str]:
    """A command as it is published: which files it names, not where they lay on the machine that ran it."""
    return [Path(word).name if Path(word).is_absolute() else word for word in command]
