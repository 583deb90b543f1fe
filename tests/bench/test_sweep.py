"""A sweep covers its plan, survives what goes wrong, and goes on where it ended."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import toy_engine
from toy_engine import ToyEngine

from bench import ceilings, plan, sweep
from bench.least_work import decode_bytes_min, prefill_flops_min
from bench.measure import GemmaJax, PeakMemory
from bench.plan import DECODE, FIRST_TOKEN, LLAMA_CPP, OPENAI, OURS, PREFILL, TRANSFORMERS, Case
from bench.processes import Worker, in_own_process
from pallas_kernels import PackedArray

ROOT = Path(__file__).parents[2]


class InProcess:
    """What `Worker` does without a process: the toy's measurements, or an error for its batch of failures."""

    opened: list[tuple[str, str, str]] = []  # noqa: RUF012 - what a test sees

    def __init__(self, open_engine: Any, group: tuple[str, str, str], *_: Any) -> None:
        self.opened.append(group)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, case: Case) -> dict[str, Any]:
        if case.batch == ToyEngine.FAILS:
            return {"error": "MemoryError: too many"}
        return toy_engine.measured(case)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Sweeps measure the toy; the list of groups that were opened."""
    known = {
        "environment": dict(toy_engine.ENVIRONMENT),
        "ceilings": copy.deepcopy(toy_engine.CEILINGS),
    }
    monkeypatch.setattr(sweep, "Worker", InProcess)
    monkeypatch.setattr(sweep, "in_own_process", lambda function, *_: known[function.__name__])
    monkeypatch.setattr(InProcess, "opened", [])
    return InProcess.opened


def arguments(file: Path, *more: str) -> list[str]:
    small = "--model e260m --format q4k --prompt 8 16 --depth 8 --new 4 --batch --samples 3"
    return ["--json", str(file), *small.split(), *more]


def phases(file: Path) -> list[tuple[Any, ...]]:
    results = json.loads(file.read_text())["results"]
    return [(r["phase"], r["batch"], r.get("tokens", r.get("depth"))) for r in results]


def test_a_plan_is_the_product_of_its_lists_the_smallest_case_first() -> None:
    lists = plan.Lists(
        models=["e2b", "31b"],
        formats=["bf16", "q4k"],
        implementations=["xla"],
        prompts=[512, 128],
        depths=[512, 128],
        batches=[4, 2],
        batch_depths=[128],
        new_tokens=16,
        peers=[LLAMA_CPP, TRANSFORMERS],
    )
    cases = plan.plan(lists)
    groups = list(dict.fromkeys(case.group for case in cases))
    assert groups == [
        (engine, model, weight_format)
        for model in ("e2b", "31b")
        for weight_format in ("bf16", "q4k")
        for engine in (OURS, LLAMA_CPP, TRANSFORMERS)
        if (engine, weight_format) != (TRANSFORMERS, "q4k")
    ]
    ours = [case for case in cases if case.group == (OURS, "e2b", "q4k")]
    assert [case.size for case in ours] == sorted(case.size for case in ours)
    assert {(c.phase, c.tokens) for c in ours if c.phase != DECODE} == {
        (phase, tokens) for phase in (PREFILL, FIRST_TOKEN) for tokens in (128, 512)
    }
    decode = {(c.batch, c.depth, c.new_tokens) for c in ours if c.phase == DECODE}
    assert decode == {(1, 128, 16), (1, 512, 16), (2, 128, 16), (4, 128, 16)}
    llama = [(c.phase, c.batch) for c in cases if c.group == (LLAMA_CPP, "e2b", "q4k")]
    assert llama == [(DECODE, 1)] * 2 + [(PREFILL, 1)] * 2
    assert len(set(cases)) == len(cases)


def test_the_file_holds_settings_runs_results_and_ceilings(tmp_path: Path, toy: Any) -> None:
    file = tmp_path / "new folder" / "sweep.json"
    assert sweep.main(arguments(file)) == 0
    content = json.loads(file.read_text())
    assert content["benchmark"] == "sweep"
    assert content["settings"]["samples"] == 3
    [run] = content["runs"]
    assert run == toy_engine.ENVIRONMENT | {"command": run["command"]}
    assert run["command"].startswith("python -m bench.sweep --json")
    assert content["ceilings"]["copy_bytes_per_second"]["bytes"] == 10**12
    assert sorted(phases(file)) == sorted(
        [(DECODE, 1, 8), *((p, 1, n) for p in (PREFILL, FIRST_TOKEN) for n in (8, 16))]
    )
    result = content["results"][0]
    assert len(result["seconds"]) == 3
    assert result["run"] == 0
    assert list(tmp_path.iterdir()) == [file.parent]
    assert list(file.parent.iterdir()) == [file]
    assert toy == [(OURS, "e260m", "q4k")]


def test_the_same_command_again_measures_nothing_and_a_longer_list_only_what_is_new(
    tmp_path: Path, toy: list[Any]
) -> None:
    file = tmp_path / "sweep.json"
    sweep.main(arguments(file))
    before = file.read_bytes()
    toy.clear()
    assert sweep.main(arguments(file)) == 0
    assert toy == []
    assert file.read_bytes() == before
    assert sweep.main(arguments(file, "--batch", "2", "--batch-depth", "8")) == 0
    old, new = json.loads(before), json.loads(file.read_text())
    assert new["results"][:-1] == old["results"]
    assert phases(file)[-1] == (DECODE, 2, 8)
    assert new["results"][-1]["run"] == 1
    assert len(new["runs"]) == 2


def test_a_dry_run_prints_the_plan_and_leaves_no_file(
    tmp_path: Path, toy: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(arguments(tmp_path / "sweep.json", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "5 of 5 cases to do"
    assert toy == list(tmp_path.iterdir()) == []


def test_a_failure_is_recorded_the_sweep_goes_on_and_says_so_at_the_end(
    tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.json"
    batches = ("--batch", str(ToyEngine.FAILS), "5", "--batch-depth", "8")
    assert sweep.main(arguments(file, *batches)) == 1
    results = json.loads(file.read_text())["results"]
    [failed] = [r for r in results if "error" in r]
    assert failed["batch"] == ToyEngine.FAILS
    assert "seconds" not in failed
    assert results[-1]["batch"] == 5
    assert "failed: e260m q4k gemma-jax xla: decode, depth 8, batch 3" in capsys.readouterr().err
    # It is not tried again, nor forgotten, unless that is asked for.
    assert sweep.main(arguments(file, *batches)) == 1
    assert json.loads(file.read_text())["results"] == results
    sweep.main(arguments(file, *batches, "--retry-failed"))
    again = json.loads(file.read_text())["results"]
    assert again[-1]["error"]
    assert len(again) == len(results)


def test_a_failing_peer_is_no_failure_of_ours(tmp_path: Path, toy: Any) -> None:
    file = tmp_path / "sweep.json"
    more = ("--transformers", "--format", "bf16", "--batch", str(ToyEngine.FAILS))
    sweep.main(arguments(file, *more))
    content = json.loads(file.read_text())
    for result in content["results"]:
        if result["engine"] == OURS and "error" in result:
            result |= toy_engine.measured(Case.of(result))
            del result["error"]
    file.write_text(json.dumps(content))
    assert any("error" in r for r in content["results"])
    assert sweep.main(arguments(file, *more)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"samples": 7}}, "was measured with samples = 7, not 3"),
        ({"device": "NVIDIA Other"}, "was measured on NVIDIA Other, this is NVIDIA Toy"),
        ({"commit": "def"}, "was measured at commit def, this is abc"),
        ({"benchmark": "bundled"}, "is not a file of bench.sweep: its benchmark is 'bundled'"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(
    tmp_path: Path,
    toy: Any,
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "sweep.json"
    sweep.main(arguments(file))
    content = json.loads(file.read_text())
    content["results"].pop()
    content["settings"] |= change.get("settings", {})
    content["runs"][0] |= {k: v for k, v in change.items() if k in ("device", "commit")}
    content["benchmark"] = change.get("benchmark", "sweep")
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    capsys.readouterr()
    assert sweep.main(arguments(file)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert file.read_bytes() == before
    if "commit" in change:
        assert sweep.main(arguments(file, "--allow-other-commit")) == 0


def test_a_file_that_is_no_json_is_refused(
    tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.json"
    file.write_text("{")
    assert sweep.main(arguments(file)) == 2
    assert "not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gguf", "e2b"), "expected MODEL:FORMAT=PATH"),
        (("--openai", "http://localhost:1"), "needs --openai-model"),
        (("--model", "no/such/folder"), "no checkpoint folder no/such/folder"),
        (
            ("--openai", "http://h", "--openai-model", "m", "--format", "bf16", "q4k"),
            "give one --model and one --format",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(arguments(tmp_path / "sweep.json", *more)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_budget_stops_before_it_is_exceeded_and_the_next_call_goes_on(
    tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each case takes a minute on a clock that only cases advance; nine fit into the budget."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    measure = InProcess.measure

    def slow(self: InProcess, case: Case) -> dict[str, Any]:
        clock[0] += 60.0
        return measure(self, case) | {"seconds": [1e-3] * 3}

    monkeypatch.setattr(InProcess, "measure", slow)
    file = tmp_path / "sweep.json"
    depths = [str(n) for n in range(1, 13)]
    command = arguments(file, "--minutes", "9.1", "--prompt", "8", "--depth", *depths)
    assert sweep.main(command) == sweep.MORE_TO_DO
    first = json.loads(file.read_text())["results"]
    assert len(first) == 9
    assert "5 cases to do" in capsys.readouterr().err
    assert sweep.main(command) == 0
    assert json.loads(file.read_text())["results"][: len(first)] == first
    assert len(phases(file)) == 14


def test_every_call_measures_at_least_one_case(tmp_path: Path, toy: Any) -> None:
    file = tmp_path / "sweep.json"
    for done in range(1, 6):
        status = sweep.main(arguments(file, "--minutes", "0"))
        assert status == (0 if done == 5 else sweep.MORE_TO_DO)
        assert len(phases(file)) == done


def test_the_next_case_is_expected_to_take_what_its_like_took_scaled_by_its_size() -> None:
    def decode(depth: int, **values: Any) -> dict[str, Any]:
        return Case(OURS, "e2b", "q4k", "xla", DECODE, 1, None, depth, 100).to_json() | values

    results = [
        decode(100, seconds=[1.0, 1.0], wall_seconds=13.0, load_seconds=20.0),
        decode(1900, error="no memory", wall_seconds=7.0),
    ]
    # 10 seconds are not running, 3 are: two samples and a warm-up.
    assert plan.expected_seconds(Case.of(decode(300)), results) == 10 + 2 * 3
    assert plan.expected_seconds(Case.of(decode(1900)), results) == 7
    prefill = Case(OURS, "e2b", "q4k", "xla", PREFILL, 1, 512)
    assert plan.expected_seconds(prefill, results) == 13
    assert plan.expected_seconds(Case(OPENAI, "e2b", "q4k", None, PREFILL, 1, 5), results) == 0
    assert plan.expected_loading(prefill, results) == 20


_DRIVER = """
import os, sys, time
import toy_engine
from bench import sweep
from bench.plan import Case

