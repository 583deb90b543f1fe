"""`gemma-jax doctor`: kernels, problems and needs, on this machine and on machines that are not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from gemma_jax import cli, compilation_cache, doctor, machine, xla_flags
from gemma_jax.cache import cache_bytes
from gemma_jax.doctor import CompilationCache, Need, Report, find_problems
from gemma_jax.kernel_support import COMPILED_FOR, Support, support
from gemma_jax.machine import Machine

VERSIONS = {"python": "3.12.1", "jaxlib": "0.12.0", "jax-cuda13-plugin": "0.12.0"}
CPU = Machine("cpu", "cpu", None, None, 2**33, 2**32, VERSIONS)
H200 = Machine("gpu", "NVIDIA H200", "9.0", "NVRM version: 580.1", 140 * 2**30, 2**37, VERSIONS)
CACHE = CompilationCache("/cache", 3, 4096)
SET: dict[str, str | None] = dict(xla_flags.FLAGS)
NEED = Need("model", 4096, 1, weights=2**31, cache=2**30)
HAND = {
    "quantized_matmul",
    "gated_matmul",
    "gelu_matmul",
    "argmax_matmul",
    "expert_matmul",
    "expert_gate_up",
    "expert_down",
    "attention_decode",
}


def changed(base: Machine, **fields: object) -> Machine:
    return dataclasses.replace(base, **fields)


def rows_of(found: list[Support], op: str, call: str = "decode") -> list[Support]:
    return [row for row in found if row.op == op and row.call.startswith(call)]


@pytest.mark.parametrize("capability", COMPILED_FOR)
def test_on_a_known_gpu_every_decode_kernel_can_be_asked_for_and_none_runs_unasked(
    capability: str,
) -> None:
    found = support(changed(H200, compute_capability=capability))
    assert {row.default for row in found} == {"xla"}
    for op in HAND:
        rows = rows_of(found, op)
        assert rows
        quantized = [row for row in rows if row.format != "q6k"]
        assert all(row.on_request == ("mosaic",) for row in quantized), op
    assert all(row.on_request == () for row in rows_of(found, "embedding_lookup"))


def test_every_op_and_format_has_a_row() -> None:
    folder = Path(machine.__file__).parents[1] / "pallas_kernels"
    ops = {path.parent.name for path in folder.glob("*/reference.py")}
    found = support(CPU)
    assert {row.op for row in found} == ops
    for op in ops - {
        "attention",
        "attention_decode",
        "residual_norm",
    }:  # these have no weights in a format
        assert [row.format for row in rows_of(found, op)] == ["q4k", "eq8_0", "q6k", "bf16"]


def test_a_shape_that_a_kernel_does_not_serve_has_the_kernels_own_reason() -> None:
    down = {row.format: row for row in rows_of(support(H200), "expert_down")}
    assert down["q4k"].why_not == {}
    assert down["q6k"].on_request == ()
    assert "704" in down["q6k"].why_not["mosaic"]  # packed Q6K wants a multiple of 256


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (CPU, "JAX runs on cpu"),
        (changed(CPU, platform=None, failure="no"), "JAX runs nowhere"),
        (changed(H200, compute_capability="8.0"), "compute capability 8.0"),
    ],
)
def test_what_rules_out_all_hand_kernels_is_said_of_each(where: Machine, reason: str) -> None:
    for row in support(where):
        assert row.default == "xla"
        assert row.on_request == ()
        assert all(reason in text for text in row.why_not.values())
    assert rows_of(support(where), "quantized_matmul")[0].why_not.keys() == {"mosaic"}


def test_nothing_is_wrong_with_a_machine_that_is_set_up() -> None:
    assert find_problems(H200, SET, CACHE, NEED) == []
    assert find_problems(CPU, dict.fromkeys(SET), CACHE, NEED) == []  # flags are for GPUs


@pytest.mark.parametrize(
    ("where", "flags", "cache", "need", "words"),
    [
        (
            changed(H200, versions=VERSIONS | {"jax-cuda13-plugin": "0.11.2"}),
            SET,
            CACHE,
            NEED,
            ("jax-cuda13-plugin", "0.11.2", "0.12.0"),
        ),
        (
            H200,
            SET | {"xla_gpu_graph_min_graph_size": None},
            CACHE,
            NEED,
            ("--xla_gpu_graph_min_graph_size=1", "import gemma_jax"),
        ),
        (H200, SET, CompilationCache(None, 0, 0), NEED, ("JAX_COMPILATION_CACHE_DIR",)),
        (changed(CPU, memory_free=2**31), SET, CACHE, NEED, ("3.00 GiB", "2.00 GiB", "4,096")),
        (changed(CPU, platform=None, failure="no\ncuda"), SET, CACHE, None, ("no cuda",)),
    ],
)
def test_each_problem_is_named_with_its_remedy(
    where: Machine,
    flags: dict[str, str | None],
    cache: CompilationCache,
    need: Need | None,
    words: tuple[str, ...],
) -> None:
    [problem] = find_problems(where, flags, cache, need)
    assert all(word in problem for word in words), problem


def test_a_driver_that_jax_does_not_use_is_a_problem_unless_the_cpu_was_asked_for() -> None:
    idle = changed(CPU, nvidia_driver="NVRM version: 580.1")
    platforms = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        [problem] = find_problems(idle, SET, CACHE, None)
        jax.config.update("jax_platforms", "cpu")
        assert find_problems(idle, SET, CACHE, None) == []
    finally:
        jax.config.update("jax_platforms", platforms)
    assert "580.1" in problem


def test_the_text_has_reasons_once_and_formats_that_are_served_alike_in_a_row() -> None:
    text = Report(CPU, SET, CACHE, support(CPU), NEED, ["mend this"]).to_text()
    assert text.count("hand-written kernels are for NVIDIA GPUs") == 1
    [row] = [x for x in text.splitlines() if "gated_matmul" in x]
    assert row.split() == "gated_matmul decode q4k eq8_0 q6k bf16 xla not mosaic [1]".split()
    assert "3.00 GiB, without work space" in text
    assert text.endswith("problems\n  mend this")


def test_flags_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_graph_min_graph_size=5 --xla_dump_to=/tmp/a=b")
    assert xla_flags.current() == dict.fromkeys(SET) | {"xla_gpu_graph_min_graph_size": "5"}


def test_this_machine_is_described_and_a_model_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "tiny-moe", "--batch", "2", "--context", "100", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["platform"] == "cpu"
    assert 0 < report["machine"]["memory_free"] <= report["machine"]["memory_total"]
    assert report["machine"]["versions"]["jax"] == jax.__version__
    found = doctor.describe(report["need"]["model"])
    assert report["need"]["weights"] == found.manifest.nbytes
    assert report["need"]["cache"] == cache_bytes(found.config, 2, 100, 2)
    assert report["problems"] == []


def test_the_cache_folder_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"4567")
    monkeypatch.setattr(compilation_cache, "enable", lambda: tmp_path)
    assert CompilationCache.here() == CompilationCache(str(tmp_path), 2, 7)


def test_a_problem_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)
    assert cli.main(["doctor"]) == cli.EXIT_FAILURE
    assert "JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["no-such-model"], "no-such-model"),
        (["tiny-moe", "--context", "0"], "--context: 0 given"),
        (["tiny-moe", "--batch", "0"], "--batch: 0 given"),
        (["--batch", "2"], "without a MODEL"),
    ],
)
def test_bad_input_is_exit_status_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *argv]) == cli.EXIT_BAD_INPUT
    assert words in capsys.readouterr().err


def test_no_device_is_a_finding_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> list[jax.Device]:
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", devices)
    assert Machine.here().failure == "Unable to initialize backend 'cuda'"
