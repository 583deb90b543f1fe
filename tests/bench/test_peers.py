"""Peers are asked for the very cases, and give samples in seconds or a reason."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.peers.huggingface import Transformers
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.openai_server import OpenAIServer, RefusedError
from bench.plan import DECODE, FIRST_TOKEN, LLAMA_CPP, OPENAI, PREFILL, Case

# Answers as llama-bench does: a line a test, after its messages; notes its arguments; dies of depth 99.
_FAKE = """#!{python}
import json, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as file:
    print(json.dumps(arguments), file=file)
value = dict(zip(arguments[::2], arguments[1::2]))
print("load_backend: loaded", file=sys.stderr)
prompts = [int(n) for n in value["-p"].split(",")]
for depth in [int(n) for n in value.get("-d", "0").split(",")]:
    if depth == 99:
        print("ggml: out of memory\\n#1 in ggml_abort ()\\n360 libc-start.c", file=sys.stderr)
        sys.exit(3)
    for prompt in prompts:
        samples = [1000000 * (prompt + depth + i) for i in range(int(value["-r"]))]
        print(json.dumps(dict(build_commit="0ad4a86", build_number=1, backends="CPU", n_threads=2,
            model_size=123, n_prompt=prompt, n_gen=int(value["-n"]), n_depth=depth, samples_ns=samples)), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A program that answers like llama-bench; its calls are in calls.jsonl beside it."""
    program = tmp_path / "llama-bench"
    program.write_text(_FAKE.format(python=sys.executable, log=str(tmp_path / "calls.jsonl")))
    program.chmod(0o755)
    (tmp_path / "model.gguf").touch()
    return program


def calls(program: Path) -> list[list[str]]:
    log = program.with_name("calls.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def llama(phase: str, *numbers: int) -> list[Case]:
    if phase == PREFILL:
        return [Case(LLAMA_CPP, "e2b", "q4k", None, PREFILL, 1, n) for n in numbers]
    return [Case(LLAMA_CPP, "e2b", "q4k", None, DECODE, 1, None, n, 16) for n in numbers]


def opened(program: Path, cases: list[Case], *, on_gpu: bool = False) -> LlamaCpp:
    return LlamaCpp(program, program.with_name("model.gguf"), cases, 3, on_gpu=on_gpu)


def test_llama_bench_loads_a_model_once_a_phase_and_gives_its_samples(fake: Path) -> None:
    cases = llama(DECODE, 32, 64) + llama(PREFILL, 128, 512)
    engine = opened(fake, cases)
    measured = [engine.measure(case) for case in cases]
    engine.close()
    assert [m["seconds"] for m in measured] == [
        pytest.approx([n / 1e3, (n + 1) / 1e3, (n + 2) / 1e3]) for n in (32, 64, 128, 512)
    ]
    decode, prefill = calls(fake)
    common = ["-m", str(fake.with_name("model.gguf")), "-o", "jsonl", "-r", "3", "-t"]
    assert decode[:7] == prefill[:7] == common
    assert decode[8:] == ["-p", "0", "-n", "16", "-d", "32,64"]
    assert prefill[8:] == ["-n", "0", "-p", "128,512"]
    assert measured[0]["command"].endswith("-p 0 -n 16 -d 32,64")
    assert str(fake.parent) not in measured[0]["command"]  # where files lay is nobody's business
    assert measured[0]["weight_bytes"] == 123
    assert measured[0]["peer"] == {"build_commit": "0ad4a86", "build_number": 1, "backends": "CPU"}


def test_on_a_gpu_all_layers_and_flash_attention_are_asked_for(fake: Path) -> None:
    [case] = llama(PREFILL, 8)
    engine = opened(fake, [case], on_gpu=True)
    engine.measure(case)
    engine.close()
    [arguments] = calls(fake)
    assert arguments[6:10] == ["-ngl", "99", "-fa", "1"]


def test_a_case_that_ends_llama_bench_fails_with_its_last_words_and_the_rest_go_on(
    fake: Path,
) -> None:
    cases = llama(DECODE, 32, 99, 128)
    engine = opened(fake, cases)
    engine.measure(cases[0])
    with pytest.raises(RuntimeError, match=r"status 3: ggml: out of memory$"):
        engine.measure(cases[1])
    assert engine.measure(cases[2])["seconds"][0] == pytest.approx(0.128)
    engine.close()
    assert [c[-1] for c in calls(fake)] == ["32,99,128", "128"]


def test_only_the_cases_that_are_missing_are_run(fake: Path) -> None:
    """A resumed sweep lists what is left; the benchmark may also be asked for one in the middle."""
    cases = llama(PREFILL, 8, 16, 32)
    engine = opened(fake, cases[1:])
    assert engine.measure(cases[2])["seconds"][0] == pytest.approx(0.032)
    engine.close()
    assert calls(fake)[0][-1] == "32"


def test_a_missing_program_or_file_is_named(tmp_path: Path, fake: Path) -> None:
    with pytest.raises(OSError, match="nothing is not there"):
        LlamaCpp(tmp_path / "nothing", None, llama(PREFILL, 8), 3, on_gpu=False)
    with pytest.raises(OSError, match=r"nothing\.gguf: no such GGUF file"):
        LlamaCpp(fake, tmp_path / "nothing.gguf", llama(PREFILL, 8), 3, on_gpu=False)


def test_a_file_is_written_from_our_parameters_and_gone_afterwards(fake: Path) -> None:
    case = Case(LLAMA_CPP, "tiny-dense", "eq8_0", None, PREFILL, 1, 8)
    engine = LlamaCpp(fake, None, [case], 3, on_gpu=False)
    engine.measure(case)
    [arguments] = calls(fake)
    file = Path(arguments[1])
    assert file.read_bytes()[:4] == b"GGUF"
    engine.close()
    assert not file.parent.exists()


# ------------------------------------------------------------------------------------------- OpenAI-compatible servers


class Handler(BaseHTTPRequestHandler):
    """Streams as many tokens as asked for, one every `GAP` seconds after `WAIT`."""

    GAP, WAIT = 0.01, 0.05
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.requests.append((self.path, body))
        if server.behaviour == "text only" and not isinstance(body["prompt"], str):
            self.send_error(400, "prompt must be a string")
            return
        if server.behaviour == "refuses":
            self.send_error(404, "no such model")
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        count = body["max_tokens"] - (server.behaviour == "ends early")
        time.sleep(self.WAIT)
        step = 2 if server.behaviour == "two at once" else 1
        for i in range(0, count, step):
            time.sleep(self.GAP * bool(i))
            self._event({"choices": [{"text": "a" * step, "finish_reason": None}]})
        self._event({"choices": [{"text": "", "finish_reason": "length"}]})
        if server.behaviour == "two at once":
            self._event({"choices": [], "usage": {"completion_tokens": count, "prompt_tokens": 7}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    """A server on a free port; `behaviour` says how it answers, `requests` what it was asked."""
    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.behaviour, httpd.requests = "ordinary", []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


DECODE_CASE = Case(OPENAI, "e2b", "bf16", None, DECODE, 1, None, 12, 10)
FIRST_CASE = Case(OPENAI, "e2b", "bf16", None, FIRST_TOKEN, 1, 12)


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_server_is_asked_for_a_greedy_stream_of_as_many_tokens(server: Any, suffix: str) -> None:
    OpenAIServer(server.url + suffix, "its-name", 2).measure(DECODE_CASE)
    assert len(server.requests) == 3  # a warm-up first
    for path, body in server.requests:
        assert path == "/v1/completions"
        assert len(body["prompt"]) == 12
        body.pop("prompt")
        assert body.pop("stream_options") == {"include_usage": True}
        assert body == {
            "model": "its-name",
            "max_tokens": 11,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }


def test_no_two_requests_have_the_same_prompt(server: Any) -> None:
    OpenAIServer(server.url, "m", 3).measure(FIRST_CASE)
    prompts = [tuple(body["prompt"]) for _, body in server.requests]
    assert len(set(prompts)) == 4


def test_decode_is_from_the_first_token_to_the_last_and_the_first_from_the_request(
    server: Any,
) -> None:
    """Sleeping takes at least as long as it was told to; both stay far from what the other one takes."""
    engine = OpenAIServer(server.url, "m", 2)
    decode, first = engine.measure(DECODE_CASE), engine.measure(FIRST_CASE)
    assert all(s >= 10 * Handler.GAP for s in decode["seconds"])
    assert all(s >= Handler.WAIT for s in first["seconds"])
    assert min(first["seconds"]) < Handler.WAIT + 10 * Handler.GAP
    assert decode["prompt"] == "token ids"


def test_a_server_without_token_ids_gets_a_repeated_word(server: Any) -> None:
    server.behaviour = "text only"
    measured = OpenAIServer(server.url, "m", 2).measure(FIRST_CASE)
    assert measured["prompt"] == "a repeated word"
    texts = [body["prompt"] for _, body in server.requests if isinstance(body["prompt"], str)]
    assert [len(text.split()) for text in texts] == [12, 12, 12]
    assert len(server.requests) == 4  # ids were tried once


def test_the_servers_own_count_decides_where_tokens_come_together(server: Any) -> None:
    server.behaviour = "two at once"
    case = Case(OPENAI, "e2b", "bf16", None, DECODE, 1, None, 12, 9)
    measured = OpenAIServer(server.url, "m", 2).measure(case)
    assert measured["prompt_tokens_counted"] == [7, 7]


def test_a_server_that_ends_early_or_refuses_is_an_error(server: Any) -> None:
    engine = OpenAIServer(server.url, "m", 2)
    server.behaviour = "ends early"
    with pytest.raises(RuntimeError, match="gave 10 of 11 tokens"):
        engine.measure(DECODE_CASE)
    server.behaviour = "refuses"
    with pytest.raises(RefusedError, match=r"status 404: .*no such model"):
        engine.measure(DECODE_CASE)


def test_what_is_no_url_is_named() -> None:
    with pytest.raises(ValueError, match=r"'localhost:8000': expected http://"):
        OpenAIServer("localhost:8000", "m", 2)


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_transformers_says_what_it_needs() -> None:
    with pytest.raises(RuntimeError, match="torch is not installed: --transformers needs"):
        Transformers("e2b", 2)
