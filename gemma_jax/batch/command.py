"""``gemma-jax batch``: its arguments, its signals and its exit status."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

EXIT_ERROR_RECORDS = 3

_DESCRIPTION = """\
Answers every line of IN and writes each answer to OUT as soon as it is there. Lines are in the format of OpenAI's
Batch API (chat completions and completions), or {"prompt": "...", "max_tokens": 64, ...}. Lines that cannot be
answered become records in OUT.errors.jsonl. Interrupted in any way, the same command goes on where OUT ends."""

_EPILOG = """\
exit status: 0 all lines are answered, 1 failure, 2 bad input, 3 finished with error records, 130 Ctrl-C, 143 SIGTERM"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: the job ends as by Ctrl-C."""


def add_parser(commands: Any, model_help: str, formats: tuple[str, ...]) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("source", metavar="IN", help="JSON lines, .gz, .zst; - is standard input")
    parser.add_argument("output", metavar="OUT", help="likewise; - is standard output, not resumed")
    parser.add_argument("--model", required=True, metavar="MODEL", help=model_help)
    parser.add_argument("--format", choices=formats, help="quantize while loading")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="type of activations")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="rows at a time (8)")
    parser.add_argument("--context", type=int, metavar="N", help="most tokens of a row (4096)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of lines with no limit (256)"
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what lines may call the model, besides MODEL and the last part of it",
    )
    parser.add_argument("--errors", metavar="FILE", help="error records (OUT.errors.jsonl)")
    parser.add_argument("--metrics", metavar="FILE", help=".jsonl, or Prometheus text")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a bar (default: on a terminal)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster; without ADDRESS, on RAY_ADDRESS or one that is started here",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="Ray actors (one a GPU, or one a machine)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the job; returns the exit status."""
    from gemma_jax.batch.job import run_job
    from gemma_jax.batch.progress import Progress

    for name in ("slots", "max_new_tokens", "workers", "context"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} given, at least 1 accepted")
    if args.workers and args.ray is None:
        raise ValueError("--workers: given without --ray")
    before = signal.signal(signal.SIGTERM, _terminate)
    progress = Progress(args.progress, args.metrics)
    try:
        served, engine, settings = _cluster(args) if args.ray is not None else _here(args)
        signal.signal(signal.SIGTERM, _terminate)  # Ray has a handler of its own
        summary = run_job(
            args.source,
            args.output,
            served,
            engine,
            slots=args.slots,
            errors=args.errors,
            settings=settings,
            progress=progress,
        )
    except KeyboardInterrupt:
        progress.end()
        if args.output != "-":
            progress.note(f"interrupted; the same command goes on where {args.output} ends")
        raise
    finally:
        progress.end()
        signal.signal(signal.SIGTERM, before)
    print(
        f"{summary.answered} answered, {summary.failed} failed of {summary.rows} lines "
        f"({summary.answered_now} and {summary.failed_now} in this run)",
        file=sys.stderr,
    )
    return EXIT_ERROR_RECORDS if summary.failed else 0


def _terminate(*_: object) -> None:
    raise Terminated


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    return (*args.served_model_name, args.model, Path(args.model).name)


def _here(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    import gemma_jax
    from gemma_jax.batch.records import Served
    from gemma_jax.engine import default_context

    lm = gemma_jax.load(args.model, format=args.format, dtype=args.dtype)
    context = args.context or default_context(lm.config)
    served = Served(lm.tokenizer, _names(args), context, args.max_new_tokens)

    def engine(slots: int) -> gemma_jax.Engine:
        return gemma_jax.Engine.from_language_model(lm, slots=slots, context=context)

    return served, engine, _settings(args, context)


def _cluster(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    from gemma_jax.batch.cluster import Cluster
    from gemma_jax.batch.records import Served

    cluster = Cluster(
        args.model,
        args.format,
        args.dtype,
        args.context,
        address=args.ray or None,
        workers=args.workers,
    )
    served = Served(cluster.tokenizer, _names(args), cluster.context, args.max_new_tokens)
    return served, cluster.with_slots, _settings(args, cluster.context)


def _settings(args: argparse.Namespace, context: int) -> dict[str, Any]:
    from convert import hub
    from gemma_jax.batch.sidecar import checkpoint_fingerprint
    from gemma_jax.checkpoints import resolve

    return {
        "model": args.model,
        "checkpoint": checkpoint_fingerprint(hub.resolve(resolve(args.model))),
        "format": args.format,
        "dtype": args.dtype,
        "context": context,
        "max_new_tokens": args.max_new_tokens,
    }
