"""Single kernels under the clock: wrong results are seen, calls stay in the loop, the fastest config is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import toy_engine

from bench import kernels, report, static_kernels
from bench.kernel_calls import OPS, KernelCase, calls
from bench.kernel_checks import check
from bench.kernel_tables import Timings
from bench.kernel_timing import Kernels, random_arguments
from bench.record import Record
from pallas_kernels import tuning

ROOT = Path(__file__).parents[2]
MOSAIC = KernelCase("quantized_matmul", "e4b_down", "mosaic", "q4k", 1)


def test_a_case_is_what_its_result_says() -> None:
    case = KernelCase(
        *list(MOSAIC.to_json().values())[:-1], "tiles=2 warpgroups=4 ctas=132 units=1"
    )
    assert KernelCase.of(case.to_json() | {"seconds": [1.0]}) == case
    assert case.config in case.call.configs
    assert (
        str(case)
        == "quantized_matmul e4b_down M=1 q4k mosaic tiles=2 warpgroups=4 ctas=132 units=1"
    )


def test_an_implementation_gets_weights_in_the_order_it_takes() -> None:
    found = {(c.case, c.implementation): c.packed for c in calls(group="SMALL", formats=["q4k"])}
    assert not found["small_256", "xla"]
    assert found["small_256", "mosaic"]
    assert ("small_96", "mosaic") not in found  # neither order serves it


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("weight_format", ["q4k", "bf16"])
def test_right_results_pass_and_wrong_ones_are_seen(op: str, weight_format: str) -> None:
    rows = 16 if op == "expert_matmul" else 8
    call = KernelCase(op, "small_256", "xla", weight_format, rows, "SMALL").call
    arguments = random_arguments(call, KernelCase(op, "small_256", "xla", weight_format, rows))
    rule = OPS[op].rule
    assert check(rule, call.run, *arguments) <= 1

    def with_last_changed(value: float) -> Any:
        def run(*args: Any) -> jax.Array:
            y = call.run(*args)
            return y.at[(-1,) * y.ndim].set(value)

        return run

    with pytest.raises(ValueError, match="not numbers, or were not written"):
        check(rule, with_last_changed(-1 if op == "argmax_matmul" else jnp.nan), *arguments)
    for wrong in (
        3,
        10**6,
    ):  # to arg-max an index that is not the largest product's, and one beyond the last
        with pytest.raises(ValueError, match=r"off by .* times what rounding explains"):
            check(rule, with_last_changed(wrong), *arguments)
    with pytest.raises(ValueError, match="off by"):  # a group of 32 columns left out
        check(rule, lambda x, *rest: call.run(x.at[..., 32:64].set(0), *rest), *arguments)


def _main(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "kernels.json"
    what = ["--op", "quantized_matmul", "--implementation", "xla", "--allow-other-commit"]
    status = kernels.main(["--json", str(file), *what, *arguments])
    return status, json.loads(file.read_text())


@pytest.mark.heavy
def test_a_machine_without_a_gpu_runs_the_small_shapes_and_goes_on_where_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ("--format", "bf16", "--case", "small_(256|704) M=512$")
    status, content = _main(tmp_path, *what, "--minutes", "0")
    assert (status, len(content["results"])) == (75, 1)
    status, content = _main(tmp_path, *what)
    assert (status, len(content["results"])) == (0, 2)
    for result in content["results"]:
        assert len(result["seconds"]) == len(result["loop_seconds"]) == 5
        assert result["error_of_allowed"] <= 1
    assert {"device", "driver", "versions", "commit"} <= content["runs"][0].keys()
    capsys.readouterr()
    assert _main(tmp_path, *what)[0] == 0
    assert capsys.readouterr().out == ""


@pytest.fixture
def tried(tmp_path: Path) -> Record[KernelCase]:
    """A record in which every config of one shape was timed, the third being the fastest."""
    record = Record(tmp_path / "k.json", {"samples": 5}, KernelCase.of, "kernels")
    record.begin_run(
        toy_engine.ENVIRONMENT | {"device": "Toy GPU", "command": "x"}, allow_other_commit=False
    )
    for i, config in enumerate(MOSAIC.call.configs):
        case = KernelCase(*list(MOSAIC.to_json().values())[:-1], config)
        record.add(case, {"seconds": [1.0 if i == 2 else 2.0] * 5})
    return record


def test_the_fastest_config_is_written_for_the_package(
    tried: Record[KernelCase], tmp_path: Path
) -> None:
    path = kernels.write_tuned(tried, tmp_path)
    assert path == tmp_path / "toy_gpu.json"
    [(key, config)] = tuning.load(path, "Toy GPU").items()
    assert key == ("quantized_matmul.mosaic_decode", "q4k", 1, (2560, 10240))
    assert config == list(MOSAIC.call.configs.values())[2]


def test_nothing_is_written_until_all_configs_were_tried(
    tried: Record[KernelCase], tmp_path: Path
) -> None:
    tried.results.pop()
    assert kernels.write_tuned(tried, tmp_path) is None


def test_a_report_is_of_the_raw_samples(tmp_path: Path) -> None:
    def result(case: KernelCase, seconds: list[float]) -> dict[str, Any]:
        facts = {"bytes": 10**6, "flops": 10**9, "error_of_allowed": 0.25, "run": 0}
        return case.to_json() | facts | {"seconds": seconds}

    baseline = KernelCase("quantized_matmul", "e4b_down", "xla", "q4k", 1)
    failed = KernelCase("quantized_matmul", "e4b_down", "mosaic", "bf16", 1)
    content = {
        "benchmark": "kernels",
        "settings": {"samples": 3},
        "runs": [
            toy_engine.ENVIRONMENT | {"command": "python -m bench.kernels", "platform": "gpu"}
        ],
        "results": [
            result(MOSAIC, [2e-6, 1e-6, 4e-6]),
            failed.to_json() | {"error": "it broke", "run": 0},
            result(baseline, [6e-6, 5e-6, 7e-6]),
        ],
        "ceilings": {"copy_bytes_per_second": {"bytes": 10**12, "seconds": [1.0], "what": "copy"}},
    }
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(content))
    files = report.report([path])
    text = files[report.REPORT].decode()
    head = "| e4b_down | q4k |"
    assert f"{head} mosaic | 2.00 | 1.00 to 4.00 | 500 | 50.0 % | 3.00 | 0.25 |" in text
    assert f"{head} xla | 6.00 | 5.00 to 7.00 | 167 | 16.7 % | 1.00 | 0.25 |" in text
    assert "| e4b_down | bf16 | mosaic | – | – | – | – | – | failed |" in text
    assert "kernels-quantized_matmul-1.svg" in files.keys() - {report.REPORT}
    assert files == report.report([path])
    assert Timings(path, content).share(content["results"][0]) == pytest.approx(0.5)


LOOP = """
import sys, jax, jax.numpy as jnp
from bench import aot, hlo
from bench.kernel_calls import KernelCase
from bench.kernel_timing import turns_of

