"""Whose an output is: hashes that notice any change, and a lock."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gemma_jax.batch.sidecar import (
    check_same_job,
    checkpoint_fingerprint,
    fingerprint,
    locked,
    write_down,
)


def test_every_byte_counts_in_an_input_and_none_behind_its_length(tmp_path: Path) -> None:
    path = tmp_path / "in"
    data = bytearray(random.Random(0).randbytes(3_000_000))
    path.write_bytes(data)
    before = fingerprint(path)
    path.write_bytes(data + b"more")
    assert fingerprint(path, len(data)) == before
    data[1_500_000] ^= 1
    path.write_bytes(data)
    assert fingerprint(path, len(data)) != before


def test_a_checkpoint_is_its_names_sizes_and_the_ends_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / "weights").write_bytes(b"a" * 10)
    seen = {checkpoint_fingerprint(tmp_path)}
    (tmp_path / "sub" / "weights").write_bytes(b"a" * 9 + b"b")
    seen.add(checkpoint_fingerprint(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "config")
    seen.add(checkpoint_fingerprint(tmp_path))
    assert len(seen) == 3


def test_a_job_is_recognized_and_a_damaged_or_missing_sidecar_named(tmp_path: Path) -> None:
    source, sidecar = tmp_path / "in", tmp_path / "out.job.json"
    source.write_text("a\n")
    with pytest.raises(ValueError, match=r"out is not empty, and there is no .*out\.job\.json"):
        check_same_job(sidecar, str(source), {})
    write_down(sidecar, str(source), {"model": "m"})
    check_same_job(sidecar, str(source), {"model": "m"})
    with pytest.raises(ValueError, match="model 'm', not None"):
        check_same_job(sidecar, str(source), {})
    sidecar.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        check_same_job(sidecar, str(source), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.job.json"]


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out"),
        pytest.raises(BlockingIOError, match="another job"),
        locked(tmp_path / "out"),
    ):
        pass
    with locked(tmp_path / "out"):
        pass
