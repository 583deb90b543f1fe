"""What a job tells of itself while it runs: a bar on the terminal, a file of metrics."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gemma_jax.batch.files import LineReader
from gemma_jax.engine import Result

_SECONDS_BETWEEN_METRICS = 5.0
_HELP = {
    "rows_read": ("counter", "lines of the input read, those of earlier runs among them"),
    "rows_answered": ("counter", "lines in the output"),
    "rows_failed": ("counter", "lines in the error file"),
    "prompt_tokens": ("counter", "tokens of prompts of answered requests, this run"),
    "cached_prompt_tokens": (
        "counter",
        "of these not computed, because another request began with them",
    ),
    "generated_tokens": ("counter", "tokens generated, this run"),
    "prompt_tokens_per_second": ("gauge", "since the start of the run"),
    "generated_tokens_per_second": ("gauge", "since the start of the run"),
    "seconds": ("gauge", "since the start of the run"),
}


class Progress:
    """Counts what happens and shows it.

    Args:
      show: a bar on standard error; None shows one if that is a terminal.
      metrics: a file that is written every five seconds: ``.jsonl`` gets a line each time, anything else is replaced
        by Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/).
    """

    def __init__(self, show: bool | None = None, metrics: str | None = None) -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._metrics = Path(metrics) if metrics else None
        self._bar: Any = None
        self._reader: LineReader | None = None
        self._started = self._written = time.monotonic()
        self._counts = dict.fromkeys(_HELP, 0.0)

    def begin(self, reader: LineReader, answered: int, failed: int) -> None:
        """A run begins with so many rows done."""
        self._started = self._written = time.monotonic()
        self._reader = reader
        self._counts |= {"rows_answered": answered, "rows_failed": failed}
        if self._show:
            from tqdm import tqdm

            self._bar = tqdm(
                total=reader.total, desc="batch", unit="B", unit_scale=True, file=sys.stderr
            )

    def read(self, rows: int) -> None:
        """So many lines were read."""
        self._counts["rows_read"] = rows
        self._update()

    def answered(self) -> None:
        """A row was answered."""
        self._counts["rows_answered"] += 1
        self._update()

    def failed(self) -> None:
        """A row was reported."""
        self._counts["rows_failed"] += 1
        self._update()

    def computed(self, result: Result) -> None:
        """A request was answered."""
        assert result.completion is not None
        self._counts["prompt_tokens"] += result.completion.prompt_tokens
        self._counts["cached_prompt_tokens"] += result.cached_tokens
        self._counts["generated_tokens"] += len(result.completion.tokens)

    def note(self, message: str) -> None:
        """Says something that a user should know."""
        print(f"gemma-jax: {message}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The run is over, well or not."""
        self._update(last=True)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def values(self) -> dict[str, float]:
        """Everything counted, by name."""
        seconds = time.monotonic() - self._started
        counts = self._counts
        rates = {
            f"{name}_per_second": counts[name] / max(seconds, 1e-9)
            for name in ("prompt_tokens", "generated_tokens")
        }
        return counts | rates | {"seconds": seconds}

    def _update(self, last: bool = False) -> None:
        if self._bar is not None and self._reader is not None:
            values = self.values()
            self._bar.set_postfix_str(
                f"{values['rows_answered']:.0f} answered, {values['rows_failed']:.0f} failed, "
                f"prefill {values['prompt_tokens_per_second']:.0f} tok/s, "
                f"decode {values['generated_tokens_per_second']:.0f} tok/s",
                refresh=False,
            )
            self._bar.update(self._reader.position - self._bar.n)
        now = time.monotonic()
        if self._metrics and (last or now - self._written >= _SECONDS_BETWEEN_METRICS):
            self._written = now
            self._write(self._metrics)

    def _write(self, path: Path) -> None:
        values = self.values()
        if path.suffix == ".jsonl":
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time()} | values) + "\n")
            return
        lines = []
        for name, value in values.items():
            kind, text = _HELP[name]
            full = f"gemma_jax_batch_{name}" + ("_total" if kind == "counter" else "")
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value:.9g}"]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
