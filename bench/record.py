"""The JSON file of a benchmark: read back to go on, written whole after every case."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

BENCHMARK = "sweep"


class AnyCase(Protocol):
    """One thing to measure; hashable."""

    def to_json(self) -> dict[str, Any]:
        """The keys of a result that say which case it is of."""


class Record[C: AnyCase]:
    """Results of a benchmark and what they were measured on.

    ``{"benchmark": "sweep", "settings": {…}, "runs": […], "results": […], "ceilings": {…}}``: `settings` are those
    that every result shares, `runs` the environment and command line of each call that added results. Every result
    holds the keys of its case, then its measurements or an "error", and the index of its run.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        case_of: Callable[[dict[str, Any]], C],
        benchmark: str = BENCHMARK,
    ) -> None:
        """Opens the file, or starts one that is written with the first result.

        Args:
          path: of the file.
          settings: those that every result shares.
          case_of: the case that a result is of.
          benchmark: the name of what writes the file.

        Raises:
          ValueError: it is of another benchmark, or of other settings.
          OSError: it cannot be read.
        """
        self.path = path
        self._case_of = case_of
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "settings": settings,
            "runs": [],
            "results": [],
            "ceilings": {},
        }
        self._run: dict[str, Any] | None = None
        if path.exists():
            self.content = read(path, benchmark)
            _check_settings(path, self.content["settings"], settings)

    @property
    def results(self) -> list[dict[str, Any]]:
        """All results so far."""
        results: list[dict[str, Any]] = self.content["results"]
        return results

    @property
    def done(self) -> dict[C, dict[str, Any]]:
        """The result of every case that has one."""
        return {self._case_of(result): result for result in self.results}

    def forget_failures(self) -> None:
        """Drops the cases that failed, so that they are measured again."""
        self.content["results"] = [r for r in self.results if "error" not in r]
        ceilings = self.content["ceilings"]
        self.content["ceilings"] = {k: v for k, v in ceilings.items() if "error" not in v}

    def begin_run(self, environment: dict[str, Any], *, allow_other_commit: bool) -> None:
        """Says what the coming results are measured on; entered into the file with the first of them.

        Raises:
          ValueError: the file's results are of another device, or of another commit and that was not allowed.
        """
        for run in self.content["runs"]:
            if run["device"] != environment["device"]:
                raise ValueError(
                    f"{self.path} was measured on {run['device']}, this is {environment['device']}: "
                    "use another file"
                )
            if run["commit"] != environment["commit"] and not allow_other_commit:
                raise ValueError(
                    f"{self.path} was measured at commit {run['commit'] or '(none)'}, this is "
                    f"{environment['commit'] or '(none)'}: use another file, or --allow-other-commit"
                )
        self._run = environment

    def add(self, case: C, measured: dict[str, Any]) -> None:
        """Adds a result and writes the file; "peer", what an engine says of itself, goes into the run."""
        index = self._run_index()
        keys = case.to_json()
        if peer := measured.pop("peer", None):
            self.content["runs"][index].setdefault("peers", {})[keys["engine"]] = peer
        self.results.append(keys | measured | {"run": index})
        self._write()

    def add_ceiling(self, name: str, measured: dict[str, Any]) -> None:
        """Adds what the device can do at most and writes the file."""
        self.content["ceilings"][name] = measured | {"run": self._run_index()}
        self._write()

    def _run_index(self) -> int:
        assert self._run is not None, "begin_run comes first"
        runs: list[dict[str, Any]] = self.content["runs"]
        if not runs or runs[-1] is not self._run:
            runs.append(self._run)
        return len(runs) - 1

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def read(path: Path, benchmark: str = BENCHMARK) -> dict[str, Any]:
    """The content of a benchmark's file.

    Raises:
      ValueError: it is not one.
      OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    found = content.get("benchmark") if isinstance(content, dict) else None
    if found != benchmark:
        raise ValueError(f"{path} is not a file of bench.{benchmark}: its benchmark is {found!r}")
    missing = {"settings", "runs", "results", "ceilings"} - content.keys()
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}")
    whole: dict[str, Any] = content
    return whole


def _check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{path} was measured with {key} = {found.get(key)!r}, not {wanted.get(key)!r}: "
                "use another file"
            )
