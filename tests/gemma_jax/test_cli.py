"""The command line: arguments, errors, streaming and the terminal chat, on a small fake model."""

import errno
import io
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import gemma_jax
from gemma_jax import cli, terminal
from gemma_jax.checkpoints import BUNDLED, resolve
from gemma_jax.constraints import Constraint
from gemma_jax.model import param_shapes
from gemma_jax.sampling import Sampling
from gemma_jax.streaming import StreamDecoder


class FakeTokenizer:
    """One token per UTF-8 byte."""

    def encode(self, text):
        return list(text.encode())

    def stream_decoder(self):
        return StreamDecoder(lambda token: bytes([token]))


class FakeLM:
    """Continues every text with `reply` and answers every chat with `pieces`."""

    tokenizer = FakeTokenizer()

    def __init__(self, reply="", pieces=(), error=None):
        self.reply, self.pieces, self.error = reply, pieces, error
        self.calls = []

    def generate(self, prompts, sampling, *, max_new_tokens):
        self.calls.append((prompts, sampling, max_new_tokens))
        if self.error:
            raise self.error
        return [SimpleNamespace(text=self.reply, tokens=list(self.reply.encode()))] * len(prompts)

    def stream(self, prompt_ids, sampling, *, max_new_tokens):
        self.calls.append((prompt_ids, sampling, max_new_tokens))
        yield from self.reply.encode()

    def stream_chat(self, messages, sampling, *, max_new_tokens, enable_thinking):
        self.calls.append((messages, sampling, max_new_tokens, enable_thinking))
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@pytest.fixture
def use(monkeypatch):
    """Makes `gemma_jax.load` return the given fake; returns the arguments of its calls."""

    def install(lm):
        loads = []

        def load(path, **options):
            loads.append((path, options))
            return lm

        monkeypatch.setattr(gemma_jax, "load", load)
        return loads

    return install


@pytest.fixture
def on_terminal(monkeypatch):
    """Pretends that stdin and stdout are a terminal on which these lines are typed."""

    def install(*lines):
        typed = iter(lines)

        def read(prompt=""):
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", read)

    return install


