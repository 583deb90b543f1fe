"""The tables of a report: rates, ratios and shares of the ceilings, each computed from a sweep's raw samples."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.plan import DECODE, FIRST_TOKEN, OURS, PREFILL, Case, median, rate

Result = dict[str, Any]
NOT_MEASURED, FAILED = "–", "failed"


@dataclasses.dataclass(frozen=True)
class Series:
    """Results that differ in one number only, by that number.

    Attributes:
      format, engine: as in `Case`; `engine` with the implementation where there are several.
      points: length, depth or batch to the result, failed ones included.
    """

    format: str
    engine: str
    points: dict[int, Result]

    @property
    def ours(self) -> bool:
        """Whether it is our engine's."""
        return self.engine.split()[0] == OURS

    def values(self, of: Callable[[Result], float | None]) -> dict[int, float]:
        """`of` each result that has one."""
        found = {x: of(r) for x, r in self.points.items() if "error" not in r}
        return {x: value for x, value in found.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The content of a sweep's file, as questions to it."""

    path: Path
    content: dict[str, Any]

    @property
    def results(self) -> list[Result]:
        """All results, failed ones too."""
        return list(self.content["results"])

    @property
    def models(self) -> list[str]:
        """Models in the order of the file."""
        return list(dict.fromkeys(r["model"] for r in self.results))

    @property
    def device(self) -> str:
        """What it was measured on."""
        return ", ".join(dict.fromkeys(run["device"] for run in self.content["runs"]))

    def ceiling(self, name: str) -> float | None:
        """Bytes or operations per second of the measured ceiling; None if there is none."""
        measured = self.content["ceilings"].get(name, {})
        if "seconds" not in measured:
            return None
        amount: float = measured.get("bytes", measured.get("flops"))
        return amount / statistics.median(measured["seconds"])

    def series(self, model: str, phase: str) -> list[Series]:
        """Batch 1 of a phase over its lengths or depths."""
        key = "depth" if phase == DECODE else "tokens"
        found = [r for r in self.results if (r["model"], r["phase"]) == (model, phase)]
        return _grouped((r for r in found if r["batch"] == 1), key)

    def batches(self, model: str) -> dict[int, list[Series]]:
        """For each depth at which batches were decoded, all of its batches."""
        decode = [r for r in self.results if (r["model"], r["phase"]) == (model, DECODE)]
        depths = sorted({r["depth"] for r in decode if r["batch"] > 1})
        return {
            depth: [
                s
                for s in _grouped((r for r in decode if r["depth"] == depth), "batch")
                if max(s.points) > 1
            ]
            for depth in depths
        }

    def share(self, result: Result) -> float | None:
        """Of the measured copy bandwidth (decode) or matrix product (prefill), 1 being all; None if not known."""
        if result["phase"] == DECODE:
            least, ceiling = result.get("bytes_min"), self.ceiling("copy_bytes_per_second")
            per_second = rate(result)
        else:
            least, ceiling = result.get("flops_min"), self.ceiling("gemm_flops_per_second")
            per_second = 1 / median(result)
        return None if least is None or ceiling is None else least * per_second / ceiling


def name_of(result: Result) -> str:
    """Engine and implementation."""
    return " ".join(filter(None, (result["engine"], result.get("implementation"))))


def spread(seconds: Sequence[float]) -> float:
    """``(max - min) / median``."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def speed_up(ours: Result, peer: Result) -> float:
    """How many times as fast as the peer we are in the same case."""
    if ours["phase"] == FIRST_TOKEN:
        return median(peer) / median(ours)
    return rate(ours) / rate(peer)


def speed_ups(series: Iterable[Series]) -> list[tuple[str, str, str, dict[int, float]]]:
    """(format, ours, peer, x to `speed_up`) for each pair in the same format."""
    series = list(series)
    found = []
    for ours in (s for s in series if s.ours):
        for peer in (s for s in series if not s.ours and s.format == ours.format):
            both = [
                x
                for x in sorted(ours.points.keys() & peer.points.keys())
                if "error" not in ours.points[x] and "error" not in peer.points[x]
            ]
            ratios = {x: speed_up(ours.points[x], peer.points[x]) for x in both}
            found.append((ours.format, ours.engine, peer.engine, ratios))
    return found


# ---------------------------------------------------------------------------------------------------------- Markdown


def phase_table(sweep: Sweep, series: Sequence[Series], what: str) -> list[str]:
    """Rates (or milliseconds to the first token), shares of the ceiling, and ratios to each peer."""
    columns = sorted({x for s in series for x in s.points})
    rows = []
    pairs = speed_ups(series)
    for s in series:
        rows.append([s.format, s.engine, *(_cell(s.points.get(x), _rate_or_time) for x in columns)])
        rows += _share_rows(sweep, s, columns)
        for weight_format, ours, peer, ratios in pairs:
            if (weight_format, peer) == (s.format, s.engine):
                cells = [f"{ratios[x]:.2f}" if x in ratios else NOT_MEASURED for x in columns]
                rows.append(["", f"{ours} ÷ {peer}", *cells])
    return table(["format", "engine", *(f"{what} {x}" for x in columns)], rows)


def batch_table(sweep: Sweep, series: Sequence[Series]) -> list[str]:
    """Tokens per second of all rows together, as a multiple of one row's, and as a share of the ceiling."""
    columns = sorted({x for s in series for x in s.points})
    rows = []
    for s in series:
        rows.append([s.format, s.engine, *(_cell(s.points.get(x), _rate_or_time) for x in columns)])
        rates = s.values(rate)
        if 1 in rates:
            cells = [f"{rates[x] / rates[1]:.2f}" if x in rates else NOT_MEASURED for x in columns]
            rows.append(["", "÷ batch 1", *cells])
        rows += _share_rows(sweep, s, columns)
    return table(["format", "engine", *(f"batch {x}" for x in columns)], rows)


def _share_rows(sweep: Sweep, series: Series, columns: Sequence[int]) -> list[list[str]]:
    shares = series.values(sweep.share)
    phase = next(iter(series.points.values()))["phase"]
    if not shares or phase == FIRST_TOKEN:
        return []
    of = "copy bandwidth" if phase == DECODE else "matrix product"
    cells = [f"{100 * shares[x]:.1f} %" if x in shares else NOT_MEASURED for x in columns]
    return [["", f"of the measured {of}", *cells]]


def memory_table(sweep: Sweep, model: str) -> list[str]:
    """Weights, and the case with the most memory, of each engine and format."""
    rows = []
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in sweep.results:
        if r["model"] == model and "error" not in r:
            groups.setdefault((r["format"], name_of(r)), []).append(r)
    for (weight_format, engine), results in groups.items():
        weights = next((r["weight_bytes"] for r in results if r.get("weight_bytes")), None)
        most = max(results, key=lambda r: r.get("peak_bytes") or 0)
        peak = most.get("peak_bytes")
        rows.append(
            [
                weight_format,
                engine,
                megabytes(weights) if weights else NOT_MEASURED,
                megabytes(peak) if peak else NOT_MEASURED,
                str(Case.of(most)).split(": ", 1)[1] if peak else NOT_MEASURED,
                most["peak_bytes_of"] if peak else NOT_MEASURED,
            ]
        )
    head = ["format", "engine", "weights, MB", "peak, MB", "reached in", "what the peak is of"]
    return table(head, rows)


def compile_table(sweep: Sweep) -> list[str]:
    """Seconds that our programs took to compile, by phase."""
    rows = []
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for r in sweep.results:
        if "compile_seconds" in r:
            groups.setdefault((r["model"], r["format"], name_of(r)), []).append(r)
    for key, results in groups.items():
        cells = []
        for phase in (PREFILL, FIRST_TOKEN, DECODE):
            seconds = [r["compile_seconds"] for r in results if r["phase"] == phase]
            cells.append(
                f"{statistics.median(seconds):.1f} ({max(seconds):.1f})"
                if seconds
                else NOT_MEASURED
            )
        rows.append([*key, *cells])
    return table(["model", "format", "engine", "prefill", "first token", "decode"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; what would end a cell is escaped."""
    if not rows:
        return ["Nothing was measured.", ""]
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in cells] for cells in lines]
    return [*("| " + " | ".join(cells) + " |" for cells in escaped), ""]


def number(value: float) -> str:
    """At least three digits, none of them behind the point from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def megabytes(size: float) -> str:
    """Millions of bytes."""
    return number(size / 1e6)


def _grouped(results: Iterable[Result], key: str) -> list[Series]:
    groups: dict[tuple[str, str], dict[int, Result]] = {}
    for r in results:
        groups.setdefault((r["format"], name_of(r)), {})[r[key]] = r
    # Each format with our engine first, in the order of the file otherwise.
    formats = list(dict.fromkeys(weight_format for weight_format, _ in groups))
    found = [Series(f, e, points) for (f, e), points in groups.items()]
    return sorted(found, key=lambda s: (formats.index(s.format), not s.ours))


def _rate_or_time(result: Result) -> float:
    return 1e3 * median(result) if result["phase"] == FIRST_TOKEN else rate(result)


def _cell(result: Result | None, of: Callable[[Result], float]) -> str:
    if result is None:
        return NOT_MEASURED
    return FAILED if "error" in result else number(of(result))
