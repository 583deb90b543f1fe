"""Jobs: every line once, whatever it is and whatever happens in between."""

from __future__ import annotations

import collections
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import SERVED, FakeEngine

from gemma_jax.batch import Progress, Summary, run_job
from gemma_jax.engine import Request, Result

ROWS = 400
FAKE = Path(__file__).with_name("fake_engine.py")
ENVIRONMENT = {
    "PYTHONPATH": f"{FAKE.parents[3]}:{FAKE.parent}",
    "JAX_PLATFORMS": "cpu",
    "PATH": "",
}


def record(custom_id: str, text: str = "Hello", **body: Any) -> bytes:
    body = {"prompt": text} | body
    return json.dumps({"custom_id": custom_id, "url": "/v1/completions", "body": body}).encode()


def job(folder: Path, engine: Any = None, **options: Any) -> Summary:
    options = {"slots": 8} | options
    source, output = str(folder / "in.jsonl"), str(folder / "out.jsonl")
    return run_job(source, output, SERVED, engine or (lambda _: FakeEngine()), **options)


def write(folder: Path, lines: Iterable[bytes]) -> None:
    (folder / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def answers(folder: Path) -> collections.Counter[str]:
    lines = (folder / "out.jsonl").read_bytes().splitlines()
    return collections.Counter(json.loads(line)["custom_id"] for line in lines)


def errors(folder: Path) -> dict[int, str]:
    lines = (folder / "out.jsonl.errors.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({r["line"] for r in records}) == len(records)
    return {r["line"]: r["error"]["code"] for r in records}


def once(count: int = ROWS) -> dict[str, int]:
    return {f"row {i}": 1 for i in range(count)}


def test_good_lines_are_answered_and_bad_ones_reported(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            record("a"),
            b"",
            b"no JSON",
            record("b", n=3),
            record("a"),
            b"\xff",
            record("c", "x " * 2000),
        ],
    )
    assert job(tmp_path) == Summary(rows=7, answered=2, failed=4, answered_now=2, failed_now=4)
    assert answers(tmp_path) == {"a": 1, "b": 1}
    assert errors(tmp_path) == {
        3: "invalid_json",
        5: "duplicate_custom_id",
        6: "invalid_encoding",
        7: "context_length_exceeded",
    }
    assert job(tmp_path) == Summary(rows=7, answered=2, failed=4, answered_now=0, failed_now=0)
    assert answers(tmp_path) == {"a": 1, "b": 1}


def test_ten_thousand_bad_lines_and_lines_of_a_megabyte_stop_nothing(tmp_path: Path) -> None:
    bad = [random.Random(i).randbytes(30).replace(b"\n", b"") + b"{" for i in range(10_000)]
    good = [record(f"row {i}") for i in range(50)]
    lines = [*bad, *good, record("large", "word " * 200_000), b"[" * 1_000_000]
    random.Random(0).shuffle(lines)
    write(tmp_path, lines)
    summary = job(tmp_path)
    assert (summary.answered, summary.failed) == (50, 10_002)
    assert answers(tmp_path) == once(50)
    codes = collections.Counter(errors(tmp_path).values())
    assert codes["context_length_exceeded"] == 1
    assert sum(codes.values()) == 10_002


def test_a_request_that_the_engine_refuses_is_reported_once_with_all_its_choices(
    tmp_path: Path,
) -> None:
    class Refuses(FakeEngine):
        def run(self, requests: Iterable[Request]) -> Iterator[Result]:
            for result in super().run(requests):
                row, choice = result.request.key
                refused = row.custom_id == "b" and choice == 1
                yield Result(result.request, None, "no") if refused else result

    write(tmp_path, [record("a", n=2), record("b", n=3), record("c")])
    summary = job(tmp_path, lambda _: Refuses())
    assert (summary.answered, summary.failed) == (2, 1)
    assert answers(tmp_path) == {"a": 1, "c": 1}
    assert errors(tmp_path) == {2: "invalid_request"}


def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    rows = 20 * ROWS
    write(tmp_path, [record(f"row {i}") if i % 7 else b"bad" for i in range(rows)])
    chance, moments = random.Random(0), set()
    with subprocess.Popen(
        [sys.executable, str(FAKE), "in.jsonl", "out.jsonl"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as starter:
        assert starter.stdin is not None
        assert starter.stdout is not None
        for _ in range(20):
            print(file=starter.stdin, flush=True)
            child = int(starter.stdout.readline())
            time.sleep(chance.uniform(0.0, 0.3))
            os.kill(child, signal.SIGKILL)
            print(file=starter.stdin, flush=True)
            assert int(starter.stdout.readline()) == signal.SIGKILL  # it was not done
            moments.add(sum(answers_of_whole_lines(tmp_path).values()))
    assert len(moments) > 5  # kills came at many stages of the job
    done = max(moments)
    summary = job(tmp_path)
    want = {f"row {i}": 1 for i in range(rows) if i % 7}
    assert answers(tmp_path) == want
    assert set(errors(tmp_path)) == {i + 1 for i in range(rows) if i % 7 == 0}
    assert summary.answered_now == len(want) - done  # nothing was computed again that was written


def answers_of_whole_lines(folder: Path) -> collections.Counter[str]:
    data = (folder / "out.jsonl").read_bytes()
    whole = data[: data.rfind(b"\n") + 1].splitlines()
    return collections.Counter(json.loads(line)["custom_id"] for line in whole)


def test_a_full_disk_ends_the_job_with_one_error_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    write(tmp_path, [record(f"row {i}") for i in range(ROWS)])
    script = """
import resource
from fake_engine import SERVED, FakeEngine
from gemma_jax.batch import run_job
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
run_job("in.jsonl", "out.jsonl", SERVED, lambda _: FakeEngine(), slots=8)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        f"[Errno {errno.EFBIG}] File too large; what was written before is whole: 'out.jsonl'"
        in done.stderr
    )
    assert (tmp_path / "out.jsonl").stat().st_size <= 20_000
    job(tmp_path)
    assert answers(tmp_path) == once()


def test_a_device_without_memory_gets_fewer_rows_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Large(FakeEngine):
        def __init__(self, slots: int) -> None:
            super().__init__()
            self._slots = slots

        def run(self, requests: Iterable[Request]) -> Iterator[Result]:
            for count, result in enumerate(super().run(requests)):
                if self._slots > 2 and count == 37:
                    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
                yield result

    write(tmp_path, [record(f"row {i}", n=2) for i in range(ROWS)])
    summary = job(tmp_path, Large)
    assert summary.answered == ROWS
    assert answers(tmp_path) == once()
    assert "going on with 4 at a time" in capsys.readouterr().err
    write(tmp_path, [record("x")])
    (tmp_path / "out.jsonl").unlink()

    class Never:
        def run(self, requests: Iterable[Request]) -> Iterator[Result]:
            list(requests)
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            yield

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        job(tmp_path, lambda _: Never())


def test_another_input_or_setting_is_noticed_and_lines_may_be_added(tmp_path: Path) -> None:
    write(tmp_path, [record("row 0")])
    job(tmp_path, settings={"model": "m"})
    with pytest.raises(ValueError, match="model 'm', not 'other'"):
        job(tmp_path, settings={"model": "other"})
    write(tmp_path, [record("row 0"), record("row 1")])
    job(tmp_path, settings={"model": "m"})
    assert answers(tmp_path) == once(2)
    write(tmp_path, [record("row 9"), record("row 1")])
    with pytest.raises(ValueError, match=r"out\.jsonl was begun with another .*in\.jsonl"):
        job(tmp_path, settings={"model": "m"})


def test_a_foreign_file_is_not_continued(tmp_path: Path) -> None:
    write(tmp_path, [record("row 0")])
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(ValueError, match=r"out\.jsonl is not empty, and there is no .* of its job"):
        job(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"
    (tmp_path / "out.jsonl").unlink()
    job(tmp_path)
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(ValueError, match=r"out\.jsonl: line 1 is not one that a batch job wrote"):
        job(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(ValueError, match="/dev/full is not a file"):
        run_job(str(tmp_path / "in.jsonl"), "/dev/full", SERVED, lambda _: FakeEngine(), slots=8)


def test_two_jobs_do_not_write_one_file(tmp_path: Path) -> None:
    class Nested(FakeEngine):
        def run(self, requests: Iterable[Request]) -> Iterator[Result]:
            with pytest.raises(BlockingIOError, match="another job"):
                job(tmp_path)
            yield from super().run(requests)

    write(tmp_path, [record("row 0")])
    job(tmp_path, lambda _: Nested())
    assert answers(tmp_path) == once(1)


def test_an_interrupt_keeps_what_was_answered(tmp_path: Path) -> None:
    class Interrupted(FakeEngine):
        def run(self, requests: Iterable[Request]) -> Iterator[Result]:
            for count, result in enumerate(super().run(requests)):
                if count == 100:
                    raise KeyboardInterrupt
                yield result

    write(tmp_path, [record(f"row {i}") for i in range(ROWS)])
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, lambda _: Interrupted())
    assert sum(answers(tmp_path).values()) == 100
    assert job(tmp_path).answered_now == ROWS - 100
    assert answers(tmp_path) == once()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_continued_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    from gemma_jax.batch.files import LineReader, LineWriter

    writer = LineWriter(str(tmp_path / f"in{suffix}"))
    for i in range(ROWS):
        writer.write(record(f"row {i}"))
    writer.close()
    names = str(tmp_path / f"in{suffix}"), str(tmp_path / f"out{suffix}")
    run_job(*names, SERVED, lambda _: FakeEngine(), slots=8)
    data = Path(names[1]).read_bytes()
    Path(names[1]).write_bytes(data[: len(data) // 2])
    run_job(*names, SERVED, lambda _: FakeEngine(), slots=8)
    with LineReader(names[1]) as reader:
        ids = collections.Counter(json.loads(line)["custom_id"] for line in reader)
    assert ids == once()


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_job(tmp_path: Path) -> None:
    script = """
import resource, sys
from fake_engine import SERVED, FakeEngine
from gemma_jax.batch import run_job
run_job("in.jsonl", sys.argv[1], SERVED, lambda _: FakeEngine(), slots=8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in (1_000, 30_000):
        write(tmp_path, (record(f"row {i}", max_tokens=1) for i in range(count)))
        command = [sys.executable, "-c", script, f"out{count}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True
        )
        peaks.append(int(done.stdout))
    # 29 000 rows in memory would be some 30 MB.
    assert peaks[1] - peaks[0] < 10_000, peaks


def test_metrics_are_prometheus_text_or_json_lines(tmp_path: Path) -> None:
    write(tmp_path, [record("a"), b"bad"])
    for name in ("m.prom", "m.jsonl"):
        progress = Progress(show=False, metrics=str(tmp_path / name))
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        (tmp_path / "out.jsonl.errors.jsonl").unlink(missing_ok=True)
        job(tmp_path, progress=progress)
        progress.end()
    text = (tmp_path / "m.prom").read_text()
    assert "# TYPE gemma_jax_batch_rows_answered_total counter\n" in text
    assert "gemma_jax_batch_rows_answered_total 1\n" in text
    last = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])
    assert (last["rows_read"], last["rows_answered"], last["rows_failed"]) == (2, 1, 1)