def pipe_in(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# Arguments


def test_sampling_flags_reach_the_model(use):
    lm = FakeLM("ok")
    loads = use(lm)
    argv = ["generate", "folder", "Once", "--format", "q4k", "--dtype", "float32"]
    argv += ["--max-new-tokens", "9", "--temperature", "0.7", "--top-k", "40", "--top-p", "0.9"]
    argv += ["--min-p", "0.1", "--repetition-penalty", "1.1", "--presence-penalty", "0.2"]
    argv += ["--frequency-penalty", "0.3", "--seed", "5", "--logit-bias", "3=-1.5"]
    argv += ["--logit-bias", "4=2", "--stop", "END", "--stop", "\n", "--stop-id", "7"]
    argv += ["--ignore-eos"]
    assert cli.main(argv) == 0
    assert loads == [("folder", {"format": "q4k", "dtype": "float32"})]
    expected = Sampling(
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={3: -1.5, 4: 2.0},
        seed=5,
        max_new_tokens=9,
        stop_ids=(7,),
        stop=("END", "\n"),
        ignore_eos=True,
    )
    assert lm.calls == [(["Once"], expected, 9)]


def test_without_flags_sampling_keeps_its_defaults(use):
    lm = FakeLM("ok")
    use(lm)
    assert cli.main(["generate", "folder", "Once"]) == 0
    assert lm.calls == [(["Once"], Sampling(max_new_tokens=256), 256)]


@pytest.mark.parametrize(
    ("flags", "constraint"),
    [
        (["--json-schema", ' {"type": "null"}'], Constraint.json_schema({"type": "null"})),
        (["--json-schema", "{file}"], Constraint.json_schema({"type": "null"})),
        (["--regex", "[ab]+"], Constraint.regex("[ab]+")),
        (["--choice", "yes", "--choice", "no"], Constraint.choice(["yes", "no"])),
    ],
)
def test_flags_say_what_the_text_must_match(use, tmp_path, flags, constraint):
    lm = FakeLM("ok")
    use(lm)
    file = tmp_path / "schema.json"
    file.write_text('{"type": "null"}', encoding="utf-8")
    flags = [str(file) if flag == "{file}" else flag for flag in flags]
    assert cli.main(["generate", "folder", "Once", *flags]) == 0
    [(_, sampling, _)] = lm.calls
    assert sampling.constraint == constraint


def test_formats_are_the_converters():
    from convert import policy

    assert cli.FORMATS == policy.FORMATS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["translate"], "invalid choice: 'translate'"),
        (["generate"], "arguments are required: MODEL"),
        (["generate", "m", "p", "--format", "q3"], "--format: invalid choice: 'q3'"),
        (["generate", "m", "p", "--top-k", "many"], "--top-k: invalid int value: 'many'"),
        (["generate", "m", "p", "--logit-bias", "3"], "'3' given, ID=NUMBER accepted"),
        (["generate", "m", "p", "--top-p", "1.5"], "top_p"),
        (["generate", "m", "p", "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", "m", "p", "--stop", ""], "stop"),
        (["generate", "m", "p", "--json-schema", '{"type": 3}'], "json_schema: got"),
        (["generate", "m", "p", "--json-schema", "/no/such/file"], "/no/such/file"),
        (["generate", "m", "p", "--regex", "a(b"], "unclosed group"),
        (["generate", "m", "p", "--regex", "a", "--choice", "b"], "not allowed with argument"),
        (["generate", "m", "p", "--regex", "a", "--ignore-eos"], "ignore_eos: got True"),
        (["generate", "m", "p", "q", "--stream"], "--stream: 2 prompts given, one accepted"),
        (["convert", "m", "out"], "arguments are required: --format"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(use, capsys, argv, message):
    loads = use(FakeLM())
    assert cli.main(argv) == cli.EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gemma-jax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert loads == []


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_and_version_succeed(capsys, argv):
    assert cli.main(argv) == 0
    assert "gemma-jax" in capsys.readouterr().out


# Errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("tensor a/b\nin c.safetensors"), cli.EXIT_BAD_INPUT),
        (FileExistsError(errno.EEXIST, "exists", "out"), cli.EXIT_BAD_INPUT),
        (OSError(errno.ENOSPC, "No space left on device", "out"), cli.EXIT_FAILURE),
        (MemoryError(), cli.EXIT_FAILURE),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), cli.EXIT_FAILURE),
    ],
)
def test_errors_are_one_line_without_traceback(use, capsys, error, status):
    use(FakeLM(error=error))
    assert cli.main(["generate", "m", "p"]) == status
    err = capsys.readouterr().err
    assert err.startswith("gemma-jax: error: ")
    assert err.count("\n") == 1
    assert " ".join(str(error).split()) in err


def test_a_bug_keeps_its_traceback(use):
    use(FakeLM(error=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["generate", "m", "p"])


def test_interrupt_is_quiet_and_status_130(use, capsys):
    use(FakeLM(error=KeyboardInterrupt()))
    assert cli.main(["generate", "m", "p"]) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_broken_pipe_is_quiet():
    command = [sys.executable, "-m", "gemma_jax.cli", "info", "tiny-dense"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == cli.EXIT_BROKEN_PIPE
    assert "BrokenPipeError" not in errors


# generate


def test_one_prompt_prints_its_continuation_alone(use, capsys):
    use(FakeLM(" upon a time"))
    assert cli.main(["generate", "m", "Once"]) == 0
    assert capsys.readouterr().out == " upon a time\n"


def test_echo_and_several_prompts_print_the_prompts_too(use, capsys):
    use(FakeLM("!"))
    assert cli.main(["generate", "m", "Once", "--echo"]) == 0
    assert capsys.readouterr().out == "Once!\n"
    assert cli.main(["generate", "m", "Once", "Twice"]) == 0
    assert capsys.readouterr().out == "Once!\n\nTwice!\n"


def test_prompt_comes_from_standard_input_if_none_is_given(use, monkeypatch):
    lm = FakeLM("ok")
    use(lm)
    pipe_in(monkeypatch, "from a pipe")
    assert cli.main(["generate", "m"]) == 0
    assert lm.calls[0][0] == ["from a pipe"]


def test_streaming_is_the_default_on_a_terminal_only(use, on_terminal, capsys):
    lm = FakeLM("ok")
    use(lm)
    cli.main(["generate", "m", "p"])
    assert lm.calls[-1][0] == ["p"]  # whole: prompts as text
    on_terminal()
    cli.main(["generate", "m", "p"])
    assert lm.calls[-1][0] == [ord("p")]  # streamed: token ids
    cli.main(["generate", "m", "p", "--no-stream"])
    assert lm.calls[-1][0] == ["p"]
    assert capsys.readouterr().out == "ok\n" * 3


def test_streamed_text_has_whole_characters_and_ends_at_a_stop_string(use, monkeypatch):
    writes = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=writes.append, flush=lambda: None))
    use(FakeLM("é🦙 END of it"))
    assert cli.main(["generate", "m", "p", "--stream", "--stop", "END"]) == 0
    assert [text for text in writes if text] == ["é", "🦙", " ", "\n"]


