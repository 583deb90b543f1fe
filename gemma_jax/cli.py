"""The command `gemma-jax`: convert, generate, chat, batch, info, doctor. Its arguments and its errors."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import gemma_jax
from gemma_jax import compilation_cache, terminal
from gemma_jax.batch import command
from gemma_jax.checkpoints import resolve
from gemma_jax.constraints import Constraint
from gemma_jax.sampling import Sampling

FORMATS = ("q4k", "eq8_0", "bf16")
_MODEL_HELP = "folder (converted or Hugging Face), hub id, or a bundled model: tiny-dense, tiny-moe"

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM

# What a user can mend by asking for something else; any other OSError is the machine's doing.
_BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (`sys.argv[1:]` by default) and returns the exit status.

    0 success, 1 failure, 2 bad input, 3 a batch job that ended with error records, 130 interrupted, 141 nobody reads
    the output any more, 143 terminated.
    Errors a user can meet are one line on stderr; a traceback is a bug in this program.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows "?"
            stream.reconfigure(errors="replace")
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except command.Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version or an error, already reported
        return int(stop.code or EXIT_OK)
    try:
        status: int | None = args.run(args)
    except BrokenPipeError:
        raise
    except _BAD_INPUT as error:
        return _report(error, EXIT_BAD_INPUT)
    except (OSError, MemoryError) as error:
        return _report(error, EXIT_FAILURE)
    except RuntimeError as error:  # XLA's errors derive from it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _report(f"not enough memory on the device: {error}", EXIT_FAILURE)
    return status or EXIT_OK


def _report(error: BaseException | str, status: int) -> int:
    """Writes one line, whatever the message looks like."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"gemma-jax: error: {text}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"gemma-jax: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; parsed arguments carry the command to call as `run`."""
    parser = _Parser(prog="gemma-jax", description="Gemma 4 in JAX, quantized.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    convert = commands.add_parser("convert", help="quantize a checkpoint into a folder")
    convert.add_argument("source", metavar="SRC", help=_MODEL_HELP)
    convert.add_argument("destination", metavar="DST", help="folder to make; must not exist")
    convert.add_argument("--format", choices=FORMATS, required=True)
    convert.set_defaults(run=_convert)

    generate = commands.add_parser("generate", help="continue texts")
    _add_model(generate)
    generate.add_argument("prompts", metavar="PROMPT", nargs="*", help="default: standard input")
    generate.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print text as it comes (default: on a terminal, with one prompt)",
    )
    generate.add_argument("--echo", action="store_true", help="print the prompt before its text")
    generate.add_argument("--stats", action="store_true", help="report speed on stderr")
    _add_sampling(generate, max_new_tokens=256)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk with a model; /reset starts over, /exit ends")
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    chat.add_argument("--thinking", action="store_true", help="let the model think first")
    _add_sampling(chat, max_new_tokens=1024)
    chat.set_defaults(run=_chat)

    command.add_parser(commands, _MODEL_HELP, FORMATS)

    info = commands.add_parser("info", help="what is in a checkpoint, and the memory it needs")
    info.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    info.add_argument("--context", type=int, metavar="N", help="tokens of context to plan for")
    info.add_argument("--batch", type=int, default=1, metavar="N", help="rows to plan for")
    info.set_defaults(run=_info)

    doctor = commands.add_parser(
        "doctor",
        help="which kernels run here, what is set wrong (exit status 1), whether a model fits",
    )
    doctor.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL_HELP)
    doctor.add_argument("--context", type=int, metavar="N", help="tokens of context to plan for")
    doctor.add_argument("--batch", type=int, default=1, metavar="N", help="rows to plan for")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--format", choices=FORMATS, help="quantize while loading")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="type of activations")


def _add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    group = parser.add_argument_group("sampling (greedy unless --temperature is given)")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    for name in ("temperature", "top_p", "min_p"):
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument("--logit-bias", type=_bias, action="append", metavar="ID=X")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    group.add_argument("--stop-id", type=int, action="append", dest="stop_ids", metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    text = parser.add_argument_group("what the text must match, one of")
    shape = text.add_mutually_exclusive_group()
    shape.add_argument("--json-schema", metavar="FILE|JSON", help="JSON under this schema")
    shape.add_argument("--regex", metavar="REGEX", help="all of it, in the syntax of Rust's regex")
    shape.add_argument("--choice", action="append", metavar="TEXT", help="one of those given")


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given, ID=NUMBER accepted") from None


def _sampling(args: argparse.Namespace) -> Sampling:
    """The settings given on the command line; those not given keep `Sampling`'s defaults."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    given: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("stop", "stop_ids"):
        given[name] = tuple(given.get(name, ()))
    given["logit_bias"] = dict(given.get("logit_bias", ()))
    return Sampling(**given, constraint=_constraint(args))


def _constraint(args: argparse.Namespace) -> Constraint | None:
    if args.json_schema is not None:
        schema = args.json_schema
        if not schema.lstrip().startswith(("{", "true", "false")):
            schema = Path(schema).read_text(encoding="utf-8")
        return Constraint.json_schema(schema)
    if args.regex is not None:
        return Constraint.regex(args.regex)
    return None if args.choice is None else Constraint.choice(args.choice)


def _convert(args: argparse.Namespace) -> None:
    from convert.converter import convert_checkpoint  # Orbax is slow to import

    compilation_cache.enable()
    manifest = convert_checkpoint(
        resolve(args.source), args.destination, format=args.format, progress=True
    )
    print(
        f"{args.destination}: {manifest.parameters:,} parameters in {manifest.format}, "
        f"{manifest.bits_per_weight:.3f} bits per weight"
    )


def _generate(args: argparse.Namespace) -> None:
    prompts = args.prompts or [sys.stdin.read()]
    sampling = _sampling(args)
    stream = len(prompts) == 1 and sys.stdout.isatty() if args.stream is None else args.stream
    if stream and len(prompts) > 1:
        raise ValueError(f"--stream: {len(prompts)} prompts given, one accepted")
    lm, limit = _load(args), args.max_new_tokens
    if stream:
        terminal.stream(lm, prompts[0], sampling, limit, echo=args.echo, stats=args.stats)
    else:
        terminal.generate(lm, prompts, sampling, limit, echo=args.echo, stats=args.stats)


def _chat(args: argparse.Namespace) -> None:
    sampling = _sampling(args)
    terminal.chat(
        _load(args),
        sampling,
        args.max_new_tokens,
        system=args.system,
        enable_thinking=args.thinking,
    )


def _info(args: argparse.Namespace) -> None:
    from gemma_jax.info import report  # imports Orbax

    print(report(resolve(args.model), context=args.context, batch=args.batch))


def _doctor(args: argparse.Namespace) -> int:
    from gemma_jax.doctor import examine  # imports Orbax

    model = None if args.model is None else resolve(args.model)
    report = examine(model, context=args.context, batch=args.batch)
    print(report.to_json() if args.json else report.to_text())
    return EXIT_FAILURE if report.problems else EXIT_OK


def _load(args: argparse.Namespace) -> gemma_jax.LanguageModel:
    return gemma_jax.load(args.model, format=args.format, dtype=args.dtype)


def _version() -> str:
    try:
        return f"gemma-jax {metadata.version('gemma-jax')}"
    except metadata.PackageNotFoundError:
        return "gemma-jax, not installed"


if __name__ == "__main__":
    sys.exit(main())
