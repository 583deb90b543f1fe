"""A job: every line of the input answered exactly once, whatever happens in between.

    input lines ──▶ rows ──▶ requests ──▶ engine ──▶ completions ──▶ OUT, as they end
         └───────────── what cannot be answered ──────────────────▶ OUT.errors.jsonl

Nothing is kept in memory but the rows under way. Files grow by whole groups of lines (`gemma_jax.batch.files`); a job
that was cut off is run again with the same command and goes on where its files end (`gemma_jax.batch.ledger`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from gemma_jax.batch.answers import answer_record, error_record
from gemma_jax.batch.files import STANDARD_STREAM, LineReader, LineWriter, whole_lines
from gemma_jax.batch.ledger import Ledger
from gemma_jax.batch.progress import Progress
from gemma_jax.batch.records import (
    LineError,
    Row,
    Served,
    parse_line,
    requests_of,
)
from gemma_jax.batch.sidecar import check_same_job, locked, write_down
from gemma_jax.engine import Request, Result


class Runs(Protocol):
    """What answers requests: `gemma_jax.Engine`, or workers on a cluster."""

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields a result for every request as each ends, and pulls requests no faster than it needs them."""
        ...


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of a job.

    Attributes:
      rows: lines of the input.
      answered, failed: how many of them are in the output and in the error file.
      answered_now, failed_now: how many this run wrote there.
    """

    rows: int
    answered: int
    failed: int
    answered_now: int
    failed_now: int


def run_job(
    source: str,
    output: str,
    served: Served,
    engine: Callable[[int], Runs],
    *,
    slots: int,
    errors: str | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Answers every line of `source` that `output` does not answer yet.

    Args:
      source: JSON lines, "-" for standard input; ".gz" and ".zst" are decompressed.
      output: gets a line for each that is answered, in the order in which they end. "-" is standard output; such a job
        cannot be resumed, and its error records go to standard error.
      served: model name, tokenizer and limits.
      engine: makes what answers requests, for that many rows at a time.
      slots: rows at a time. Where the device has no memory for them, half as many are tried.
      errors: file of error records; ``output`` + ".errors.jsonl" by default.
      settings: what answers depend on besides the input (the model, its format); a job is resumed with the same.
      progress: is told what happens.

    Raises:
      ValueError: input or output is damaged, or `output` is no file or belongs to another job.
      BlockingIOError: another process writes `output`.
      OSError: a file cannot be read or written; what was written before is whole.
    """
    errors = errors or (STANDARD_STREAM if output == STANDARD_STREAM else f"{output}.errors.jsonl")
    with contextlib.ExitStack() as stack:
        ledger = Ledger()
        stack.callback(ledger.close)
        reader = stack.enter_context(LineReader(source))
        if output != STANDARD_STREAM:
            stack.enter_context(locked(Path(output)))
            for path in (output, errors):
                if Path(path).exists() and not Path(path).is_file():
                    raise ValueError(f"{path} is not a file; a job writes to files, or to -")
            sidecar, written = Path(f"{output}.job.json"), (Path(output), Path(errors))
            if any(path.exists() and path.stat().st_size for path in written):
                check_same_job(sidecar, source, settings or {})
            else:
                write_down(sidecar, source, settings or {})
            ledger.read(whole_lines(Path(output)), whole_lines(Path(errors)), (output, errors))
        answers = LineWriter(output)
        stack.callback(answers.close)
        failures = _ErrorStream() if errors == STANDARD_STREAM else LineWriter(errors)
        stack.callback(failures.close)
        progress = progress or Progress(show=False)
        progress.begin(reader, ledger.answered, ledger.failed)
        job = _Job(reader, ledger, answers, failures, served, progress)
        job.run(engine, slots)
        answers.flush()
        failures.flush()
    return job.summary()


