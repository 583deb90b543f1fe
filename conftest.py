"""For every test and every example in a docstring: the CPU, and compiled programs kept from one run to the next."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler for GPUs may be installed; no test needs a GPU

import jax
import pytest

from gemma_jax import compilation_cache


def pytest_configure(config: pytest.Config) -> None:
    cache = getattr(config, "cache", None)  # not there under `-p no:cacheprovider`
    if cache is not None:
        compilation_cache.enable(cache.mkdir("compiled"))


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs() -> Iterator[None]:
    """Frees a file's programs after it.

    Each takes several mappings of memory, of which Linux gives a process 65530; XLA crashes where it gets no more.
    """
    yield
    jax.clear_caches()
