"""Every number of a report is that of the raw samples, and equal files give equal reports."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_engine

from bench import report
from bench.gaps import gaps
from bench.plan import DECODE, FIRST_TOKEN, LLAMA_CPP, OURS, PREFILL, TRANSFORMERS, Lists, plan
from bench.predictions import compare
from bench.tables import Sweep, speed_up

ROOT = Path(__file__).parents[2]
SLOWER = {LLAMA_CPP: 1.6, TRANSFORMERS: 3.0}
LISTS = Lists(
    models=["e2b", "org/31b it"],
    formats=["bf16", "q4k"],
    implementations=["xla"],
    prompts=[128, 512],
    depths=[128, 512],
    batches=[2, 4],
    batch_depths=[512],
    new_tokens=256,
    peers=[LLAMA_CPP, TRANSFORMERS],
)


@pytest.fixture
def content() -> dict[str, Any]:
    """What a sweep of `LISTS` would have written, with samples that differ from case to case and spread by 5 %."""
    results = []
    for i, case in enumerate(plan(LISTS)):
        middle = case.size**0.9 / 1e3 * SLOWER.get(case.engine, 1.0) * (1 + i % 7 / 50)
        values = toy_engine.measured(case) | {"activations": "bfloat16"}
        if case.engine != OURS:
            values = {"command": f"{case.engine} -m model"} if case.engine == LLAMA_CPP else {}
        values["seconds"] = [middle * f for f in (0.98, 1.03, 1.0, 1.02, 0.99)]
        results.append(case.to_json() | values | {"run": 0})
    settings = {"samples": 5, "warm_up": 1, "sampling": "greedy", "ignore_eos": True}
    run = toy_engine.ENVIRONMENT | {
        "command": "python -m bench.sweep --json x",
        "peers": {LLAMA_CPP: {"build_number": 77}},
    }
    return {
        "benchmark": "sweep",
        "settings": settings | {"prefix_cache": False, "seed": 0},
        "runs": [run],
        "results": results,
        "ceilings": copy.deepcopy(toy_engine.CEILINGS),
    }


STATIC: dict[str, Any] = {
    "decode": [
        {
            "model": "e2b",
            "format": "q4k",
            "implementation": "xla",
            "target": "toy",
            "batch": 1,
            "depth": 512,
            "layers": 2,
            "kernels_per_layer": 20.5,
            "bytes_per_token": 2.2e9,
            "bytes_min": 2.0e9,
            "temp_bytes": 3e6,
            "cache_copies": 0,
            "bytes_us": 600.0,
            "instructions_us": 700.0,
            "predicted_us": 1234.0,
        }
    ],
    "prefill": [
        {
            "model": "e2b",
            "format": "q4k",
            "implementation": "xla",
            "target": "toy",
            "tokens": 512,
            "flops": 3e12,
            "flops_min": 2e12,
            "temp_bytes": 5e6,
        }
    ],
    "kernels": [],
    "environment": {"commit": "f00", "versions": {"jax": "9.9"}},
}


def written(tmp_path: Path, content: dict[str, Any], name: str = "sweep.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def text_of(*paths: Path) -> str:
    return report.report(paths)[report.REPORT].decode()


def rows(text: str, *headings: str) -> dict[tuple[str, ...], list[str]]:
    """Rows of the first table under the last heading, by their first two cells; empty ones are those above."""
    at = 0
    for heading in headings:
        at = text.index(f"# {heading}\n", at)
    lines = text[at:].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    found, last = {}, ""
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, second, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        last = first or last
        found[last, second] = cells
    return found


def result(content: dict[str, Any], **of: Any) -> dict[str, Any]:
    [found] = [r for r in content["results"] if all(r.get(k) == v for k, v in of.items())]
    return found


def middle(content: dict[str, Any], **of: Any) -> float:
    return statistics.median(result(content, **of)["seconds"])


def test_decode_rates_ratios_and_shares_are_those_of_the_samples(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    table = rows(text_of(written(tmp_path, content)), "org/31b it", "Decode of one row, tokens/s")
    for weight_format in ("bf16", "q4k"):
        what = {"model": "org/31b it", "format": weight_format, "phase": DECODE, "batch": 1}
        for column, depth in enumerate((128, 512)):
            ours = 256 / middle(content, **what, engine=OURS, depth=depth)
            theirs = 256 / middle(content, **what, engine=LLAMA_CPP, depth=depth)
            assert float(table[weight_format, "gemma-jax xla"][column]) == pytest.approx(
                ours, rel=5e-3
            )
            assert float(table[weight_format, LLAMA_CPP][column]) == pytest.approx(theirs, rel=5e-3)
            ratio = table[weight_format, "gemma-jax xla ÷ llama.cpp"][column]
            assert ratio == f"{ours / theirs:.2f}"
            # The toy copies 1e12 bytes in 0.1 s and needs 2e8 a token.
            share = table[weight_format, "of the measured copy bandwidth"][column]
            assert share == f"{100 * ours * 2e8 / 1e13:.1f} %"


def test_prefill_and_first_token_are_those_of_the_samples(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    text = text_of(written(tmp_path, content))
    prefill = rows(text, "e2b", "Prefill, tokens/s")
    first = rows(text, "e2b", "Time to first token, ms")
    for column, tokens in enumerate((128, 512)):
        of = {"model": "e2b", "format": "bf16", "tokens": tokens}
        seconds = middle(content, **of, engine=OURS, phase=PREFILL)
        assert float(prefill["bf16", "gemma-jax xla"][column]) == pytest.approx(
            tokens / seconds, rel=5e-3
        )
        share = prefill["bf16", "of the measured matrix product"][column]
        assert share == f"{100 * 1e9 * tokens / seconds / 1e16:.1f} %"
        ours = middle(content, **of, engine=OURS, phase=FIRST_TOKEN)
        theirs = middle(content, **of, engine=TRANSFORMERS, phase=FIRST_TOKEN)
        assert float(first["bf16", "gemma-jax xla"][column]) == pytest.approx(1e3 * ours, rel=5e-3)
        ratio = first["bf16", "gemma-jax xla ÷ transformers"][column]
        assert ratio == f"{theirs / ours:.2f}"


def test_a_ratio_above_one_says_that_we_are_faster_in_every_phase(content: dict[str, Any]) -> None:
    for phase, key in ((DECODE, "depth"), (PREFILL, "tokens"), (FIRST_TOKEN, "tokens")):
        of = {"model": "e2b", "format": "bf16", "phase": phase, "batch": 1, key: 512}
        ours, peer = (result(content, **of, engine=e) for e in (OURS, TRANSFORMERS))
        peer = peer | {"seconds": [2 * s for s in ours["seconds"]]}
        assert speed_up(ours, peer) == pytest.approx(2)


def test_batches_are_rates_of_all_rows(tmp_path: Path, content: dict[str, Any]) -> None:
    table = rows(
        text_of(written(tmp_path, content)),
        "e2b",
        "Decode of batches at depth 512, tokens/s of all rows",
    )
    of = {"model": "e2b", "format": "q4k", "phase": DECODE, "depth": 512, "engine": OURS}
    rates = [batch * 256 / middle(content, **of, batch=batch) for batch in (1, 2, 4)]
    cells = table["q4k", "gemma-jax xla"]
    assert [float(cell) for cell in cells] == pytest.approx(rates, rel=5e-3)
    assert table["q4k", "÷ batch 1"] == [f"{r / rates[0]:.2f}" for r in rates]
    assert ("q4k", LLAMA_CPP) not in table


def test_the_report_names_hardware_versions_commands_and_method(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    text = text_of(written(tmp_path, content))
    for words in (
        "## Measured on NVIDIA Toy (`sweep.json`)",
        "| toy driver |",
        "| abc |",
        "python -m bench.sweep --json x",
        "llama.cpp -m model",
        "- llama.cpp: build_number 77",
        "1 warm-up, then 5 samples",
        "greedy, end of sequence ignored, prefix cache off",
        "| copy of toys | 10000 GB/s | 0% |",
        "| product of toys | 10000000 GFLOP/s | 0% |",
        "![e2b: speed-up](sweep-e2b-speed-up.svg)",
    ):
        assert words in text, words
    # Peaks of the toy: 1 GB and 1000 bytes a position.
    memory = rows(text, "e2b", "Memory")["q4k", "gemma-jax xla"]
    assert memory == ["1000", "1003", "decode, depth 512, batch 4", "a toy"]


def test_a_report_is_the_same_in_another_process_and_folder(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    file = written(tmp_path, content)
    first = report.report([file])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.report", str(file), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert {name.removeprefix("sweep-") for name in first} == {report.REPORT} | {
        f"{model}-{kind}.svg"
        for model in ("e2b", "org_31b_it")
        for kind in ("decode", "prefill", "speed-up", "roofline", "batch", "memory")
    }


def test_what_is_missing_failed_or_scatters_is_found(content: dict[str, Any]) -> None:
    del content["ceilings"]["gemm_flops_per_second"]
    of = {"model": "e2b", "format": "bf16", "engine": OURS}
    hole = result(content, **of, phase=PREFILL, tokens=512)
    content["results"].remove(hole)
    failed = result(content, **of, phase=DECODE, depth=512, batch=4)
    del failed["seconds"]
    failed["error"] = "RESOURCE_EXHAUSTED: no memory\nfor 12 allocations"
    wide = result(content, **of, phase=DECODE, depth=128, batch=1)
    wide["seconds"] = [1.0, 1.11, 1.0]
    narrow = result(content, **of, phase=DECODE, depth=512, batch=1)
    narrow["seconds"] = [1.0, 1.09, 1.0]
    content["runs"].append(content["runs"][0] | {"commit": "def", "uncommitted_changes": True})
    found = gaps(Sweep(Path("sweep.json"), content))
    expected = [
        "results of several commits: abc, def",
        "uncommitted changes on top of the commit in run 1",
        "the ceiling gemm_flops_per_second was not measured",
        "no result of a peer: openai",
        "e2b: prefill was not measured for bf16 gemma-jax xla: 512",
        "e2b bf16 gemma-jax xla: decode, depth 512, batch 4 failed: RESOURCE_EXHAUSTED: no memory",
        "e2b bf16 gemma-jax xla: samples spread by more than 10% of their median: "
        "decode, depth 128, batch 1 (11%)",
    ]
    assert [gap for gap in found if gap in expected] == expected
    # The rest is what llama-bench cannot do.
    rest = [gap for gap in found if gap not in expected]
    assert all("llama.cpp: at all" in gap for gap in rest)
    assert len(rest) == 8


def test_failed_cases_and_ceilings_leave_a_word_in_their_cell(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    failed = result(content, model="e2b", format="q4k", engine=OURS, phase=PREFILL, tokens=128)
    del failed["seconds"]
    failed["error"] = "out | of memory"
    content["ceilings"] = {"copy_bytes_per_second": {"error": "none"}}
    text = text_of(written(tmp_path, content))
    table = rows(text, "e2b", "Prefill, tokens/s")
    assert table["q4k", "gemma-jax xla"][0] == "failed"
    assert table["q4k", "gemma-jax xla ÷ llama.cpp"][0] == "–"
    assert ("q4k", "of the measured matrix product") not in table
    assert "roofline" not in text
    assert "the ceiling copy_bytes_per_second failed: none" in text


def test_a_sweep_of_failures_alone_can_be_reported(tmp_path: Path, content: dict[str, Any]) -> None:
    for r in content["results"]:
        r["error"] = "no device"
        for key in ("seconds", "peak_bytes", "compile_seconds"):
            r.pop(key, None)
    files = report.report([written(tmp_path, content)])
    assert list(files) == [report.REPORT]


def test_predictions_stand_apart_and_their_error_is_computed(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    sweep = written(tmp_path, content)
    static = written(tmp_path, STATIC, "static.json")
    text = text_of(sweep, static)
    measured, predicted = text.split("## Compiled programs: counts and predictions")
    assert "1234" not in measured
    assert "predicted" not in measured
    assert (
        "| e2b | q4k | xla | toy | 1 | 512 | 20.5 | 1.10 | 3.00 | 0 | 600 | 700 | 1234 | 810 |"
        in predicted
    )
    assert "| e2b | q4k | xla | toy | 512 | 1.50 | 5.00 |" in predicted
    assert "`static.json`: commit `f00`, JAX 9.9" in predicted
    of = {"model": "e2b", "format": "q4k", "engine": OURS, "phase": DECODE, "batch": 1}
    us = 1e6 * middle(content, **of, depth=512) / 256
    [last] = [line for line in predicted.splitlines() if line.endswith("% |")]
    assert last.endswith(f"| 1234 | {us:.0f} | {1234 / us - 1:+.0%} |")


@pytest.mark.parametrize("change", [{"target": "h200"}, {"layers": 3}, {"depth": 64}, {"batch": 3}])
def test_a_prediction_of_something_else_is_compared_with_nothing(
    content: dict[str, Any], change: dict[str, Any]
) -> None:
    sweeps = [Sweep(Path("sweep.json"), content)]
    assert len(compare(STATIC["decode"], sweeps)) == 1
    assert compare([STATIC["decode"][0] | change], sweeps) == []


def test_operations_that_were_not_counted_leave_a_dash(tmp_path: Path) -> None:
    prefill = [STATIC["prefill"][0] | {"flops": None}]
    text = text_of(written(tmp_path, STATIC | {"prefill": prefill}, "static.json"))
    assert "| e2b | q4k | xla | toy | 512 | – | 5.00 |" in text


def test_predictions_alone_say_that_no_card_has_checked_them(tmp_path: Path) -> None:
    text = text_of(written(tmp_path, STATIC, "static.json"))
    assert "No card has run a case that was predicted." in text
    assert "## Measured" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a file of bench.sweep"),
        ('{"benchmark": "bundled"}', "its benchmark is 'bundled'"),
        ('{"benchmark": "sweep", "runs": []}', "has no ceilings, results, settings"),
        ('{"decode": [{}], "prefill": [], "kernels": []}', "has no 'model'"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    assert report.main([str(file), "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == [file]


def test_files_of_one_name_are_refused_because_their_plots_would_be_too(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    (tmp_path / "other").mkdir()
    files = [written(tmp_path, content), written(tmp_path / "other", content)]
    with pytest.raises(ValueError, match="another file has the same name"):
        report.report(files)
