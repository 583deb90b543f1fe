"""Any server with OpenAI's ``/v1/completions``, measured from the stream that a client sees."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from bench.plan import DECODE, Case

_TIMEOUT = 600.0
# Ordinary tokens in every vocabulary of the family; special ones come first, rare ones last.
_LOWEST_ID, _IDS = 1000, 20000


class RefusedError(RuntimeError):
    """The server answered with a status other than 200."""


class Stream(NamedTuple):
    """Times of a streamed answer, in seconds since the request, and what the server counted."""

    first: float
    last: float
    tokens: int
    prompt_tokens: int | None


class OpenAIServer:
    """A running server as a `bench.processes.Engine`.

    Every request has a prompt of its own, so that no prefix cache answers it: random token ids, or, if the server takes
    text only, one word as often as tokens are wanted behind a number.
    """

    def __init__(self, url: str, model: str, samples: int) -> None:
        """`url` is where ``/v1/completions`` is under: ``http://localhost:8000``, with or without ``/v1``.

        Raises:
          ValueError: it is no URL of HTTP.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r}: expected http://host:port")
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._model, self._samples = model, samples
        self._takes_ids = True
        self._rng = np.random.default_rng()

    def close(self) -> None:
        """The server is not ours to end."""

    def measure(self, case: Case) -> dict[str, Any]:
        """Seconds to the first token, or between the first and the last of decode, which must be as many as asked for.

        Raises:
          RuntimeError: the server refused, or ended the text early.
          OSError: it is not there.
        """
        decodes = case.phase == DECODE
        prompt = (case.depth if decodes else case.tokens) or 1
        new = (case.new_tokens or 0) + 1 if decodes else 1
        streams = [self._complete(prompt, new) for _ in range(self._samples + 1)][1:]
        for stream in streams:
            if stream.tokens != new:
                raise RuntimeError(
                    f"the server gave {stream.tokens} of {new} tokens: it must honour ignore_eos, and say in "
                    "its usage how many there were if it sends several at once"
                )
        return {
            "seconds": [s.last - s.first if decodes else s.first for s in streams],
            "prompt": "token ids" if self._takes_ids else "a repeated word",
            "prompt_tokens_counted": [s.prompt_tokens for s in streams],
            "peer": {"model": self._model},
        }

    def _complete(self, prompt_tokens: int, new_tokens: int) -> Stream:
        try:
            return self._request(self._prompt(prompt_tokens), new_tokens)
        except RefusedError:
            if not self._takes_ids:
                raise
            self._takes_ids = False
            return self._request(self._prompt(prompt_tokens), new_tokens)

    def _prompt(self, tokens: int) -> list[int] | str:
        if self._takes_ids:
            return [int(i) for i in self._rng.integers(_LOWEST_ID, _IDS, tokens)]
        return f"{self._rng.integers(10)}" + " the" * (tokens - 1)

    def _request(self, prompt: list[int] | str, new_tokens: int) -> Stream:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT)
        try:
            begin = time.perf_counter()
            headers = {"Content-Type": "application/json"}
            connection.request("POST", self._path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                text = " ".join(response.read(500).decode(errors="replace").split())
                raise RefusedError(f"{self._path}: status {response.status}: {text}")
            times: list[float] = []
            usage: dict[str, Any] = {}
            for event in _events(response):
                if "error" in event:
                    raise RuntimeError(f"{self._path}: {event['error']}")
                # A token that is no text yet, half a letter say, comes as an empty one.
                if event.get("choices"):
                    finished = event["choices"][0].get("finish_reason")
                    if event["choices"][0].get("text") or not finished:
                        times.append(time.perf_counter() - begin)
                usage = event.get("usage") or usage
        finally:
            connection.close()
        if not times:
            raise RuntimeError(f"{self._path}: the stream had no token")
        count = usage.get("completion_tokens", len(times))
        return Stream(times[0], times[-1], count, usage.get("prompt_tokens"))


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    for line in response:
        data = line.decode().strip()
        if data.startswith("data:") and (text := data.removeprefix("data:").strip()) != "[DONE]":
            yield json.loads(text)
