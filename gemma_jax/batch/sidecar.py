"""Whose an output file is: a lock against other jobs, and OUT.job.json, which says what job began it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_jax.batch.files import STANDARD_STREAM

_READ = 1 << 20


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps other jobs away from `output`, which is made if it is missing; the lock ends with its process."""
    descriptor = os.open(output, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                errno.EAGAIN, "another job is writing this file", str(output)
            ) from None
        yield
    finally:
        os.close(descriptor)


def check_same_job(path: Path, source: str, settings: dict[str, Any]) -> None:
    """Compares a job with what `write_down` wrote for the one that began its files.

    Raises:
      ValueError: the input has changed, other than grown, or a setting that answers depend on; or no job began them.
    """
    output = path.name.removesuffix(".job.json")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        size, digest = before["input"]
        old = before["settings"]
    except FileNotFoundError:
        raise ValueError(f"{output} is not empty, and there is no {path} of its job") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    for name in sorted(set(old) | set(settings)):
        if old.get(name) != settings.get(name):
            raise ValueError(
                f"{output} was begun with {name} {old.get(name)!r}, not {settings.get(name)!r}: "
                "go on with the same, or write to another file"
            )
    if size is not None and _is_file(source):
        grown = Path(source).stat().st_size >= size
        if not grown or fingerprint(Path(source), size)[1] != digest:
            raise ValueError(
                f"{output} was begun with another {source}: lines may be added at its end, not changed"
            )


def write_down(path: Path, source: str, settings: dict[str, Any]) -> None:
    """Writes what a job's answers depend on, whole or not at all."""
    read = fingerprint(Path(source)) if _is_file(source) else (None, None)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"input": read, "settings": settings}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the names of the output's files outlive a loss of power too
    finally:
        os.close(folder)


def _is_file(source: str) -> bool:
    return source != STANDARD_STREAM and Path(source).is_file()


def fingerprint(path: Path, length: int | None = None) -> tuple[int, str]:
    """(length, hash) of the first `length` bytes of a file, all by default."""
    left = size = path.stat().st_size if length is None else length
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while left and (data := file.read(min(left, _READ))):
            digest.update(data)
            left -= len(data)
    return size, digest.hexdigest()


def checkpoint_fingerprint(folder: Path) -> str:
    """A hash of a checkpoint: of every file the name, the size, and the first and last megabyte.

    Other weights of the same shapes differ there, and a hundred gigabytes need not be read at every start.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\n{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_READ))
            file.seek(max(0, size - _READ))
            digest.update(file.read(_READ))
    return digest.hexdigest()