def kernels_of_a_turn(run, x, ws):
    evicted, turns = jax.ShapeDtypeStruct((2**20,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    program = aot.compile_for("h200", turns_of(run), turns, evicted, x, ws, [])
    module, entry = hlo.parse(program.as_text())
    [(body, _)] = hlo.while_bodies(module, entry)
    return sum(1 for _ in hlo.kernels(module, body))

for name in ("xla", "mosaic"):
    call = KernelCase("quantized_matmul", "e4b_down", name, "bf16", 1).call
    x, w = call.arguments
    print([kernels_of_a_turn(call.run, x, [w] * copies) for copies in (0, 2, 4)])
"""


@pytest.mark.skipif(
    not static_kernels.can_compile(), reason="the CUDA plugin of JAX compiles for GPUs"
)
@pytest.mark.heavy
def test_no_call_leaves_the_loop_that_is_timed() -> None:
    """XLA would drop calls whose results are not used, and move out of the loop what does not change in it."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", LOOP], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        none, two, four = json.loads(line)
        assert four - two == two - none >= 2
        assert none > 0


@pytest.mark.heavy
def test_kernels_for_gpus_are_checked_and_not_timed_where_there_is_none() -> None:
    case = KernelCase("quantized_matmul", "small_256", "mosaic", "q4k", 1, "SMALL")
    measured = Kernels(samples=5).measure(case)
    assert measured["error_of_allowed"] <= 1
    assert "seconds" not in measured


def test_autotuning_without_a_gpu_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(["--json", str(tmp_path / "k.json"), "--autotune"]) == 2
    assert "--autotune needs a GPU" in capsys.readouterr().err
