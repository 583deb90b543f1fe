"""The plots of a report, as SVG whose bytes depend on the data alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from bench.plan import DECODE, PREFILL, rate
from bench.tables import Series, Sweep, name_of, speed_ups

# Text stays text, names of elements do not change from run to run.
STYLE: dict[Any, Any] = {
    "backend": "svg",
    "svg.hashsalt": "bench.report",
    "svg.fonttype": "none",
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "os^Dvx"
_X = {DECODE: "depth", PREFILL: "prompt tokens"}

Lines = Sequence[tuple[Series, dict[int, float]]]


def plots(sweep: Sweep) -> dict[str, bytes]:
    """File name to content, of every plot that there is data for; `file_name` gives the names."""
    out = {}
    with mpl.rc_context(STYLE):
        for model in sweep.models:
            for kind, draw in _KINDS.items():
                figure = draw(sweep, model)
                if figure is not None:
                    out[file_name(sweep, model, kind)] = svg(figure)
    return out


def file_name(sweep: Sweep, model: str, kind: str) -> str:
    """Of one plot, safe on every file system."""
    return re.sub(r"[^\w.-]+", "_", f"{sweep.path.stem}-{model}-{kind}") + ".svg"


def svg(figure: Figure) -> bytes:
    """The figure as a file, the same bytes for the same data."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _decode(sweep: Sweep, model: str) -> Figure | None:
    return _rates(sweep, model, DECODE)


def _prefill(sweep: Sweep, model: str) -> Figure | None:
    return _rates(sweep, model, PREFILL)


def _rates(sweep: Sweep, model: str, phase: str) -> Figure | None:
    lines = [(s, s.values(rate)) for s in sweep.series(model, phase)]
    return _panels(f"{model}, batch 1", [(phase, _X[phase], "tokens/s", lines)])


def _batch(sweep: Sweep, model: str) -> Figure | None:
    panels = [
        (f"depth {depth}", "batch", "tokens/s of all rows", [(x, x.values(rate)) for x in series])
        for depth, series in sweep.batches(model).items()
    ]
    return _panels(f"{model}: decode of batches", panels)


def _panels(title: str, panels: Sequence[tuple[str, str, str, Lines]]) -> Figure | None:
    """Lines side by side: each panel's title, axes and data; those without any are left out."""
    panels = [panel for panel in panels if any(values for _, values in panel[-1])]
    if not panels:
        return None
    figure, all_axes = figure_of_panels(title, len(panels))
    for axes, (name, x, y, lines) in zip(all_axes, panels, strict=True):
        _lines(axes, lines)
        axes.set(xlabel=x, ylabel=y, title=name)
        axes.set_ylim(bottom=0)
        legend_below(axes)
    return figure


def _lines(axes: Any, lines: Lines) -> None:
    """A colour for each engine, a dash and a marker for each format; equal steps double."""
    engines = list(dict.fromkeys(s.engine for s, _ in lines))
    formats = list(dict.fromkeys(s.format for s, _ in lines))
    for s, values in lines:
        i = formats.index(s.format)
        xs = sorted(values)
        axes.plot(
            xs,
            [values[x] for x in xs],
            color=f"C{engines.index(s.engine) % 10}",
            linestyle=_DASHES[i % len(_DASHES)],
            marker=_MARKERS[i % len(_MARKERS)],
            label=f"{s.engine}, {s.format}",
        )
    ticks = sorted({x for _, values in lines for x in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _speed_up(sweep: Sweep, model: str) -> Figure | None:
    """How many times as fast as each peer, a group of bars for each length."""
    panels = []
    for phase in (PREFILL, DECODE):
        pairs = [entry for entry in speed_ups(sweep.series(model, phase)) if entry[-1]]
        if pairs:
            panels.append((phase, pairs))
    if not panels:
        return None
    figure, all_axes = figure_of_panels(f"{model}: speed over that of peers, batch 1", len(panels))
    for axes, (phase, entries) in zip(all_axes, panels, strict=True):
        xs = sorted({x for *_, ratios in entries for x in ratios})
        width = 0.8 / len(entries)
        for i, (weight_format, ours, peer, ratios) in enumerate(entries):
            at = [xs.index(x) + (i - (len(entries) - 1) / 2) * width for x in sorted(ratios)]
            heights = [ratios[x] for x in sorted(ratios)]
            axes.bar(at, heights, width, label=f"{ours} over {peer}, {weight_format}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(xs)), [str(x) for x in xs])
        axes.set(xlabel=_X[phase], ylabel="times as fast", title=phase)
        legend_below(axes)
    return figure


def _roofline(sweep: Sweep, model: str) -> Figure | None:
    """Shares of the measured ceilings."""
    panels = []
    for phase, of in ((DECODE, "copy bandwidth"), (PREFILL, "matrix product")):
        shares = [(s, s.values(sweep.share)) for s in sweep.series(model, phase)]
        lines = [(s, {x: 100 * v for x, v in values.items()}) for s, values in shares if values]
        panels.append((phase, _X[phase], f"% of the measured {of}", lines))
    return _panels(f"{model}: share of what the device can do, batch 1", panels)


def _memory(sweep: Sweep, model: str) -> Figure | None:
    """Weights and peak of each engine and format."""
    groups: dict[str, tuple[float, float]] = {}
    for r in sweep.results:
        if r["model"] == model and "error" not in r and r.get("peak_bytes"):
            label = f"{name_of(r)}\n{r['format']}"
            _, peak = groups.get(label, (0.0, 0.0))
            groups[label] = (r["weight_bytes"] / 1e9, max(peak, r["peak_bytes"] / 1e9))
    if not groups:
        return None
    figure, [axes] = figure_of_panels(f"{model}: memory", 1)
    positions = range(len(groups))
    axes.bar(positions, [peak for _, peak in groups.values()], 0.6, label="peak of all cases")
    axes.bar(positions, [weights for weights, _ in groups.values()], 0.6, label="weights")
    axes.set_xticks(positions, list(groups), fontsize="small")
    axes.set(ylabel="GB")
    legend_below(axes)
    return figure


def legend_below(axes: Any, y: float = -0.15) -> None:
    """Below the axes, `y` heights of theirs from the bottom, where it hides nothing."""
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, y))


def figure_of_panels(title: str, panels: int) -> tuple[Figure, Iterable[Any]]:
    """A figure with axes side by side."""
    figure = Figure(figsize=(6.4 * math.sqrt(panels), 4.8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


_KINDS: dict[str, Callable[[Sweep, str], Figure | None]] = {
    "decode": _decode,
    "prefill": _prefill,
    "speed-up": _speed_up,
    "roofline": _roofline,
    "batch": _batch,
    "memory": _memory,
}
