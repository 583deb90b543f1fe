"""Tables and plots of measurements, from their raw JSON alone.

    python -m bench.report FILE… [--out FOLDER]

FILEs are of `bench.sweep`, `bench.kernels` and `bench.static`; FOLDER gets ``report.md`` and its plots as SVG. Equal
files give equal bytes. What was predicted stands in a section of its own and is never mixed with what was measured.
Needs matplotlib (`pip install gemma-jax[bench]`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import kernel_tables, predictions, record
from bench.gaps import gaps
from bench.plan import DECODE, FIRST_TOKEN, PREFILL
from bench.plots import file_name, plots
from bench.tables import (
    Sweep,
    batch_table,
    compile_table,
    memory_table,
    number,
    phase_table,
    spread,
    table,
)

REPORT = "report.md"
_TITLES = {PREFILL: "Prefill, tokens/s", FIRST_TOKEN: "Time to first token, ms"}
_STATIC_KEYS = {"decode", "prefill", "kernels"}


def report(paths: Sequence[Path]) -> dict[str, bytes]:
    """The files of a report, by name.

    Raises:
      ValueError: a file is of none of these benchmarks, or two have the same name.
      OSError: a file cannot be read.
    """
    sweeps, timings, statics = _read(paths)
    names = ", ".join(f"`{path.name}`" for path in paths)
    lines = [
        "# Speed",
        "",
        f"Made by `python -m bench.report` from {names}; no number in it was typed.",
        "",
    ]
    files: dict[str, bytes] = {}
    for sweep in sweeps:
        drawn = plots(sweep)
        files |= drawn
        lines += _sweep_section(sweep, drawn)
    for timing in timings:
        drawn = kernel_tables.plots(timing)
        files |= drawn
        lines += _kernels_section(timing, drawn)
    if statics:
        lines += predictions.section(statics, sweeps)
    files[REPORT] = "\n".join(lines).rstrip("\n").encode() + b"\n"
    return files


def _read(
    paths: Sequence[Path],
) -> tuple[list[Sweep], list[kernel_tables.Timings], list[tuple[str, dict[str, Any]]]]:
    sweeps, timings, statics = [], [], []
    for path in paths:
        if [other.stem for other in paths].count(path.stem) > 1:
            raise ValueError(f"{path}: another file has the same name")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if isinstance(content, dict) and content.keys() >= _STATIC_KEYS:
            statics.append((path.name, content))
        elif isinstance(content, dict) and content.get("benchmark") == "kernels":
            timings.append(kernel_tables.Timings(path, record.read(path, "kernels")))
        else:
            sweeps.append(Sweep(path, record.read(path)))
    return sweeps, timings, statics


def _sweep_section(sweep: Sweep, drawn: dict[str, bytes]) -> list[str]:
    lines = [f"## Measured on {sweep.device or 'nothing yet'} (`{sweep.path.name}`)", ""]
    lines += [*_machines(sweep), *_method(sweep), *_ceilings(sweep)]
    for model in sweep.models:
        lines += [f"### {model}", ""]
        lines += ["#### Decode of one row, tokens/s", ""]
        lines += phase_table(sweep, sweep.series(model, DECODE), "depth")
        for phase, title in _TITLES.items():
            lines += [f"#### {title}", ""]
            lines += phase_table(sweep, sweep.series(model, phase), "prompt")
        for depth, series in sweep.batches(model).items():
            lines += [f"#### Decode of batches at depth {depth}, tokens/s of all rows", ""]
            lines += batch_table(sweep, series)
        lines += ["#### Memory", "", *memory_table(sweep, model)]
        for kind in ("decode", "prefill", "speed-up", "roofline", "batch", "memory"):
            name = file_name(sweep, model, kind)
            if name in drawn:
                lines += [f"![{model}: {kind}]({name})", ""]
    lines += ["### Compile time, median (longest) in seconds", "", *compile_table(sweep)]
    found = gaps(sweep)
    lines += ["### Known gaps", ""]
    lines += [f"- {gap}" for gap in found] or ["None that the data shows."]
    return [*lines, ""]


def _kernels_section(timings: kernel_tables.Timings, drawn: dict[str, bytes]) -> list[str]:
    where = timings.device or "nothing yet"
    sweep = Sweep(timings.path, timings.content)
    return [
        f"## Kernels on {where} (`{timings.path.name}`)",
        "",
        *_machines(sweep),
        *kernel_tables.method(timings),
        *_ceilings(sweep),
        *kernel_tables.section(timings, drawn),
    ]


def _machines(sweep: Sweep) -> list[str]:
    runs = sweep.content["runs"]
    keys = ["device", "cores", "driver", "nvidia_driver", "python", "commit", "time"]
    packages = sorted({name for run in runs for name in run["versions"]})
    rows = []
    for i, run in enumerate(runs):
        cells = [_text(run.get(key)) for key in keys]
        if run["uncommitted_changes"]:
            cells[keys.index("commit")] += " and changes"
        rows.append([str(i), *cells, *(_text(run["versions"].get(name)) for name in packages)])
    lines = ["### Hardware and versions", "", *table(["run", *keys, *packages], rows)]
    peers: dict[str, dict[str, Any]] = {}
    for run in runs:
        peers |= run.get("peers", {})
    for name, facts in peers.items():
        told = ", ".join(
            f"{key} {value}" for key, value in facts.items() if value not in ("", None)
        )
        lines += [f"- {name}: {told}"]
    lines += [""] * bool(peers)
    commands = [run["command"] for run in runs]
    commands += [r["command"] for r in sweep.results if "command" in r]
    return [*lines, "### Commands", "", "```", *dict.fromkeys(commands), "```", ""]


def _method(sweep: Sweep) -> list[str]:
    s = sweep.content["settings"]
    new = sorted({r["new_tokens"] for r in sweep.results if "new_tokens" in r})
    activations = sorted({r["activations"] for r in sweep.results if "activations" in r})
    return [
        "### Method",
        "",
        f"- Every case: {s['warm_up']} warm-up, then {s['samples']} samples; tables have their medians.",
        f"- Sampling: {s['sampling']}, end of sequence {'ignored' if s['ignore_eos'] else 'obeyed'}, "
        f"prefix cache {'on' if s['prefix_cache'] else 'off'}, seed {s['seed']}.",
        f"- Decode: {', '.join(map(str, new)) or 'no'} tokens in the engine's own loop, from a cache of that depth.",
        "- First token: from token ids on the host to the first new id on the host.",
        f"- Activations: {', '.join(activations) or 'unknown'}.",
        "- Share of the copy bandwidth: bytes that any engine must read for a token (each matrix that it needs, keys "
        "and values of every layer) times tokens/s. Experts of a batch count as if no two rows chose the same.",
        "- Share of the matrix product: operations of the matrices for the prompt, KV-shared layers and head for its "
        "last token only, attention left out, over its time.",
        "- Ratios are of speeds: above 1 we are faster.",
        "",
    ]


def _ceilings(sweep: Sweep) -> list[str]:
    rows = []
    for name, measured in sweep.content["ceilings"].items():
        if "error" in measured:
            continue
        unit = "GB/s" if "bytes" in measured else "GFLOP/s"
        amount = measured.get("bytes", measured.get("flops"))
        reached = amount / statistics.median(measured["seconds"]) / 1e9
        spreads = f"{spread(measured['seconds']):.0%}"
        rows.append([measured.get("what", name), f"{number(reached)} {unit}", spreads])
    return ["### Ceilings", "", *table(["what", "reached", "spread"], rows)]


def _text(value: Any) -> str:
    return "–" if value in (None, "") else str(value)


def write(files: dict[str, bytes], folder: Path) -> None:
    """Writes each file whole or not at all.

    Raises:
      OSError: the folder or a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        partial = folder / f".{name}.{os.getpid()}.partial"
        try:
            partial.write_bytes(content)
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Writes the report; bad input gives one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", nargs="+", type=Path, help="of bench.sweep, bench.kernels or bench.static"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        files = report(options.file)
        write(files, options.out)
    except KeyError as error:
        print(f"bench.report: error: an entry of a file has no {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out / REPORT} and {len(files) - 1} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
