"""Lines in and lines out, compressed or not: input that streams, output that survives a kill.

An output file is a sequence of whole lines at every moment that matters: lines are written in groups, each group with
one write and one fsync, and compressed files hold one gzip member or zstd frame a group. What a kill or a full disk
leaves behind the last whole group is cut off when the file is opened again.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

STANDARD_STREAM = "-"
_READ = 1 << 20
_SECONDS_BETWEEN_GROUPS = 1.0
_BYTES_OF_A_GROUP = 1 << 20


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "files that end in .zst need the package zstandard: pip install 'gemma-jax[batch]'"
        ) from None
    return zstandard


class LineReader:
    """The lines of a file or of standard input, as bytes, one at a time.

    Attributes:
      total: size of the file in bytes, compressed as it is; None for standard input and pipes.
      position: how many of these have been read.
    """

    def __init__(self, path: str) -> None:
        """Opens `path`; "-" is standard input; ".gz" and ".zst" are decompressed.

        Raises:
          OSError: it cannot be opened.
          ValueError: a package for its kind of compression is missing.
        """
        self._path = path
        self._raw: BinaryIO = (
            sys.stdin.buffer if path == STANDARD_STREAM else Path(path).open("rb")  # noqa: SIM115
        )
        regular = path != STANDARD_STREAM and Path(path).is_file()
        self.total = os.fstat(self._raw.fileno()).st_size if regular else None
        self.position = 0
        self._stream: Any = self._raw
        if path.endswith(".gz"):
            self._stream = gzip.GzipFile(fileobj=self._raw)
        elif path.endswith(".zst"):
            self._stream = (
                _zstandard().ZstdDecompressor().stream_reader(self._raw, read_across_frames=True)
            )

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._raw is not sys.stdin.buffer:
            self._raw.close()

    def __iter__(self) -> Iterator[bytes]:
        """Yields lines without their end; a last line needs none.

        Raises:
          ValueError: the file is compressed and damaged; the message names it.
        """
        stream = io.BufferedReader(_Raw(self._stream), _READ)
        while True:
            try:
                line = stream.readline()
            except _decompression_errors(self._path) as error:
                raise ValueError(f"{self._path} is damaged: {error}") from error
            if self.total is not None:
                self.position = self._raw.tell()
            elif line:
                self.position += len(line)
            if not line:
                return
            yield line.rstrip(b"\r\n")


class _Raw(io.RawIOBase):
    """What `io.BufferedReader` wants of a stream that has nothing but `read`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _decompression_errors(path: str) -> tuple[type[Exception], ...]:
    zstd = (_zstandard().ZstdError,) if path.endswith(".zst") else ()
    return (OSError, EOFError, zlib.error, *zstd)


class LineWriter:
    """Appends lines to a file in groups that are on the disk, or not there at all.

    Args:
      path: the file, which is made if it is missing; "-" is standard output; ".gz" and ".zst" are compressed.

    Raises:
      OSError: it cannot be opened or written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._bytes = 0
        self._flushed = time.monotonic()
        self._file: BinaryIO | None = None
        if path != STANDARD_STREAM:
            self._file = Path(path).open("ab")  # noqa: SIM115

    def write(self, line: bytes) -> None:
        """Takes a line, without its end; it is on the disk within a second or a megabyte of further lines."""
        self._lines.append(line + b"\n")
        self._bytes += len(line) + 1
        if self._bytes >= _BYTES_OF_A_GROUP:
            self.flush()
        else:
            self.flush_if_due()

    def flush_if_due(self) -> None:
        """Writes what has waited for a second."""
        if self._lines and time.monotonic() - self._flushed >= _SECONDS_BETWEEN_GROUPS:
            self.flush()

    def flush(self) -> None:
        """Writes all lines taken so far; a group that does not fit on the disk leaves nothing in the file."""
        # Let go before they are written: an interrupt in between may lose lines, which are then computed again, but
        # closing must not write them a second time.
        lines, self._lines, self._bytes = self._lines, [], 0
        group = b"".join(lines)
        if group and self._file is None:
            sys.stdout.buffer.write(group)
            sys.stdout.buffer.flush()
        elif group:
            self._append(self._compressed(group))
        self._flushed = time.monotonic()

    def _append(self, group: bytes) -> None:
        assert self._file is not None
        descriptor = self._file.fileno()
        before = os.fstat(descriptor).st_size
        try:
            view = memoryview(group)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno, f"{error.strerror}; what was written before is whole", self._path
            ) from error

    def _compressed(self, group: bytes) -> bytes:
        if self._path.endswith(".gz"):
            return gzip.compress(group, mtime=0)
        if self._path.endswith(".zst"):
            return _zstandard().ZstdCompressor().compress(group)
        return group

    def close(self) -> None:
        """Flushes and closes."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines that were written whole and cuts off what follows them; nothing if there is no file.

    Raises:
      ValueError: a line that is whole cannot be read: the file is damaged and is left as it is.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = 0
        for group_end, lines in _groups(path, file):
            end = group_end
            yield from lines
        if end < os.fstat(file.fileno()).st_size:
            file.truncate(end)
            os.fsync(file.fileno())


def _groups(path: Path, file: BinaryIO) -> Iterator[tuple[int, list[bytes]]]:
    """(offset behind it, lines) of each whole group: a line, a gzip member, a zstd frame."""
    if path.suffix not in (".gz", ".zst"):
        end = 0
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            yield end, [line[:-1]]
        return
    start, waiting = 0, b""
    while True:
        decompressor = (
            zlib.decompressobj(wbits=31)
            if path.suffix == ".gz"
            else _zstandard().ZstdDecompressor().decompressobj()
        )
        read, parts = 0, []
        while not decompressor.eof:
            piece, waiting = waiting or file.read(_READ), b""
            if not piece:
                return  # the end, or a group that was cut short
            try:
                parts.append(decompressor.decompress(piece))
            except _decompression_errors(str(path)) as error:
                raise ValueError(f"{path} is damaged at byte {start}: {error}") from error
            read += len(piece)
        waiting = decompressor.unused_data
        start += read - len(waiting)
        yield start, b"".join(parts).splitlines()
