"""Files of lines: streams in, whole groups out, and what a cut leaves is cut off."""

from __future__ import annotations

import errno
import gzip
import os
import random
from pathlib import Path

import pytest
import zstandard

from gemma_jax.batch.files import LineReader, LineWriter, whole_lines

NAMES = ["lines.jsonl", "lines.jsonl.gz", "lines.jsonl.zst"]
LINES = [f"line {i} ÄÖ".encode() * (i % 50 + 1) for i in range(200)]


def write(path: Path, lines: list[bytes], group: int = 7) -> None:
    writer = LineWriter(str(path))
    for i, line in enumerate(lines):
        writer.write(line)
        if i % group == group - 1:
            writer.flush()
    writer.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, LINES[:100])
    write(path, LINES[100:])  # appends
    with LineReader(str(path)) as reader:
        assert list(reader) == LINES
        assert reader.position == reader.total == path.stat().st_size
    assert list(whole_lines(path)) == LINES


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_anywhere_keeps_its_whole_groups_and_grows_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, LINES)
    whole = path.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 20):
        path.write_bytes(whole[:cut])
        kept = list(whole_lines(path))
        assert kept == LINES[: len(kept)]
        write(path, LINES[len(kept) :])
        assert list(whole_lines(path)) == LINES


def test_windows_line_ends_and_a_missing_last_one_are_lines_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\r\n\nb")
    with LineReader(str(path)) as reader:
        assert list(reader) == [b"a", b"", b"b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.gz", gzip.compress(b"a\n" * 9999)[:-9]),
        ("x.zst", zstandard.compress(os.urandom(9999))[:4] + b"broken" * 50),
    ],
)
def test_damaged_compression_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with LineReader(str(path)) as reader, pytest.raises(ValueError, match=f"{name} is damaged"):
        list(reader)


def test_a_group_that_does_not_fit_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    write(path, LINES[:10])
    writer = LineWriter(str(path))
    writer.write(LINES[10])
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        monkeypatch.setattr(os, "write", no_space)
        return real(descriptor, data[:3])

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="what was written before is whole") as error:
        writer.flush()
    assert error.value.errno == errno.ENOSPC
    writer.close()  # does not try again
    assert path.read_bytes().splitlines() == LINES[:10]