def test_stats_go_to_stderr(use, capsys):
    use(FakeLM("abc"))
    assert cli.main(["generate", "m", "12345", "--stream", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "abc\n"
    assert "5 prompt tokens, 3 new tokens" in err
    assert "tokens/s decoding" in err
    assert cli.main(["generate", "m", "1", "2", "--stats"]) == 0
    assert "6 tokens in 2 rows" in capsys.readouterr().err


def test_speed_leaves_out_the_tokens_that_wait_for_compilation():
    # Started at 10, compiled for 5 and 4 seconds, then four tokens a second.
    line = terminal._speed(7, 10.0, [15.0, 19.0, 19.25, 19.5, 19.75])
    assert line.startswith("7 prompt tokens, 5 new tokens in 9.75 s, the first after 5.00 s")
    assert line.endswith("4.0 tokens/s decoding")


# chat

THINKING = [("thought", "Hm"), ("thought", "."), ("answer", "Yes"), ("answer", "!")]


def test_chat_keeps_the_conversation_without_thoughts(use, monkeypatch, capsys):
    lm = FakeLM(pieces=THINKING)
    use(lm)
    pipe_in(monkeypatch, "one\n\ntwo\n")
    assert cli.main(["chat", "m", "--system", "Brief.", "--thinking", "--seed", "3"]) == 0
    system = {"role": "system", "content": "Brief."}
    first = [system, {"role": "user", "content": "one"}]
    second = [
        *first,
        {"role": "assistant", "content": "Yes!"},
        {"role": "user", "content": "two"},
    ]
    sampling = Sampling(seed=3, max_new_tokens=1024)
    assert lm.calls == [(first, sampling, 1024, True), (second, sampling, 1024, True)]
    assert capsys.readouterr() == ("Yes!\nYes!\n", "Hm.Hm.")


def test_reset_forgets_all_but_the_system_turn_and_exit_ends(use, monkeypatch):
    lm = FakeLM(pieces=[("answer", "Yes")])
    use(lm)
    pipe_in(monkeypatch, "one\n/reset\ntwo\n/exit\nthree\n")
    assert cli.main(["chat", "m", "--system", "Brief."]) == 0
    contents = [[message["content"] for message in call[0]] for call in lm.calls]
    assert contents == [["Brief.", "one"], ["Brief.", "two"]]


def test_thoughts_are_dim_and_apart_on_a_terminal(use, on_terminal, capsys):
    use(FakeLM(pieces=THINKING))
    on_terminal("hello")
    assert cli.main(["chat", "m"]) == 0
    out, _ = capsys.readouterr()
    assert out == "\x1b[2mHm\x1b[0m\x1b[2m.\x1b[0m\n\nYes!\n\n"


def test_an_error_ends_its_turn_on_a_terminal_and_the_chat_in_a_pipe(
    use, on_terminal, monkeypatch, capsys
):
    lm = FakeLM(pieces=[ValueError("prompt too long")])
    use(lm)
    pipe_in(monkeypatch, "one\ntwo\n")
    assert cli.main(["chat", "m"]) == cli.EXIT_BAD_INPUT
    assert len(lm.calls) == 1
    on_terminal("one", "two")
    assert cli.main(["chat", "m"]) == 0
    assert [message["content"] for message in lm.calls[-1][0]] == ["two"]
    assert capsys.readouterr().err.count("gemma-jax: error: prompt too long\n") == 3


def test_interrupt_ends_the_answer_on_a_terminal_and_keeps_what_came(use, on_terminal):
    lm = FakeLM(pieces=[("answer", "Once"), KeyboardInterrupt()])
    use(lm)
    on_terminal("one", "two")
    assert cli.main(["chat", "m"]) == 0
    assert [message["content"] for message in lm.calls[-1][0]] == ["one", "Once", "two"]


def test_chat_needs_nothing_but_text(monkeypatch, capsys):
    pipe_in(monkeypatch, "")
    terminal.chat(FakeLM(), Sampling(), 8)
    assert capsys.readouterr() == ("", "")


# info, and the real thing: the bundled checkpoints


def memory_row(out):
    """The last line of a report: context, weights, cache, together, sizes in bytes."""
    context, *sizes = re.split(r"  +", out.splitlines()[-1].strip())
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return int(context.replace(",", "")), [
        float(number) * units[unit] for number, unit in map(str.split, sizes)
    ]


@pytest.mark.parametrize("name", BUNDLED)
def test_info_tells_what_a_checkpoint_holds(name, capsys):
    assert cli.main(["info", name, "--context", "300", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "Hugging Face checkpoint" in out
    config = gemma_jax.Gemma4Config.from_hf(resolve(name) / "config.json")
    parameters = sum(math.prod(leaf.shape) for leaf in param_shapes(config).values())
    assert re.search(rf"parameters +{parameters:,}\n", out)
    context, (weights, cache, together) = memory_row(out)
    assert context == 300
    # Sizes have two decimals, none is below 1 in its unit: 0.005 rounds off at most 0.5 %.
    assert weights == pytest.approx(2 * parameters, rel=5e-3)
    assert cache == pytest.approx(gemma_jax.cache_bytes(config, 2, 300), rel=5e-3)
    assert together == pytest.approx(weights + cache, rel=1e-2)


def test_info_foretells_what_conversion_makes(tmp_path, capsys):
    folder = tmp_path / "converted"
    assert cli.main(["info", "tiny-moe"]) == 0
    before = capsys.readouterr().out
    assert cli.main(["convert", "tiny-moe", str(folder), "--format", "q4k"]) == 0
    bits = re.search(r"([\d.]+) bits per weight", capsys.readouterr().out)[1]
    assert re.search(rf"q4k +[\d.]+ \w+ +{bits}\n", before)
    assert cli.main(["info", str(folder)]) == 0
    after = capsys.readouterr().out
    assert f"{folder}: converted" in after
    assert re.search(rf"bits per weight +{bits}\n", after)


def test_info_refuses_a_context_the_model_does_not_have(capsys):
    assert cli.main(["info", "tiny-dense", "--context", "4097"]) == cli.EXIT_BAD_INPUT
    assert "--context: 4097 given, 1 to 4096 accepted" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["info"], ["generate"], ["chat"]])
def test_a_missing_model_is_bad_input(command, tmp_path, capsys):
    argv = [*command, str(tmp_path / "nowhere")]
    assert cli.main([*argv, "p"] if command == ["generate"] else argv) == cli.EXIT_BAD_INPUT
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.heavy
def test_streamed_and_whole_generation_read_the_same(capsys):
    argv = ["generate", "tiny-moe", "The captain", "--max-new-tokens", "16", "--temperature", "1"]
    assert cli.main([*argv, "--stream"]) == 0
    streamed = capsys.readouterr().out
    assert cli.main([*argv, "--no-stream"]) == 0
    assert capsys.readouterr().out == streamed
    assert len(streamed.split()) > 3


@pytest.mark.heavy
def test_a_bundled_model_chats(monkeypatch, capsys):
    pipe_in(monkeypatch, "Who are you?\nAnd then?\n")
    assert cli.main(["chat", "tiny-moe", "--max-new-tokens", "8"]) == 0
    assert len(capsys.readouterr().out.strip()) > 0
