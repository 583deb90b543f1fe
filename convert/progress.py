"""Progress of a long transfer on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes towards `total` and shows rate and time left.

    Args:
        total: bytes to expect.
        what: the first word of what is shown, "convert".
        show: None shows a bar if standard error is a terminal, and nothing otherwise; True shows lines there; False
            shows nothing anywhere.
    """

    def __init__(self, total: int, what: str, show: bool | None = None) -> None:
        terminal = sys.stderr.isatty()
        self._bar: Any = None
        if terminal and show is not False:
            from tqdm import tqdm  # slow to import

            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr)
        self._lines = show is True and not terminal
        self._what, self._total, self._done = what, total, 0
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """Adds `count` bytes."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        now = time.monotonic()
        finished = self._done >= self._total
        if self._lines and (finished or now - self._last_line >= _SECONDS_BETWEEN_LINES):
            self._last_line = now
            rate = self._done / max(now - self._started, 1e-9)
            print(
                f"{self._what}: {self._done / self._total:.0%} of {self._total / 1e6:.0f} MB, "
                f"{rate / 1e6:.0f} MB/s, {(self._total - self._done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
