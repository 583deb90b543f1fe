"""What the device can do at most, measured beside everything else: a copy and a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Calls that are queued at once, so that the device never waits for the host.
_CALLS = 16


def ceilings(samples: int) -> dict[str, dict[str, Any]]:
    """What `copy` and `gemm` measure, under ``copy_bytes_per_second`` and ``gemm_flops_per_second``."""
    on_cpu = jax.default_backend() == "cpu"
    return {
        "copy_bytes_per_second": copy(2**26 if on_cpu else 2**30, samples),
        "gemm_flops_per_second": gemm(
            1024 if on_cpu else 8192, jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16), samples
        ),
    }


def copy(size: int, samples: int) -> dict[str, Any]:
    """Copies `size` bytes within the device's memory: "seconds" of each time, "bytes" read and written, "what"."""
    source = jnp.arange(size // 4, dtype=jnp.uint32)
    # Into the same place each time: fresh memory costs a CPU more than the copy does.
    program = jax.jit(
        lambda source, target: jnp.bitwise_not(source), donate_argnums=1, keep_unused=True
    )
    target = jnp.zeros_like(source)

    def calls() -> jax.Array:
        nonlocal target
        for _ in range(_CALLS):
            target = program(source, target)
        return target

    return {
        "seconds": _seconds(calls, samples),
        "bytes": 2 * size,
        "what": f"copy of {size // 2**20} MiB, read and written",
    }


def gemm(n: int, dtype: jnp.dtype, samples: int) -> dict[str, Any]:
    """Multiplies two ``[n, n]`` matrices of `dtype`: "seconds" of each product, "flops", "what"."""
    keys = jax.random.split(jax.random.key(0))
    first, w = (jax.random.normal(key, (n, n), dtype) for key in keys)
    w = w * n**-0.5  # products keep their size
    program = jax.jit(jnp.dot)

    def calls() -> jax.Array:
        y = first
        for _ in range(_CALLS):
            y = program(y, w)
        return y

    return {
        "seconds": _seconds(calls, samples),
        "flops": 2 * n**3,
        "what": f"{dtype.name} matrix product {n} x {n} x {n}",
    }


def _seconds(calls: Callable[[], jax.Array], samples: int) -> list[float]:
    """Seconds of one of the queued calls, once per sample, after a warm-up."""
    calls().block_until_ready()
    out = []
    for _ in range(samples):
        begin = time.perf_counter()
        calls().block_until_ready()
        out.append((time.perf_counter() - begin) / _CALLS)
    return out
