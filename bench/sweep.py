"""Prefill and decode speed over prompt lengths, depths and batches, other engines beside ours in the same run.

    python -m bench.sweep --json FILE --model e4b --format q4k --llama-bench PATH --minutes 9

Models are architectures with random weights in their true shapes, or checkpoints. Every case is warmed up, then timed
`--samples` times: greedy, end of sequence ignored, no prefix cache; all samples are kept. The file is written after
every case, and the same command goes on where it ended, so a sweep can be cut into pieces with `--minutes`: exit code
75 says that there is more to do. A case that fails is recorded with its error; 1 says that one of ours did.

`python -m bench.report FILE` makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import ceilings, plan
from bench.environment import environment
from bench.plan import LLAMA_CPP, OPENAI, OURS, TRANSFORMERS, Case, Lists
from bench.processes import Engine, Worker, in_own_process
from bench.published import PUBLISHED, SMALL
from bench.record import Record
from convert.policy import FORMATS
from pallas_kernels.quantized_matmul import IMPLEMENTATIONS

LENGTHS = (128, 512, 2048, 4096, 8192, 16384)
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256)
MORE_TO_DO = 75  # EX_TEMPFAIL: call again
_WARM_UP = 1


def open_engine(
    group: tuple[str, str, str], cases: list[Case], options: argparse.Namespace, on_gpu: bool
) -> Engine:
    """The engine of a group of cases, its weights loaded; imports no other engine's libraries."""
    engine, model, weight_format = group
    if engine == OURS:
        from bench.measure import GemmaJax

        return GemmaJax(model, weight_format, options.samples)
    if engine == LLAMA_CPP:
        from bench.peers.llama_cpp import LlamaCpp

        file = options.gguf.get(f"{model}:{weight_format}")
        return LlamaCpp(options.llama_bench, file, cases, options.samples, on_gpu=on_gpu)
    if engine == TRANSFORMERS:
        from bench.peers.huggingface import Transformers

        return Transformers(model, options.samples)
    from bench.peers.openai_server import OpenAIServer

    return OpenAIServer(options.openai, options.openai_model, options.samples)


class Budget:
    """Minutes that a call may take, as `--minutes` says; the first case always runs, so every call gets on."""

    def __init__(self, minutes: float | None, begin: float) -> None:
        self._end = begin + 60 * minutes if minutes is not None else None
        self._used = False

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long may begin."""
        first, self._used = not self._used, True
        return first or self._end is None or time.monotonic() + seconds <= self._end


def run(
    record: Record[Case],
    cases: Iterable[Case],
    budget: Budget,
    options: argparse.Namespace,
    on_gpu: bool,
) -> bool:
    """Measures the cases, group by group; says whether all were, or the time was up."""
    cases = list(cases)
    with tqdm(
        total=len(cases),
        desc="sweep",
        unit="case",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
    ) as bar:
        for group, members in itertools.groupby(cases, lambda case: case.group):
            listed = list(members)
            with Worker(open_engine, group, listed, options, on_gpu) as worker:
                for i, case in enumerate(listed):
                    loading = plan.expected_loading(case, record.results) if i == 0 else 0.0
                    if not budget.allows(loading + plan.expected_seconds(case, record.results)):
                        return False
                    bar.set_postfix_str(str(case))
                    begin = time.monotonic()
                    measured = worker.measure(case)
                    wall = time.monotonic() - begin - measured.get("load_seconds", 0.0)
                    record.add(case, measured | {"wall_seconds": wall})
                    bar.update()
                    bar.write(line(record.results[-1]), file=sys.stdout)
                    sys.stdout.flush()
    return True


def line(result: dict[str, Any]) -> str:
    """What is printed of a result."""
    case = Case.of(result)
    if "error" in result:
        return f"{case}: FAILED: {result['error'].splitlines()[0]}"
    if case.phase == plan.FIRST_TOKEN:
        return f"{case}: {1e3 * plan.median(result):.1f} ms"
    return f"{case}: {plan.rate(result):.1f} tokens/s"


def measure_ceilings(record: Record[Any], samples: int) -> None:
    """Adds the device's ceilings, unless they are there; a failure is recorded in their place."""
    names = ("copy_bytes_per_second", "gemm_flops_per_second")
    if all(name in record.content["ceilings"] for name in names):
        return
    try:
        measured = in_own_process(ceilings.ceilings, samples)
    except RuntimeError as error:
        measured = {name: {"error": str(error)} for name in names}
    for name in names:
        record.add_ceiling(name, measured[name])


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing: 0 if nothing is any more, 1 if a case of ours failed, 2 for bad input, 75 if time is up."""
    begin = time.monotonic()
    try:
        options = _options(argv)
        record = Record(options.json, _settings(options), Case.of)
        if options.retry_failed:
            record.forget_failures()
        cases = plan.plan(_lists(options))
        missing = [case for case in cases if case not in record.done]
        if options.dry_run:
            for case in cases:
                print(f"{'to do' if case in missing else 'done '}  {case}")
            print(f"{len(missing)} of {len(cases)} cases to do")
            return 0
        if missing:
            # In a process of its own, as everything that touches the device.
            found = in_own_process(environment)
            command = shlex.join(
                ["python", "-m", "bench.sweep", *(sys.argv[1:] if argv is None else argv)]
            )
            record.begin_run(
                found | {"command": command}, allow_other_commit=options.allow_other_commit
            )
            measure_ceilings(record, options.samples)
            budget = Budget(options.minutes, begin)
            if not run(record, missing, budget, options, found["platform"] != "cpu"):
                left = sum(case not in record.done for case in cases)
                print(f"time is up, {left} cases to do: the same command goes on", file=sys.stderr)
                return MORE_TO_DO
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench.sweep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    failed = [c for c in cases if c.engine == OURS and "error" in record.done[c]]
    for case in failed:
        print(f"failed: {case}", file=sys.stderr)
    return 1 if failed else 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all results of a file share."""
    return {
        "samples": options.samples,
        "warm_up": _WARM_UP,
        "sampling": "greedy",
        "ignore_eos": True,
        "prefix_cache": False,
        "seed": plan.SEED,
    }