class Slow:
    def __init__(self, *_): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def measure(self, case):
        if case.tokens == 16 and sys.argv[1] == "stands":
            time.sleep(600)
        return toy_engine.measured(case)

known = {"environment": dict(toy_engine.ENVIRONMENT), "ceilings": toy_engine.CEILINGS}
sweep.Worker, sweep.in_own_process = Slow, lambda function, *_: known[function.__name__]
sys.exit(sweep.main(sys.argv[2:]))
"""


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths}

    def command(mode: str) -> list[str]:
        return [sys.executable, "-c", _DRIVER, mode, *arguments(file)]

    with subprocess.Popen(command("stands"), env=environment, cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not (file.exists() and len(phases(file)) == 3):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    first = json.loads(file.read_text())
    subprocess.run(command("goes"), env=environment, cwd=ROOT, check=True)
    second = json.loads(file.read_text())
    assert second["results"][:3] == first["results"]
    assert [r["run"] for r in second["results"]] == [0, 0, 0, 1, 1]
    assert len(set(phases(file))) == 5


def test_a_worker_keeps_its_engine_and_outlives_errors_and_crashes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    cases = [
        Case(OURS, "toy", "q4k", "xla", DECODE, batch, None, 8, 4)
        for batch in (1, ToyEngine.FAILS, 2, ToyEngine.DIES, 5)
    ]
    with Worker(ToyEngine, log) as worker:
        good, failed, after, dead, last = [worker.measure(case) for case in cases]
    assert good.pop("load_seconds") < 60
    assert good == toy_engine.measured(cases[0])
    assert failed == {"error": "MemoryError: 36 positions do not fit"}
    assert after == toy_engine.measured(cases[2])
    assert dead == {"error": "the process ended by itself with status 9"}
    assert last.keys() == after.keys() | {"load_seconds"}
    # The process that died could not close its engine; the other one did.
    lines = log.read_text().splitlines()
    assert [line for line in lines if line in ("open", "close")] == ["open", "open", "close"]


def test_a_case_that_takes_too_long_is_ended_and_the_next_goes_on(tmp_path: Path) -> None:
    hanging, good = (
        Case(OURS, "toy", "q4k", "xla", DECODE, batch, None, 8, 4) for batch in (ToyEngine.HANGS, 1)
    )
    with Worker(ToyEngine, tmp_path / "log") as worker:
        worker.measure(good)
        begin = time.monotonic()
        assert worker.measure(hanging, 1.0) == {"error": "no answer in 1 seconds"}
        assert time.monotonic() - begin < 30
        assert "error" not in worker.measure(good, 60.0)


def test_an_engine_that_does_not_start_fails_every_case_but_is_tried_once(tmp_path: Path) -> None:
    case = Case(OURS, "toy", "q4k", "xla", DECODE, 1, None, 8, 4)
    with Worker(ToyEngine, tmp_path / "does-not-start") as worker:
        answers = [worker.measure(case) for _ in range(2)]
    assert {a["error"] for a in answers} == {"could not start: OSError: no such weights"}
    assert ["load_seconds" in answer for answer in answers] == [True, False]


def test_what_a_process_raises_comes_back_in_words() -> None:
    assert in_own_process(math.sqrt, 4.0) == 2.0
    with pytest.raises(RuntimeError, match="ValueError: "):
        in_own_process(math.sqrt, -1.0)
    with pytest.raises(RuntimeError, match="ended by itself with status 3"):
        in_own_process(os._exit, 3)


def test_ceilings_count_both_directions_and_both_operations() -> None:
    copied = ceilings.copy(2**16, 2)
    assert copied["bytes"] == 2 * 2**16
    product = ceilings.gemm(64, jnp.dtype(jnp.float32), 2)
    assert product["flops"] == 2 * 64**3
    for measured in (copied, product):
        assert len(measured["seconds"]) == 2
        assert all(s > 0 for s in measured["seconds"])


@pytest.fixture
def engine(random_checkpoints: dict[str, Path]) -> Iterator[GemmaJax]:
    """Our engine on a small random checkpoint; it turns the compilation cache off, which other tests want."""
    enabled = jax.config.jax_enable_compilation_cache
    yield GemmaJax(str(random_checkpoints["e_type"]), "bf16", 2)
    jax.config.update("jax_enable_compilation_cache", enabled)


def test_our_engine_measures_every_phase_and_what_it_could_not_do_without(
    engine: GemmaJax,
) -> None:
    def case(phase: str, *sizes: int | None) -> dict[str, Any]:
        return engine.measure(Case(OURS, "small", "bf16", "xla", phase, *sizes))

    prefill, first = case(PREFILL, 1, 20), case(FIRST_TOKEN, 1, 20)
    decode = case(DECODE, 2, None, 20, 6)
    for measured in (prefill, first, decode):
        assert len(measured["seconds"]) == 2
        assert all(s > 0 for s in measured["seconds"])
        assert measured["compile_seconds"] > 0
        assert measured["weight_bytes"] == sum(x.nbytes for x in jax.tree.leaves(engine.params))
        assert measured["peak_bytes"] > measured["weight_bytes"]
        assert "resident memory" in measured["peak_bytes_of"]
    assert prefill["flops_min"] == first["flops_min"] == prefill_flops_min(engine.config, 20)
    least = decode_bytes_min(engine.config, engine.params, 2, depth=23, itemsize=4) / 2
    assert decode["bytes_min"] == least


def test_hand_kernels_get_packed_weights_and_xla_gets_them_back(engine: GemmaJax) -> None:
    small = GemmaJax("tiny-dense", "eq8_0", 1)
    before = jax.tree.structure(small.params)
    assert small._served("xla").implementation == "xla"
    assert small._served("mosaic").implementation == ("mosaic", "xla")
    is_packed = [isinstance(x, PackedArray) for x in jax.tree.leaves(small.params, is_leaf=_whole)]
    assert any(is_packed)
    assert small._served("auto").implementation is None
    assert jax.tree.structure(small.params) == before


def _whole(x: object) -> bool:
    return isinstance(x, PackedArray)


@pytest.mark.parametrize(
    ("peak_after", "expected", "words"),
    [
        (900, 900, "peak_bytes_in_use"),
        # An earlier case had the peak: 500 in use, and 70 + 30 - 20 that the program takes for itself.
        (800, 580, "the program's own"),
    ],
)
def test_a_gpus_peak_is_its_own_count_where_this_case_raised_it(
    monkeypatch: pytest.MonkeyPatch, peak_after: int, expected: int, words: str
) -> None:
    plan_of_memory = SimpleNamespace(
        temp_size_in_bytes=70, output_size_in_bytes=30, alias_size_in_bytes=20
    )
    program: Any = SimpleNamespace(memory_analysis=lambda: plan_of_memory)
    stats = {"peak_bytes_in_use": 800, "bytes_in_use": 500}
    monkeypatch.setattr(PeakMemory, "_stats", lambda self: dict(stats))
    memory = PeakMemory()
    memory.leave_out_compilation()
    stats["peak_bytes_in_use"] = peak_after
    peak, of = memory.reading(program)
    assert peak == expected
    assert words in of


def test_more_positions_than_the_model_has_are_an_error(engine: GemmaJax) -> None:
    with pytest.raises(ValueError, match="capacity is 4097"):
        engine.measure(Case(OURS, "small", "bf16", "xla", DECODE, 1, None, 4096, 1))
