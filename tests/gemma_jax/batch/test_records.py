"""Lines to requests and completions to lines: the fields of OpenAI's Batch format, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from fake_engine import SERVED, TOKENIZER

from gemma_jax.batch.answers import answer_record, error_record
from gemma_jax.batch.records import CHAT, COMPLETION, LineError, parse_line, requests_of
from gemma_jax.engine import Request
from gemma_jax.lm import Completion

MESSAGES = [{"role": "user", "content": "Hello"}]


def line(url: str = CHAT, **body: Any) -> bytes:
    if url == CHAT:
        body = {"messages": MESSAGES} | body
    elif "prompt" not in body:
        body = {"prompt": "Hello"} | body
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()


def requests(data: bytes) -> list[Request]:
    return requests_of(parse_line(data, 1), SERVED)


def test_a_chat_goes_through_the_template_and_a_prompt_as_it_is() -> None:
    [chat] = requests(line())
    assert list(chat.prompt) == TOKENIZER.encode_chat(MESSAGES)
    assert list(requests(line(COMPLETION))[0].prompt) == TOKENIZER.encode("Hello")
    assert requests(line(COMPLETION, prompt=[5, 6]))[0].prompt == (5, 6)
    assert list(requests(b'{"prompt": "Hello"}')[0].prompt) == TOKENIZER.encode("Hello")
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        }
    ]
    assert requests(line(messages=parts))[0].prompt == chat.prompt


def test_settings_arrive_and_defaults_are_those_of_the_api() -> None:
    [default] = requests(line())
    assert (default.sampling.temperature, default.sampling.top_p) == (1.0, 1.0)
    assert default.max_new_tokens == SERVED.max_new_tokens
    assert default.top_logprobs is None
    [request] = requests(
        line(
            temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, stop="END", max_tokens=9, logprobs=True,
            top_logprobs=4, presence_penalty=1, frequency_penalty=-1, logit_bias={"5": -100}, user="u",
        )
    )  # fmt: skip
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed, s.stop) == (
        0.5,
        0.9,
        7,
        0.1,
        3,
        ("END",),
    )
    assert (s.presence_penalty, s.frequency_penalty, s.logit_bias) == (1, -1, {5: -100})
    assert (request.max_new_tokens, request.top_logprobs) == (9, 4)


def test_rows_without_a_seed_have_noise_of_their_own_and_choices_too() -> None:
    seeds = {r.sampling.seed for r in requests(line(n=3))}
    assert len(seeds) == 3
    assert seeds == {r.sampling.seed for r in requests(line(n=3))}
    other = json.loads(line()) | {"custom_id": "b"}
    assert requests(json.dumps(other).encode())[0].sampling.seed not in seeds


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"{", "invalid_json", "not JSON"),
        (b"\xff\xfe{}", "invalid_encoding", "not UTF-8"),
        (b"[" * 100_000, "invalid_json", "not JSON"),
        (b"[1]", "invalid_json", "a list given"),
        (b"{}", "invalid_custom_id", "nothing given"),
        (b'{"custom_id": 5}', "invalid_custom_id", "a number given|an integer given"),
        (b'{"custom_id": "\\ud800", "url": "x"}', "invalid_custom_id", "Unicode"),
        (b'{"custom_id": "a", "method": "GET"}', "invalid_method", "'GET' given"),
        (b'{"custom_id": "a", "url": "/v1/embeddings"}', "invalid_url", "/v1/embeddings"),
        (b'{"custom_id": "a", "url": "/v1/completions"}', "invalid_body", "body"),
        (line(model="gpt"), "model_not_found", "'gpt' given, this job serves 'tiny'"),
        (line(messages=[]), "invalid_parameter", "messages"),
        (line(messages=["x"]), "invalid_parameter", r"messages\[0\]"),
        (line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "invalid_parameter", "image_url"),
        (line(temperature=3), "invalid_parameter", "temperature: 3 given"),
        (line(temperature="hot"), "invalid_parameter", "temperature: 'hot'"),
        (line(max_tokens=0), "invalid_parameter", "max_tokens: 0"),
        (line(max_tokens=True), "invalid_parameter", "max_tokens"),
        (line(n=0), "invalid_parameter", "n: 0"),
        (line(top_logprobs=3), "invalid_parameter", "logprobs: true"),
        (line(stop=[""]), "invalid_parameter", "stop"),
        (line(stop=5), "invalid_parameter", "stop"),
        (line(stop_token_ids=5), "invalid_parameter", "stop_token_ids"),
        (line(logit_bias={"x": 1}), "invalid_parameter", "logit_bias: 'x'"),
        (line(stream=True), "invalid_parameter", "stream"),
        (line(tempratur=1), "invalid_parameter", "tempratur: unknown"),
        (line(COMPLETION, prompt=[10**9]), "invalid_parameter", "prompt: token ids"),
        (line(COMPLETION, prompt={}), "invalid_parameter", "prompt"),
        (line(COMPLETION, prompt=[5] * 1024), "context_length_exceeded", "1024 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_named(data: bytes, code: str, message: str) -> None:
    with pytest.raises(LineError, match=message) as error:
        requests(data)
    assert error.value.code == code
    record = json.loads(error_record(7, error.value))
    assert (record["line"], record["error"]["code"]) == (7, code)


FIELDS = (
    *("messages", "tools", "tool_choice", "chat_template_kwargs", "prompt", "stop", "stop_token_ids", "seed", "n"),
    *("logit_bias", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "max_tokens"),
    *("max_completion_tokens", "logprobs", "top_logprobs", "ignore_eos", "model", "response_format", "suffix"),
)  # fmt: skip
VALUES = (
    *(None, True, -1, 10**30, 1e300, float("nan"), float("inf"), "", "x", "\ud800", [], [None], [{}], [[]], {}),
    *([-1], ["a", 5], [{"role": 5}], [{"role": "user", "content": 5}], [{"role": "user", "content": {"a": 1}}]),
    *({"5": None}, {"5": "x"}, {"5": float("nan")}, {"type": []}, {"enable_thinking": []}, [{"type": "function"}]),
    *([{"role": "assistant", "tool_calls": 5}], [{"role": "tool", "content": "x"}], [{"function": {"name": []}}]),
)  # fmt: skip


@pytest.mark.parametrize("url", [CHAT, COMPLETION])
@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_a_field_raises_anything_but_the_error_of_its_line(
    url: str, field: str
) -> None:
    for value in VALUES:
        with contextlib.suppress(LineError):
            for request in requests(line(url, **{field: value})):
                assert request.max_new_tokens >= 1


def test_a_token_that_was_impossible_has_a_number_in_json() -> None:
    for url in (CHAT, COMPLETION):
        row = parse_line(line(url, logprobs=True if url == CHAT else 1), 1)
        done = Completion("", (5,), "stop", 4, "", (float("-inf"),), ({5: float("nan")},))
        record = json.loads(answer_record(row, SERVED, requests_of(row, SERVED), [done], 0))
        logprobs = record["response"]["body"]["choices"][0]["logprobs"]
        value = logprobs["content"][0]["logprob"] if url == CHAT else logprobs["token_logprobs"][0]
        assert value == -9999.0


def test_an_answer_is_a_chat_completion_with_thought_usage_and_logprobs() -> None:
    row = parse_line(line(logprobs=True, top_logprobs=1, n=2), 1)
    both = requests_of(row, SERVED)
    text = "<|channel>thought\nHm.\n<channel|>Yes"
    tokens = tuple(TOKENIZER.encode(text, add_bos=False))
    logprobs = tuple(-float(i) for i in range(len(tokens)))
    done = Completion("", tokens, "stop", 4, "", logprobs, tuple({t: 0.0} for t in tokens))
    record = json.loads(answer_record(row, SERVED, both, [done, done], 2))
    assert (record["custom_id"], record["response"]["status_code"], record["error"]) == (
        "a",
        200,
        None,
    )
    body = record["response"]["body"]
    assert [c["index"] for c in body["choices"]] == [0, 1]
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}
    content = choice["logprobs"]["content"]
    assert [c["logprob"] for c in content] == list(logprobs)
    assert all(c["top_logprobs"][0]["token"] == c["token"] for c in content)
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 2 * len(tokens),
        "total_tokens": 4 + 2 * len(tokens),
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_what_is_no_unicode_is_escaped_in_the_error_that_names_it() -> None:
    with pytest.raises(LineError, match="unknown parameter") as error:
        requests(b'{"prompt": "a", "\\ud800": 1}')
    written = error_record(1, error.value)
    assert "\ud800: unknown" in json.loads(written.decode("utf-8"))["error"]["message"]
