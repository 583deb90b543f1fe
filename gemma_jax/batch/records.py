"""Lines of a job to requests: OpenAI's Batch format, and a plain one.

A line is ``{"custom_id", "method", "url", "body"}`` with the body of a chat completion or of a completion
(https://platform.openai.com/docs/api-reference/batch), or plain: ``{"prompt": text, …}`` with the names that a
completion's body has. What it asks for and is not served is an error that names the field, never ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from gemma_jax.engine import Request
from gemma_jax.sampling import Sampling
from gemma_jax.tokenizer import Tokenizer

CHAT, COMPLETION, PLAIN = "/v1/chat/completions", "/v1/completions", "prompt"
_MOST_CHOICES = 128


class LineError(ValueError):
    """Why a line cannot be answered.

    Attributes:
      code: a word for programs, such as "invalid_json".
      custom_id: of the line, if it has one that can be read.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the input, understood.

    Attributes:
      line: its number, from 1.
      custom_id: unique in a job; a plain line that has none gets ``line-<number>``.
      kind: `CHAT`, `COMPLETION` or `PLAIN`.
      body: its parameters.
    """

    line: int
    custom_id: str
    kind: str
    body: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Served:
    """What a job answers with.

    Attributes:
      tokenizer: of the model.
      names: what a body may call the model; the first is what answers say.
      context: most positions of a row.
      max_new_tokens: of a body that names no limit.
    """

    tokenizer: Tokenizer
    names: tuple[str, ...]
    context: int
    max_new_tokens: int


def parse_line(data: bytes, line: int) -> Row:
    """The row of a line.

    Raises:
      LineError: it is no JSON object in UTF-8, or not in one of the two forms.
    """
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LineError("invalid_encoding", f"the line is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json", f"the line is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise LineError("invalid_json", f"a JSON object expected, {_kind(record)} given")
    custom_id = record.get("custom_id")
    is_plain = "prompt" in record and "body" not in record
    if custom_id is None and is_plain:
        custom_id = f"line-{line}"
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError(
            "invalid_custom_id", f"custom_id: a non-empty string expected, {_kind(custom_id)} given"
        )
    try:
        custom_id.encode("utf-8")
    except UnicodeEncodeError:
        raise LineError("invalid_custom_id", "custom_id: not valid Unicode") from None
    if is_plain:
        parameters = {key: value for key, value in record.items() if key != "custom_id"}
        return Row(line, custom_id, PLAIN, parameters)
    method, url, body = record.get("method", "POST"), record.get("url"), record.get("body")
    if method != "POST":
        raise LineError("invalid_method", f"method: {method!r} given, 'POST' accepted", custom_id)
    if url not in (CHAT, COMPLETION):
        raise LineError(
            "invalid_url", f"url: {url!r} given, {CHAT!r} and {COMPLETION!r} accepted", custom_id
        )
    if not isinstance(body, dict):
        raise LineError(
            "invalid_body", f"body: a JSON object expected, {_kind(body)} given", custom_id
        )
    return Row(line, custom_id, url, body)


def requests_of(row: Row, served: Served) -> list[Request]:
    """The requests that answer a row, one for each of its ``n`` choices; their key is (row, choice).

    Raises:
      LineError: a parameter is unknown, impossible or not served, or the prompt is too long.
    """
    try:
        body = _Body(row, served)
        prompt = body.prompt()
        sampling = body.sampling(row.custom_id)
        limit, top_logprobs, choices = body.max_new_tokens(), body.top_logprobs(), body.choices()
        body.refuse_what_is_left()
    except LineError:
        raise
    except ValueError as error:
        raise LineError("invalid_parameter", str(error), row.custom_id) from None
    if len(prompt) + 1 > served.context:
        raise LineError(
            "context_length_exceeded",
            f"the prompt has {len(prompt)} tokens; this job has room for {served.context} of prompt and answer",
            row.custom_id,
        )
    limit = min(limit, served.context - len(prompt))
    return [
        Request(
            prompt=tuple(prompt),
            sampling=dataclasses.replace(sampling, seed=(sampling.seed + choice) % 2**32),
            max_new_tokens=limit,
            top_logprobs=top_logprobs,
            key=(row, choice),
        )
        for choice in range(choices)
    ]


class _Body:
    """The parameters of a body, each taken once."""

    def __init__(self, row: Row, served: Served) -> None:
        self._kind, self._served = row.kind, served
        self._left = {key: value for key, value in row.body.items() if value is not None}
        model = self._take("model", str, None)
        if model is not None and model not in served.names:
            raise LineError(
                "model_not_found",
                f"model: {model!r} given, this job serves {', '.join(map(repr, served.names))}",
                row.custom_id,
            )

    def prompt(self) -> list[int]:
        tokenizer = self._served.tokenizer
        if self._kind == CHAT:
            messages = self._take("messages", list, None)
            if not messages:
                raise ValueError("messages: a non-empty list expected")
            tools = self._take("tools", list, None)
            choice = self._take("tool_choice", str, "auto")
            if choice not in ("auto", "none"):
                raise ValueError(f"tool_choice: {choice!r} given, 'auto' and 'none' accepted")
            options = self._take("chat_template_kwargs", dict, {})
            if unknown := set(options) - {"enable_thinking"}:
                raise ValueError(
                    f"chat_template_kwargs: {sorted(unknown)} given, enable_thinking accepted"
                )
            return tokenizer.encode_chat(
                [_with_text(m, i) for i, m in enumerate(messages)],
                tools=None if choice == "none" else tools,
                enable_thinking=bool(options.get("enable_thinking", False)),
            )
        prompt = self._left.pop("prompt", None)
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        if not ids:
            raise ValueError(f"prompt: text or a list of token ids expected, {_kind(prompt)} given")
        if not all(0 <= token < tokenizer.vocab_size for token in prompt):
            raise ValueError(f"prompt: token ids from 0 to {tokenizer.vocab_size - 1} accepted")
        return prompt

    def sampling(self, custom_id: str) -> Sampling:
        stop = self._left.pop("stop", ())
        stop_ids = self._take("stop_token_ids", list, [])
        bias = self._take("logit_bias", dict, {})
        # A row's own noise, the same whenever the job runs, wherever the row stands.
        digest = hashlib.blake2b(custom_id.encode(), digest_size=4).digest()
        seed = self._take("seed", int, int.from_bytes(digest, "little"))
        vocabulary = self._served.tokenizer.vocab_size
        biases = {_token_id("logit_bias", token, vocabulary): v for token, v in bias.items()}
        return Sampling(
            temperature=self._number("temperature", 1.0, 0.0, 2.0),
            top_p=self._number("top_p", 1.0, 0.0, 1.0),
            top_k=max(0, self._take("top_k", int, 0)),
            min_p=self._number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=self._number("repetition_penalty", 1.0, 1e-3, 100.0),
            presence_penalty=self._number("presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=self._number("frequency_penalty", 0.0, -2.0, 2.0),
            logit_bias=biases,
            seed=seed % 2**32,
            stop=(stop,) if isinstance(stop, str) else stop,
            stop_ids=tuple(_token_id("stop_token_ids", token, vocabulary) for token in stop_ids),
            ignore_eos=self._take("ignore_eos", bool, False),
        )

    def max_new_tokens(self) -> int:
        given = [self._take(name, int, None) for name in ("max_completion_tokens", "max_tokens")]
        limit = next((n for n in given if n is not None), self._served.max_new_tokens)
        if limit < 1:
            raise ValueError(f"max_tokens: {limit} given, at least 1 accepted")
        return limit

    def top_logprobs(self) -> int | None:
        if self._kind == CHAT:
            wanted = self._take("logprobs", bool, False)
            count = self._take("top_logprobs", int, 0)
            if count and not wanted:
                raise ValueError("top_logprobs: given without logprobs: true")
        else:
            count = self._take("logprobs", int, None)
            wanted, count = count is not None, count or 0
        if not 0 <= count <= 20:
            raise ValueError(f"top_logprobs: {count} given, 0 to 20 accepted")
        return count if wanted else None

    def choices(self) -> int:
        count = self._take("n", int, 1)
        if not 1 <= count <= _MOST_CHOICES:
            raise ValueError(f"n: {count} given, 1 to {_MOST_CHOICES} accepted")
        return count

    def refuse_what_is_left(self) -> None:
        left = self._left
        shape = left.pop("response_format", {"type": "text"})
        if not isinstance(shape, dict) or shape.get("type") != "text":
            raise ValueError(
                f"response_format: {json.dumps(shape)[:200]} given, {{'type': 'text'}} accepted"
            )
        for name in ("user", "metadata", "store", "service_tier", "parallel_tool_calls"):
            left.pop(name, None)  # they say nothing about the answer
        for name, value in (("stream", False), ("echo", False), ("best_of", 1), ("suffix", "")):
            if left.pop(name, value) != value:
                raise ValueError(f"{name}: not served by batch jobs")
        if left:
            raise ValueError(f"{min(left)}: unknown parameter")

    def _take(self, name: str, kind: type, default: Any) -> Any:
        value = self._left.pop(name, default)
        if value is not default and type(value) is not kind:
            raise ValueError(f"{name}: {_kind(value)} given, {_NAMES[kind]} accepted")
        return value

    def _number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._left.pop(name, default)
        if type(value) not in (int, float) or not low <= value <= high or math.isnan(value):
            raise ValueError(f"{name}: {value!r} given, a number from {low:g} to {high:g} accepted")
        return float(value)


_NAMES = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return _NAMES.get(type(value), "a number")


def _token_id(name: str, token: Any, vocabulary: int) -> int:
    try:
        number = int(token)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < vocabulary:
        raise ValueError(f"{name}: {token!r} given, token ids from 0 to {vocabulary - 1} accepted")
    return number


def _with_text(message: Any, index: int) -> dict[str, Any]:
    """A message whose content is text: parts of text are put together, others are refused."""
    if not isinstance(message, dict):
        raise ValueError(f"messages[{index}]: an object expected, {_kind(message)} given")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise ValueError(f"messages[{index}]: content of type {kind!r} given, text accepted")
    return message | {"content": "".join(str(part.get("text", "")) for part in content)}
