"""XLA against hand-written kernels on the device at hand: every op, shape, number of rows and weight format.

    python -m bench.kernels --json FILE [--op …] [--format …] [--implementation …] [--case REGEX] [--minutes 9]

Every case is checked against the reference and then timed (`bench.kernel_timing` says how); all samples are kept. The
file is written after every case and the same command goes on where it ended: exit code 75 says that there is more to
do, 1 that a case failed. `python -m bench.report FILE` makes tables and plots of it.

`--autotune` also times what each implementation offers in `configs`, and then writes the fastest of each shape to
``pallas_kernels/tuned/<device>.json``, where `default_config` finds it; `--tuned` names another folder.

On a machine without a GPU the small shapes run: XLA is timed, kernels for GPUs are checked in Pallas' interpret mode.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench import plan
from bench.aot import WEIGHT_FORMATS
from bench.attention_calls import IMPLEMENTATIONS as OF_ATTENTION
from bench.environment import environment
from bench.kernel_calls import NAMES, OPS, KernelCase, calls
from bench.kernel_timing import Kernels
from bench.processes import Worker, in_own_process
from bench.record import Record
from bench.sweep import MORE_TO_DO, Budget, measure_ceilings
from pallas_kernels import tuning

BENCHMARK = "kernels"
_FEWEST_SAMPLES = 5
_MOST_SECONDS = 180.0  # for one case; almost all of it is compiling


def cases(options: argparse.Namespace, group: str) -> list[KernelCase]:
    """What to measure: the implementations' own configs first, and of each the fewest rows first."""
    found = []
    for call in calls(
        group=group,
        ops=options.op,
        formats=options.format,
        implementations=lambda name: name in options.implementation,
    ):
        if re.search(options.case, call.name):
            what = (call.op, call.case, call.implementation, call.format, call.rows, group)
            configs = [None, *(call.configs if options.autotune else ())]
            found += [KernelCase(*what, config) for config in configs]
    return sorted(found, key=lambda case: (case.config is not None, case.rows))


def run(record: Record[KernelCase], missing: list[KernelCase], budget: Budget) -> bool:
    """Measures the cases; says whether all were, or the time was up."""
    with Worker(Kernels, record.content["settings"]["samples"]) as worker:
        for case in missing:
            if not budget.allows(_expected_seconds(case, record.results)):
                return False
            begin = time.monotonic()
            measured = worker.measure(case, _MOST_SECONDS)
            record.add(case, measured | {"wall_seconds": time.monotonic() - begin})
            print(line(record.results[-1]), flush=True)
            if "error" in measured:
                worker.end()  # after a fault of the device nothing else runs in its process
    return True


def _expected_seconds(case: KernelCase, results: list[dict[str, Any]]) -> float:
    """The longest of the implementation so far: most of it is compiling."""
    alike = [r["wall_seconds"] for r in results if r["implementation"] == case.implementation]
    return max(alike, default=0.0)


def line(result: dict[str, Any]) -> str:
    """What is printed of a result."""
    case = KernelCase.of(result)
    if "error" in result:
        return f"{case}: FAILED: {result['error'].splitlines()[0]}"
    checked = f"error {result['error_of_allowed']:.2f} of allowed"
    if "seconds" not in result:
        return f"{case}: {checked}, interpreted"
    seconds = plan.median(result)
    return f"{case}: {1e6 * seconds:.1f} us, {result['bytes'] / seconds / 1e9:.0f} GB/s, {checked}"


def write_tuned(record: Record[KernelCase], folder: Path) -> Path | None:
    """Writes the fastest config of every shape for which all that were offered have been tried; None if none has."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in record.results:
        key = (r["op"], r["case"], r["implementation"], r["format"], r["rows"], r["group"])
        if r["config"] is not None:
            groups.setdefault(key, []).append(r)
    best = {}
    for key, results in groups.items():
        call = KernelCase(*key).call
        timed = [r for r in results if "seconds" in r]
        if timed and {r["config"] for r in results} == call.configs.keys():
            fastest = min(timed, key=lambda r: statistics.median(r["seconds"]))
            config = call.configs[fastest["config"]]
            x, w, *_ = call.arguments
            best[tuning.key_of(type(config), x.shape[0], w)] = config
    if not best:
        return None
    last: dict[str, Any] = record.content["runs"][-1]
    path = tuning.path_of(last["device"], folder)
    kept = tuning.load(path, last["device"]) if path.exists() else {}
    tuning.dump(path, last["device"], last, kept | best)
    return path


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing: 0 if nothing is any more, 1 if a case failed, 2 for bad input, 75 if time is up."""
    begin = time.monotonic()
    options = _options(argv)
    try:
        # In a process of its own, as everything that touches the device.
        found = in_own_process(environment)
        on_gpu = found["platform"] == "gpu"
        if options.autotune and not on_gpu:
            raise ValueError("--autotune needs a GPU: nothing else has its best block sizes")
        wanted = cases(options, "REAL" if on_gpu else "SMALL")
        settings = {"samples": options.samples, "warm_up": 1}
        record = Record(options.json, settings, KernelCase.of, BENCHMARK)
        missing = [case for case in wanted if case not in record.done]
        if missing:
            command = ["python", "-m", "bench.kernels", *(sys.argv[1:] if argv is None else argv)]
            record.begin_run(
                found | {"command": shlex.join(command)},
                allow_other_commit=options.allow_other_commit,
            )
            measure_ceilings(record, options.samples)
            if not run(record, missing, Budget(options.minutes, begin)):
                left = sum(case not in record.done for case in wanted)
                print(f"time is up, {left} cases to do: the same command goes on", file=sys.stderr)
                return MORE_TO_DO
        if options.autotune and (path := write_tuned(record, options.tuned)):
            print(f"fastest configs: {path}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench.kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    failed = [case for case in wanted if "error" in record.done[case]]
    for case in failed:
        print(f"failed: {case}", file=sys.stderr)
    return 1 if failed else 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    tables = [*(op.implementations for op in OPS.values()), OF_ATTENTION]
    names = [n for table in tables for n in table if n != "reference"]
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", type=Path, default=Path("kernels.json"), metavar="FILE", help="%(default)s")
    add("--op", nargs="+", choices=NAMES, default=list(NAMES))
    add("--format", nargs="+", choices=WEIGHT_FORMATS, default=list(WEIGHT_FORMATS))
    implementations = list(dict.fromkeys(names))
    add("--implementation", nargs="+", choices=implementations, default=implementations)
    add("--case", default="", metavar="REGEX", help="of names like 'e4b_gate_up M=8'")
    add("--samples", type=int, default=_FEWEST_SAMPLES, metavar="N", help="%(default)s or more")
    add("--minutes", type=float, metavar="M", help="stop before, with exit code 75")
    add("--autotune", action="store_true", help="try the configs that implementations offer")
    add("--tuned", type=Path, default=tuning.FOLDER, metavar="FOLDER", help="for the fastest ones")
    add("--allow-other-commit", action="store_true", help="go on with results of another commit")
    options = parser.parse_args(argv)
    if options.samples < _FEWEST_SAMPLES:
        parser.error(f"--samples {options.samples}: expected at least {_FEWEST_SAMPLES}")
    return options


if __name__ == "__main__":
    sys.exit(main())