class _Job:
    def __init__(
        self,
        reader: LineReader,
        ledger: Ledger,
        answers: LineWriter,
        failures: LineWriter | _ErrorStream,
        served: Served,
        progress: Progress,
    ) -> None:
        self._lines = iter(reader)
        self._ledger, self._served, self._progress = ledger, served, progress
        self._answers, self._failures = answers, failures
        self._rows = self._answered = self._failed = 0
        # Requests that an engine has and has not answered, and of rows with several choices what is answered so far.
        self._under_way: dict[tuple[int, int], Request] = {}
        self._again: collections.deque[Request] = collections.deque()
        self._choices: dict[int, list[Result]] = {}

    def run(self, engine: Callable[[int], Runs], slots: int) -> None:
        """Answers all lines; with fewer slots if the device runs out of memory."""
        new = self._requests()
        while True:
            try:
                for result in engine(slots).run(self._handed_out(new)):
                    self._take(result)
                return
            except RuntimeError as error:  # XLA's errors derive from it
                if "RESOURCE_EXHAUSTED" not in str(error) or slots == 1:
                    raise
            slots //= 2
            self._progress.note(f"not enough memory on the device: going on with {slots} at a time")
            self._again.extend(self._under_way.values())
            self._under_way.clear()

    def _handed_out(self, new: Iterator[Request]) -> Iterator[Request]:
        """Requests that an engine has not answered, then new ones."""
        while (request := self._again.popleft() if self._again else next(new, None)) is not None:
            self._under_way[_place(request)] = request
            yield request

    def _requests(self) -> Iterator[Request]:
        """Requests of the lines that are neither answered nor reported; what cannot be answered is reported here."""
        for number, data in enumerate(self._lines, 1):
            self._rows = number
            self._answers.flush_if_due()
            self._failures.flush_if_due()
            if not data.strip():
                continue
            try:
                yield from self._requests_of_line(data, number)
            except LineError as error:
                if not self._ledger.is_reported(number):
                    self._report(number, error)
            self._progress.read(number)

    def _requests_of_line(self, data: bytes, number: int) -> list[Request]:
        row = parse_line(data, number)
        claim = self._ledger.claim(row.custom_id, number)
        if claim == "answered" or self._ledger.is_reported(number):
            return []
        if claim == "duplicate":
            message = f"custom_id: {row.custom_id!r} is that of an earlier line"
            raise LineError("duplicate_custom_id", message, row.custom_id)
        return requests_of(row, self._served)

    def _take(self, result: Result) -> None:
        """Writes a row when its last choice has come."""
        row, _ = result.request.key
        place = _place(result.request)
        if place not in self._under_way:
            return  # another choice of its row has failed
        del self._under_way[place]
        if result.completion is None:
            self._choices.pop(row.line, None)
            for key in [key for key in self._under_way if key[0] == row.line]:
                del self._under_way[key]
            self._report(row.line, LineError("invalid_request", result.error or "", row.custom_id))
            return
        self._progress.computed(result)
        results = self._choices.setdefault(row.line, [])
        results.append(result)
        if len(results) == int(row.body.get("n") or 1):
            self._answer(row, self._choices.pop(row.line))

    def _answer(self, row: Row, results: list[Result]) -> None:
        results.sort(key=lambda result: result.request.key[1])
        completions = [result.completion for result in results if result.completion is not None]
        requests = [result.request for result in results]
        self._answers.write(
            answer_record(row, self._served, requests, completions, results[0].cached_tokens)
        )
        self._answered += 1
        self._progress.answered()

    def _report(self, line: int, error: LineError) -> None:
        self._failures.write(error_record(line, error))
        self._failed += 1
        self._progress.failed()

    def summary(self) -> Summary:
        return Summary(
            self._rows,
            self._ledger.answered + self._answered,
            self._ledger.failed + self._failed,
            self._answered,
            self._failed,
        )


def _place(request: Request) -> tuple[int, int]:
    row, choice = request.key
    return row.line, choice


class _ErrorStream:
    """Error records on standard error, for jobs that have no file for them."""

    def write(self, line: bytes) -> None:
        sys.stderr.write(line.decode() + "\n")

    def flush_if_due(self) -> None:
        pass

    def flush(self) -> None:
        sys.stderr.flush()

    close = flush
