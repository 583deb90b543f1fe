"""Work in processes of its own: a device's memory is free again, and a crash is one failed case.

JAX keeps three quarters of a GPU's memory until its process ends, so no peer could run beside it, and no model after
another. The process that keeps the record of a sweep therefore never touches the device.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

_SPAWN = multiprocessing.get_context("spawn")  # a forked JAX hangs
_MOST_OF_AN_ERROR = 2000  # characters; XLA lists every allocation when memory is short
_SECONDS_TO_END = 10.0


class Engine(Protocol):
    """Something that can be measured, with its weights loaded."""

    def measure(self, case: Any) -> dict[str, Any]:
        """The measurements of one case: "seconds" and what else there is to say.

        Raises anything: the case has then failed.
        """

    def close(self) -> None:
        """Ends what the engine started."""


class Worker:
    """An engine in a process of its own, opened there by the first case."""

    def __init__(self, open_engine: Callable[..., Engine], *args: Any) -> None:
        self._open, self._args = open_engine, args
        self._process: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def measure(self, case: Any, most_seconds: float | None = None) -> dict[str, Any]:
        """The measurements of one case, or ``{"error": text}``; the next case after a crash gets a new process.

        "load_seconds" is there too if the engine was opened for it. What takes longer than `most_seconds` is ended: a
        kernel that waits for itself never comes back.
        """
        if self._process is None:
            self._connection, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=_serve, args=(theirs, self._open, self._args))
            self._process.start()
            theirs.close()  # or its end would not be noticed here
        try:
            self._connection.send(case)
            if not self._connection.poll(most_seconds):
                self.end(at_once=True)
                return {"error": f"no answer in {most_seconds:.0f} seconds"}
            answer: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_SECONDS_TO_END)
            code = self._process.exitcode
            self.end()
            return {"error": f"the process ended by itself with status {code}"}
        return answer

    def end(self, *, at_once: bool = False) -> None:
        """Closes the engine and its process; the next case opens another."""
        if self._process is None:
            return
        self._connection.close()
        self._process.join(0 if at_once else _SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` of a new process.

    Raises:
      RuntimeError: it raised, or the process died; says what.
    """
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_call, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        value, failure = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended by itself with status {process.exitcode}") from None
    finally:
        ours.close()
        process.join()
    if failure:
        raise RuntimeError(failure)
    return value


def _serve(connection: Any, open_engine: Callable[..., Engine], args: tuple[Any, ...]) -> None:
    """Answers cases until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that keeps the record
    engine: Engine | None = None
    failure = ""
    try:
        while True:
            case = connection.recv()
            answer: dict[str, Any] = {}
            if engine is None and not failure:
                begin = time.monotonic()
                try:
                    engine = open_engine(*args)
                except Exception as error:
                    traceback.print_exc()
                    failure = f"could not start: {_text(error)}"
                answer["load_seconds"] = time.monotonic() - begin
            try:
                answer |= engine.measure(case) if engine else {"error": failure}
            except Exception as error:
                traceback.print_exc()
                answer["error"] = _text(error)
            connection.send(answer)
    except (EOFError, OSError):
        return  # the other end closed
    finally:
        if engine is not None:
            engine.close()


def _call(connection: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        connection.send((function(*args), None))
    except Exception as error:
        connection.send((None, _text(error)))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MOST_OF_AN_ERROR]