def _lists(options: argparse.Namespace) -> Lists:
    peers = [
        name
        for name, wanted in (
            (LLAMA_CPP, options.llama_bench),
            (TRANSFORMERS, options.transformers),
            (OPENAI, options.openai),
        )
        if wanted
    ]
    return Lists(
        models=options.model,
        formats=options.format,
        implementations=options.implementation,
        prompts=options.prompt,
        depths=options.depth,
        batches=options.batch,
        batch_depths=options.batch_depth,
        new_tokens=options.new,
        peers=peers,
    )


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="FILE", help="results; gone on with if there")
    add(
        "--model",
        nargs="+",
        default=list(PUBLISHED),
        help=f"{', '.join((*PUBLISHED, *SMALL))}: random weights; else a bundled name, folder or hub id",
    )
    add("--format", nargs="+", choices=FORMATS, default=list(reversed(FORMATS)))
    add("--implementation", nargs="+", choices=(*IMPLEMENTATIONS, "auto"), default=["xla"])
    lengths: dict[str, Any] = {"nargs": "+", "type": _positive, "metavar": "N"}
    add("--prompt", **lengths, default=list(LENGTHS), help="prompt lengths")
    add("--depth", **lengths, default=list(LENGTHS), help="depths to decode at, batch 1")
    add("--new", type=_positive, default=256, metavar="N", help="tokens to decode")
    add("--batch", nargs="*", type=_positive, default=list(BATCHES), metavar="B")
    add("--batch-depth", **lengths, default=[512], help="depths to decode batches at")
    add("--samples", type=_positive, default=5, metavar="N", help="timed runs of every case")
    add(
        "--minutes", type=float, metavar="M", help="stop before this is exceeded, with exit code 75"
    )
    add("--dry-run", action="store_true", help="print the cases and measure none")
    add("--retry-failed", action="store_true", help="measure again what failed before")
    add("--allow-other-commit", action="store_true", help="go on with results of another commit")
    add("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's benchmark, run beside ours")
    add(
        "--gguf",
        nargs="+",
        default=[],
        metavar="MODEL:FORMAT=PATH",
        help="files for it; others are written from our parameters while they are needed",
    )
    add("--transformers", action="store_true", help="run it beside ours, in bfloat16")
    add("--openai", metavar="URL", help="a running server, measured beside ours")
    add("--openai-model", metavar="NAME", help="what that server calls the model")
    options = parser.parse_args(argv)
    options.gguf = dict(_gguf(entry) for entry in options.gguf)
    if options.openai and not options.openai_model:
        raise ValueError("--openai needs --openai-model, the server's name of the model")
    if options.openai and (len(options.model), len(options.format)) != (1, 1):
        raise ValueError("--openai serves one model: give one --model and one --format")
    for model in options.model:
        if model not in (*PUBLISHED, *SMALL):
            _check_checkpoint(model)
    return options


def _check_checkpoint(model: str) -> None:
    from convert import hub  # Orbax is slow to import
    from gemma_jax.checkpoints import resolve

    hub.resolve(resolve(model))


def _gguf(entry: str) -> tuple[str, Path]:
    key, equals, path = entry.partition("=")
    if not equals or ":" not in key or not path:
        raise ValueError(f"--gguf {entry}: expected MODEL:FORMAT=PATH")
    return key, Path(path).expanduser()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
