"""Completions to lines of the output, and what cannot be answered to lines of the error file.

A row in OpenAI's Batch format is answered in it (https://platform.openai.com/docs/api-reference/batch/request-output),
a plain one with ``{"custom_id", "text", "finish_reason", "usage"}``. Names of a response are made of its custom_id, so
that the same row has the same ones in every run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_jax.batch.records import CHAT, PLAIN, LineError, Row, Served
from gemma_jax.engine import Request
from gemma_jax.lm import Completion
from gemma_jax.streaming import THINKING_MARKERS, TOOL_MARKERS, split_thinking, stream_text
from gemma_jax.tokenizer import Tokenizer

_IMPOSSIBLE = -9999.0


def error_record(line: int, error: LineError) -> bytes:
    """The line of the error file for a line that cannot be answered."""
    return _line(
        {
            "id": _name("batch_req", f"{error.custom_id}\n{line}"),
            "custom_id": error.custom_id,
            "line": line,
            "response": None,
            "error": {"code": error.code, "message": str(error)},
        }
    )


def answer_record(
    row: Row,
    served: Served,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    cached: int,
) -> bytes:
    """The output line of a row: of its requests, in order, the completions."""
    choice: Callable[..., dict[str, Any]] = _chat_choice if row.kind == CHAT else _text_choice
    choices = [
        {
            "index": i,
            **choice(row, request, done, served.tokenizer),
            "finish_reason": done.finish_reason,
        }
        for i, (request, done) in enumerate(zip(requests, completions, strict=True))
    ]
    generated = sum(len(done.tokens) for done in completions)
    usage = {
        "prompt_tokens": completions[0].prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": completions[0].prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if row.kind == PLAIN:
        texts = [c["text"] for c in choices]
        answer: dict[str, Any] = {"custom_id": row.custom_id, "text": texts[0]}
        if len(texts) > 1:
            answer["texts"] = texts
        if choices[0]["logprobs"]:
            answer["logprobs"] = choices[0]["logprobs"]
        return _line(answer | {"finish_reason": choices[0]["finish_reason"], "usage": usage})
    body = {
        "id": _name("chatcmpl" if row.kind == CHAT else "cmpl", row.custom_id),
        "object": "chat.completion" if row.kind == CHAT else "text_completion",
        "created": int(time.time()),
        "model": row.body.get("model") or served.names[0],
        "choices": choices,
        "usage": usage,
    }
    return _line(
        {
            "id": _name("batch_req", row.custom_id),
            "custom_id": row.custom_id,
            "response": {
                "status_code": 200,
                "request_id": _name("req", row.custom_id),
                "body": body,
            },
            "error": None,
        }
    )


def _chat_choice(
    row: Row, request: Request, done: Completion, tokenizer: Tokenizer
) -> dict[str, Any]:
    keep = (*THINKING_MARKERS, *TOOL_MARKERS) if row.body.get("tools") else THINKING_MARKERS
    decoder = tokenizer.stream_decoder(keep=keep)
    pieces = list(split_thinking(stream_text(done.tokens, decoder, request.sampling.stop)))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(text for kind, text in pieces if kind == "answer"),
    }
    if thought := "".join(text for kind, text in pieces if kind == "thought"):
        message["reasoning_content"] = thought
    logprobs = None
    if done.logprobs is not None:
        tops = done.top_logprobs or ({},) * len(done.tokens)
        logprobs = {
            "content": [
                _token(tokenizer, token, value)
                | {"top_logprobs": [_token(tokenizer, t, v) for t, v in top.items()]}
                for token, value, top in zip(done.tokens, done.logprobs, tops, strict=True)
            ]
        }
    return {"message": message, "logprobs": logprobs}


def _text_choice(
    row: Row, request: Request, done: Completion, tokenizer: Tokenizer
) -> dict[str, Any]:
    logprobs = None
    if done.logprobs is not None:
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in done.tokens]
        offsets = [0]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        logprobs = {
            "tokens": texts,
            "token_logprobs": [_finite(value) for value in done.logprobs],
            "top_logprobs": [
                {
                    tokenizer.decode([t], skip_special_tokens=False): _finite(v)
                    for t, v in top.items()
                }
                for top in done.top_logprobs or ()
            ],
            "text_offset": offsets[: len(texts)],
        }
    return {"text": done.text, "logprobs": logprobs}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token], skip_special_tokens=False)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    """JSON has no infinity: what is impossible gets the number that OpenAI writes for it."""
    return logprob if logprob > _IMPOSSIBLE else _IMPOSSIBLE


def _name(kind: str, text: str) -> str:
    return f"{kind}_{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")  # of a lone surrogate, JSON's own escape
