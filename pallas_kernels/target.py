"""Which GPU kernels are traced for: tensor cores differ from one generation to the next."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

HOPPER = "9.0"

_named: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(compute_capability: str) -> Iterator[None]:
    """What is traced inside will run on a GPU of that compute capability (``"9.0"``), which need not be here.

    ``jax.jit`` does not see this: a function that was traced outside is not traced again.
    """
    token = _named.set(compute_capability)
    try:
        yield
    finally:
        _named.reset(token)


def compute_capability() -> str | None:
    """That named by `compiling_for`, else of JAX's default device; None if that is no CUDA device."""
    return _named.get() or getattr(jax.devices()[0], "compute_capability", None)
