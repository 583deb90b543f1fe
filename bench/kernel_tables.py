"""The part of a report that is about single kernels: tables and plots from the raw samples of `bench.kernels`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.plan import median
from bench.plots import STYLE, figure_of_panels, legend_below, svg
from bench.tables import FAILED, NOT_MEASURED, Sweep, number, table

BASELINE = "xla"
# From here on a call's time is that of its products and not of its weights.
_ROWS_OF_PREFILL = 64

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Timings:
    """The content of a file of `bench.kernels`."""

    path: Path
    content: dict[str, Any]

    @property
    def device(self) -> str:
        """What it was measured on."""
        return self._sweep.device

    @property
    def groups(self) -> dict[tuple[str, int], list[Result]]:
        """Results by op and rows of x, with the implementations' own configs; a case's and format's side by side."""
        own = [r for r in self.content["results"] if r["config"] is None]
        cases, formats = ([r[key] for r in own] for key in ("case", "format"))
        out: dict[tuple[str, int], list[Result]] = {}
        for r in sorted(own, key=lambda r: (cases.index(r["case"]), formats.index(r["format"]))):
            out.setdefault((r["op"], r["rows"]), []).append(r)
        return dict(sorted(out.items()))

    def share(self, result: Result) -> float | None:
        """Of the measured matrix product where x has many rows, else of the measured copy; None if not known."""
        by_products = result["rows"] >= _ROWS_OF_PREFILL
        name = "gemm_flops_per_second" if by_products else "copy_bytes_per_second"
        ceiling = self._sweep.ceiling(name)
        if ceiling is None or "seconds" not in result:
            return None
        amount: float = result["flops" if by_products else "bytes"]
        return amount / median(result) / ceiling

    @property
    def _sweep(self) -> Sweep:
        return Sweep(self.path, self.content)


def section(timings: Timings, drawn: dict[str, bytes]) -> list[str]:
    """Lines of a table for each op and number of rows, its plot below."""
    lines = []
    for (op, rows), results in timings.groups.items():
        of = "matrix product" if rows >= _ROWS_OF_PREFILL else "copy bandwidth"
        head = ["case", "format", "implementation", "µs", "samples, µs", "GB/s"]
        head += [f"% of the measured {of}", f"times as fast as {BASELINE}", "error ÷ allowed"]
        lines += [f"### {op}, {rows} rows of x", "", *table(head, _rows(timings, results))]
        if (name := file_name(timings, op, rows)) in drawn:
            lines += [f"![{op}, {rows} rows]({name})", ""]
    return lines


def _rows(timings: Timings, results: list[Result]) -> list[list[str]]:
    baseline = {
        (r["case"], r["format"]): median(r)
        for r in results
        if r["implementation"] == BASELINE and "seconds" in r
    }
    rows = []
    for r in results:
        cells = [r["case"], r["format"], r["implementation"]]
        if "seconds" not in r:
            error = FAILED if "error" in r else f"{r['error_of_allowed']:.2f}"
            rows.append([*cells, *[NOT_MEASURED] * 5, error])
            continue
        share = timings.share(r)
        against = baseline.get((r["case"], r["format"]))
        rows.append(
            [
                *cells,
                number(1e6 * median(r)),
                f"{number(1e6 * min(r['seconds']))} to {number(1e6 * max(r['seconds']))}",
                number(r["bytes"] / median(r) / 1e9),
                f"{100 * share:.1f} %" if share is not None else NOT_MEASURED,
                f"{against / median(r):.2f}" if against is not None else NOT_MEASURED,
                f"{r['error_of_allowed']:.2f}",
            ]
        )
    return rows


def file_name(timings: Timings, op: str, rows: int) -> str:
    """Of one plot."""
    return f"{timings.path.stem}-{op}-{rows}.svg"


def plots(timings: Timings) -> dict[str, bytes]:
    """File name to content, of every plot that there is data for."""
    out = {}
    with mpl.rc_context(STYLE):
        for (op, rows), results in timings.groups.items():
            figure = _bars(timings, f"{op}, {rows} rows of x", results)
            if figure is not None:
                out[file_name(timings, op, rows)] = svg(figure)
    return out


def _bars(timings: Timings, title: str, results: list[Result]) -> Figure | None:
    """Shares of the ceiling: a panel for each format, a group of bars for each case."""
    shares = [(r, s) for r in results if (s := timings.share(r)) is not None]
    if not shares:
        return None
    formats = list(dict.fromkeys(r["format"] for r, _ in shares))
    figure, all_axes = figure_of_panels(title, len(formats))
    for axes, weight_format in zip(all_axes, formats, strict=True):
        found = [(r, s) for r, s in shares if r["format"] == weight_format]
        cases = list(dict.fromkeys(r["case"] for r, _ in found))
        names = list(dict.fromkeys(r["implementation"] for r, _ in found))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = {
                cases.index(r["case"]): 100 * s for r, s in found if r["implementation"] == name
            }
            at = [place + (i - (len(names) - 1) / 2) * width for place in bars]
            axes.bar(at, list(bars.values()), width, label=name)
        axes.set_xticks(range(len(cases)), cases, rotation=90, fontsize="small")
        axes.set(ylabel="% of the measured ceiling", title=weight_format)
        legend_below(axes, -0.75)
    return figure


def method(timings: Timings) -> list[str]:
    """How it was measured, and which configs were tried beside."""
    tried = [r for r in timings.content["results"] if r["config"] is not None and "seconds" in r]
    on_cpu = any(run["platform"] == "cpu" for run in timings.content["runs"])
    lines = [
        "### Method",
        "",
        *["- **A CPU with small shapes, which lie in its caches: the times show that this works.**"]
        * on_cpu,
        "- Calls in a loop on the device, each on weights that are in no cache, less the same loop without calls; "
        f"median of {timings.content['settings']['samples']} samples. `bench/kernel_timing.py` has the details.",
        "- Each case's results, written over NaNs, were compared with a float32 reference before; the error is given "
        "as a share of what rounding explains.",
        "- GB/s: weights, x and y, each once.",
        "",
    ]
    if tried:
        keys = ["op", "case", "rows", "format", "implementation", "config"]
        rows = [[*(str(r[key]) for key in keys), number(1e6 * median(r))] for r in tried]
        lines += ["### Configs tried", "", *table([*keys, "µs"], rows)]
    return lines
