"""`gemma-jax batch`: exit status, signals, and resuming with the bundled model."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_jax import cli

ROOT = Path(__file__).parents[3]


def write(folder: Path, count: int, *more: bytes) -> None:
    lines = [
        json.dumps({"custom_id": f"row {i}", "prompt": "The captain", "max_tokens": 4}).encode()
        for i in range(count)
    ]
    (folder / "in.jsonl").write_bytes(b"\n".join([*lines, *more]) + b"\n")


def command(folder: Path, *more: str) -> list[str]:
    files = [str(folder / "in.jsonl"), str(folder / "out.jsonl")]
    return ["batch", *files, "--model", "tiny-dense", "--slots", "4", "--context", "64", *more]


def start(folder: Path) -> subprocess.Popen[str]:
    import jax

    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
        "PYTHONPATH": str(ROOT),
    }
    program = "import sys; from gemma_jax import cli; sys.exit(cli.main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *command(folder)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(folder: Path) -> collections.Counter[str]:
    lines = (folder / "out.jsonl").read_bytes().splitlines()
    return collections.Counter(json.loads(line)["custom_id"] for line in lines)


def test_exit_status_tells_answered_from_reported_and_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 3)
    assert cli.main(command(tmp_path)) == 0
    assert "3 answered, 0 failed of 3 lines" in capsys.readouterr().err
    write(tmp_path, 3, b"no JSON")
    assert cli.main(command(tmp_path)) == 3
    assert "3 answered, 1 failed of 4 lines (0 and 1 in this run)" in capsys.readouterr().err
    assert cli.main(command(tmp_path)) == 3  # of the job, not of this run
    assert cli.main(command(tmp_path, "--max-new-tokens", "5")) == 2
    assert "was begun with max_new_tokens 256, not 5" in capsys.readouterr().err
    assert cli.main(command(tmp_path / "nowhere")) == 2
    assert cli.main(command(tmp_path, "--slots", "0")) == 2
    assert "--slots: 0 given, at least 1 accepted" in capsys.readouterr().err
    assert cli.main(command(tmp_path, "--workers", "2")) == 2
    assert answers(tmp_path) == {f"row {i}": 1 for i in range(3)}


@pytest.mark.heavy
def test_the_real_model_killed_terminated_and_interrupted_answers_each_row_once(
    tmp_path: Path,
) -> None:
    rows = 120
    write(tmp_path, rows)
    chance = random.Random(1)
    statuses = []
    for sent in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = start(tmp_path)
        begun = answers_so_far(tmp_path)
        # SIGTERM comes as soon as the job has begun, which is while the model is compiled.
        while process.poll() is None and not (tmp_path / "out.jsonl.job.json").exists():
            time.sleep(0.02)
        while sent != signal.SIGTERM and process.poll() is None:
            time.sleep(0.05)
            if answers_so_far(tmp_path) > begun:
                break
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(sent)
        _, said = process.communicate()
        statuses.append(process.returncode)
        if sent in (signal.SIGTERM, signal.SIGINT) and process.returncode:
            assert "the same command goes on" in said
            assert "Traceback" not in said
    assert statuses[0] == cli.EXIT_TERMINATED
    assert set(statuses[1:]) <= {-signal.SIGKILL, cli.EXIT_INTERRUPTED, 0}
    assert cli.main(command(tmp_path)) == 0
    assert answers(tmp_path) == {f"row {i}": 1 for i in range(rows)}


def answers_so_far(folder: Path) -> int:
    path = folder / "out.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
