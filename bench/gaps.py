"""What a sweep does not show, found in its file: cases that are missing or failed, samples that scatter."""

from __future__ import annotations

from bench.plan import DECODE, FIRST_TOKEN, LLAMA_CPP, OPENAI, PREFILL, TRANSFORMERS, Case
from bench.tables import Series, Sweep, spread

MOST_SPREAD = 0.1
_PEERS = (LLAMA_CPP, TRANSFORMERS, OPENAI)


def gaps(sweep: Sweep) -> list[str]:
    """One sentence each, without the full stop."""
    return [
        *_of_runs(sweep),
        *_ceilings(sweep),
        *_peers(sweep),
        *_missing(sweep),
        *_failed(sweep),
        *_scattered(sweep),
    ]


def _of_runs(sweep: Sweep) -> list[str]:
    runs = sweep.content["runs"]
    found = []
    commits = list(dict.fromkeys(run["commit"] or "(none)" for run in runs))
    if len(commits) > 1:
        found.append(f"results of several commits: {', '.join(commits)}")
    if any(run["uncommitted_changes"] for run in runs):
        dirty = [str(i) for i, run in enumerate(runs) if run["uncommitted_changes"]]
        found.append(f"uncommitted changes on top of the commit in run {', '.join(dirty)}")
    return found


def _ceilings(sweep: Sweep) -> list[str]:
    found = []
    for name in ("copy_bytes_per_second", "gemm_flops_per_second"):
        measured = sweep.content["ceilings"].get(name)
        if measured is None:
            found.append(f"the ceiling {name} was not measured")
        elif "error" in measured:
            found.append(f"the ceiling {name} failed: {_first_line(measured['error'])}")
        elif spread(measured["seconds"]) > MOST_SPREAD:
            found.append(
                f"samples of the ceiling {name} spread by {spread(measured['seconds']):.0%}"
            )
    return found


def _peers(sweep: Sweep) -> list[str]:
    present = {r["engine"] for r in sweep.results if "error" not in r}
    absent = [name for name in _PEERS if name not in present]
    return [f"no result of a peer: {', '.join(absent)}"] if absent else []


def _missing(sweep: Sweep) -> list[str]:
    """Cells of the tables that other rows of the same table have."""
    found = []
    formats = list(dict.fromkeys(r["format"] for r in sweep.results))
    for model in sweep.models:
        have = {r["format"] for r in sweep.results if r["model"] == model}
        found += [f"{model}: nothing in {f}" for f in formats if f not in have]
        tables = {phase: sweep.series(model, phase) for phase in (PREFILL, FIRST_TOKEN, DECODE)}
        rows = list(dict.fromkeys((s.format, s.engine) for t in tables.values() for s in t))
        for phase, series in tables.items():
            found += _holes(series, rows, f"{model}: {phase.replace('_', ' ')}")
        for depth, series in sweep.batches(model).items():
            found += _holes(series, rows, f"{model}: decode at depth {depth} of batch")
    return found


def _holes(series: list[Series], rows: list[tuple[str, str]], what: str) -> list[str]:
    columns = sorted({x for s in series for x in s.points})
    by_row = {(s.format, s.engine): s for s in series}
    found = []
    for weight_format, engine in rows if columns else []:
        row = by_row.get((weight_format, engine))
        holes = [x for x in columns if row is None or x not in row.points]
        if holes:
            listed = "at all" if row is None else ", ".join(map(str, holes))
            found.append(f"{what} was not measured for {weight_format} {engine}: {listed}")
    return found


def _failed(sweep: Sweep) -> list[str]:
    return [
        f"{Case.of(r)} failed: {_first_line(r['error'])}" for r in sweep.results if "error" in r
    ]


def _scattered(sweep: Sweep) -> list[str]:
    groups: dict[str, list[str]] = {}
    for r in sweep.results:
        if "error" not in r and spread(r["seconds"]) > MOST_SPREAD:
            row, case = str(Case.of(r)).split(": ", 1)
            groups.setdefault(row, []).append(f"{case} ({spread(r['seconds']):.0%})")
    return [
        f"{row}: samples spread by more than {MOST_SPREAD:.0%} of their median: {'; '.join(cases)}"
        for row, cases in groups.items()
    ]


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]
