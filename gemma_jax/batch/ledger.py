"""Which rows of a job are done: read off its output, kept on disk, so that memory does not grow with the job.

Answers are known by their custom_id, error records by the number of their line. Both are in the output files
themselves, which are all that a job needs to go on; the ledger is made anew from them at every start.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from typing import Any

_FROM_OUTPUT = 0  # in place of a line: answered by an earlier run, and not met in the input yet


class Ledger:
    """A set of custom_ids and lines in a temporary SQLite file: about 30 bytes of disk a row, none of memory.

    Custom_ids are kept as 128-bit BLAKE2b hashes: of ten million the chance that two agree is below ``2**-80``.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # a temporary file that SQLite deletes itself
        self._database.isolation_level = None
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE ids (hash BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID",
            "CREATE TABLE errors (line INTEGER PRIMARY KEY)",
            "BEGIN",
        ):
            self._database.execute(statement)
        self.answered = self.failed = 0

    def read(
        self, answers: Iterable[bytes], errors: Iterable[bytes], names: tuple[str, str]
    ) -> None:
        """Enters what earlier runs have written.

        Args:
          answers, errors: lines of the output and of the error file.
          names: of the two files, for messages.

        Raises:
          ValueError: a line is not of such a file, or an answer is there twice.
        """
        for number, line in enumerate(answers, 1):
            custom_id = _field(line, "custom_id", str, names[0], number)
            cursor = self._database.execute(
                "INSERT OR IGNORE INTO ids VALUES (?, ?)", (_hash(custom_id), _FROM_OUTPUT)
            )
            if not cursor.rowcount:
                raise ValueError(f"{names[0]}: line {number} answers {custom_id!r} a second time")
            self.answered += 1
        for number, line in enumerate(errors, 1):
            at = _field(line, "line", int, names[1], number)
            self.failed += self._database.execute(
                "INSERT OR IGNORE INTO errors VALUES (?)", (at,)
            ).rowcount

    def is_reported(self, line: int) -> bool:
        """Whether the error file has that line of the input."""
        if not self.failed:
            return False
        query = "SELECT 1 FROM errors WHERE line = ?"
        return self._database.execute(query, (line,)).fetchone() is not None

    def claim(self, custom_id: str, line: int) -> str:
        """Who has a custom_id: "new" if nobody had, "answered" by an earlier run, "duplicate" of another line."""
        key = _hash(custom_id)
        inserted = self._database.execute(
            "INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, line)
        ).rowcount
        if inserted:
            return "new"
        [owner] = self._database.execute("SELECT line FROM ids WHERE hash = ?", (key,)).fetchone()
        if owner != _FROM_OUTPUT:
            return "duplicate"
        self._database.execute("UPDATE ids SET line = ? WHERE hash = ?", (line, key))
        return "answered"

    def close(self) -> None:
        """Deletes the file."""
        self._database.close()


def _hash(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def _field(line: bytes, name: str, kind: type, file: str, number: int) -> Any:
    try:
        value = json.loads(line)[name]
    except (ValueError, KeyError, TypeError):
        value = None
    if type(value) is not kind:
        raise ValueError(
            f"{file}: line {number} is not one that a batch job wrote; move the file away"
        )
    return value
