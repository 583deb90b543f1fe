"""An engine that answers at once, and a program that runs a job with it: for tests that kill it."""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator

from gemma_jax.batch import Served, files, run_job
from gemma_jax.checkpoints import resolve
from gemma_jax.engine import Request, Result
from gemma_jax.lm import Completion
from gemma_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(resolve("tiny-dense"))
SERVED = Served(TOKENIZER, ("tiny",), 1024, 16)


class FakeEngine:
    """Answers each request with its own prompt, eight at a time, in a random order."""

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        requests = iter(requests)
        while batch := list(itertools.islice(requests, 8)):
            time.sleep(self._delay)
            random.shuffle(batch)
            for request in batch:
                text = TOKENIZER.decode(request.prompt)
                done = Completion(text, request.prompt, "stop", len(request.prompt))
                yield Result(request, done)


def main(source: str, output: str) -> None:
    """Runs the job in a process of its own for each pair of lines on standard input: one to begin, one to end.

    Says the process id, and then what `os.waitpid` said; a start takes no time, everything is imported before.
    """
    files._SECONDS_BETWEEN_GROUPS = 0.01
    while sys.stdin.readline():
        child = os.fork()
        if not child:
            run_job(source, output, SERVED, lambda _: FakeEngine(0.01), slots=8)
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
