"""For every test and every example in a docstring: the CPU, and compiled programs kept from one run to the next."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler for GPUs may be installed; no test needs a GPU

import pytest

from gemma_jax import compilation_cache


def pytest_configure(config: pytest.Config) -> None:
    cache = getattr(config, "cache", None)  # not there under `-p no:cacheprovider`
    if cache is not None:
        compilation_cache.enable(cache.mkdir("compiled"))
