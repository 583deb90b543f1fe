"""What `gemma-jax generate` and `gemma-jax chat` write: streamed text, thoughts apart, speed."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.lm import LanguageModel
from gemma_jax.sampling import Sampling
from gemma_jax.streaming import stream_text

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_PROMPT = "> "


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    echo: bool = False,
    stats: bool = False,
) -> None:
    """Prints the continuation of every prompt, all generated as one batch.

    Several are printed with their prompts and a blank line between, since they could not be told
    apart otherwise.
    """
    start = time.perf_counter()
    completions = lm.generate(list(prompts), sampling, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - start
    echo = echo or len(prompts) > 1
    texts = [(p if echo else "") + c.text for p, c in zip(prompts, completions, strict=True)]
    print("\n\n".join(texts), flush=True)
    if stats:
        tokens = sum(len(c.tokens) for c in completions)
        _write_stats(
            f"{tokens} tokens in {len(prompts)} rows, {seconds:.2f} s with compilation, "
            f"{tokens / seconds:.1f} tokens/s"
        )


def stream(
    lm: LanguageModel,
    prompt: str,
    sampling: Sampling,
    max_new_tokens: int,
    *,
    echo: bool = False,
    stats: bool = False,
) -> None:
    """Prints the continuation of one prompt as it comes."""
    ids = lm.tokenizer.encode(prompt)
    if echo:
        print(prompt, end="", flush=True)
    start = time.perf_counter()
    clock = _Clock(lm.stream(ids, sampling, max_new_tokens=max_new_tokens))
    for text in stream_text(clock, lm.tokenizer.stream_decoder(), sampling.stop):
        print(text, end="", flush=True)
    print(flush=True)
    if stats:
        _write_stats(_speed(len(ids), start, clock.times))


def _speed(prompt_tokens: int, start: float, times: Sequence[float]) -> str:
    """The first two tokens wait for the compilation of prefill and decoding: the rate is without them."""
    line = f"{prompt_tokens} prompt tokens, {len(times)} new tokens in {times[-1] - start:.2f} s"
    line += f", the first after {times[0] - start:.2f} s with compilation"
    if len(times) > 2:
        line += f"; {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s decoding"
    return line


def chat(
    lm: LanguageModel,
    sampling: Sampling,
    max_new_tokens: int,
    *,
    system: str | None = None,
    enable_thinking: bool = False,
) -> None:
    """Talks with a model until the input ends or says /exit; /reset forgets the conversation.

    On a terminal thoughts are dim, Ctrl-C ends an answer, and an error ends only its turn. With
    input or output from elsewhere, each input line is a turn, stdout carries the answers alone and
    thoughts go to stderr.

    Raises:
        ValueError: from the model, unless it is a terminal's user who can say something else.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for line in _lines(terminal):
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            messages = list(opening)
            continue
        if not command:
            continue
        turn = [*messages, {"role": "user", "content": line}]
        try:
            pieces = lm.stream_chat(
                turn,
                sampling,
                max_new_tokens=max_new_tokens,
                enable_thinking=enable_thinking,
            )
            answer = _show(pieces, terminal)
        except ValueError as error:
            if not terminal:
                raise
            print(f"gemma-jax: error: {error}", file=sys.stderr)
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]


def _lines(terminal: bool) -> Iterator[str]:
    """The user's turns, one a line."""
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - editing and history for input()

    print("/reset starts over, /exit ends, Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            print()
            return


def _show(pieces: Iterable[tuple[str, str]], terminal: bool) -> str:
    """Prints an answer as it comes, thoughts apart, and returns it without them."""
    answer = ""
    last_kind = "answer"
    try:
        for kind, text in pieces:
            if kind == "answer":
                print(("\n\n" if last_kind == "thought" else "") * terminal, end="")
                print(text, end="", flush=True)
                answer += text
            elif terminal:
                print(f"{_DIM}{text}{_PLAIN}", end="", flush=True)
            else:
                print(text, end="", file=sys.stderr, flush=True)
            last_kind = kind
    except KeyboardInterrupt:
        if not terminal:
            raise
    print(flush=True)
    return answer


class _Clock:
    """Passes tokens on and notes when each came."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = tokens
        self.times: list[float] = []

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            self.times.append(time.perf_counter())
            yield token


def _write_stats(line: str) -> None:
    print(f"gemma-jax: {line}", file=sys.stderr)
