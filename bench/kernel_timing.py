"""One kernel under the clock: checked first, then timed on weights that are in no cache.

How a call is timed. A jitted loop on the device makes `turns` turns. A turn reads `EVICTED` bytes of something else,
more than the L2 of any GPU here, and then calls the op once with each of `copies` copies of the weights, so every call
finds its weights in memory as decoding does, however small they are. Reading and not writing: dirty lines would be
written back while the kernel runs. Each call's x is tied to the result before it, so calls run one after the other, as
in a model; and all results are results of the loop, so none is left out. The same loop without calls is timed after
each, and the difference over all calls is one sample. The XLA flags that `gemma_jax` sets make one CUDA graph of the
loop, so a call's share of a sample has a launch within a graph in it and no work of the host.

Before that results are checked (`bench.kernel_checks`), on random numbers anew for every case.

On a CPU kernels for GPUs run in Pallas' interpret mode and are checked only.
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.attention_calls import AttentionCall
from bench.kernel_calls import Call, KernelCase
from bench.random_weights import random_weight
from pallas_kernels import lanes, pack_array

EVICTED = 2**28
COPIES_BYTES = 2**33  # of memory, at most, for copies of the weights
MOST_COPIES = 16
SECONDS_OF_A_SAMPLE = 0.05
_MOST_TURNS = 2000


class Kernels:
    """All ops as a `bench.processes.Engine`."""

    def __init__(self, samples: int) -> None:
        jax.config.update("jax_enable_compilation_cache", False)
        self.samples = samples
        self.on_cpu = jax.default_backend() == "cpu"
        # A CPU's small shapes are timed to see that it works; next to this its calls would be lost in noise.
        self._evicted = jnp.arange((2**12 if self.on_cpu else EVICTED) // 4, dtype=jnp.uint32)
        self._empty = timed(jax.jit(turns_of(lambda *_: None)), self._evicted, None, [], [])

    def close(self) -> None:
        """Nothing outlives the process."""

    def measure(self, case: KernelCase) -> dict[str, Any]:
        """Checks one case, then times it.

        Raises:
          ValueError: the results are wrong.
          jax.errors.JaxRuntimeError: the kernel does not compile or not run.
        """
        call = case.call
        interpreted = self.on_cpu and not call.runs_on_cpu
        run = call.configured(case.config)
        x, w, *rest = random_arguments(call, case)
        with lanes.interpreted() if interpreted else contextlib.nullcontext():
            error = call.check(run, x, w, *rest)
        facts = {
            "bytes": call.bytes_moved,
            "bytes_min": call.bytes_min,
            "flops": call.flops,
            "packed": call.packed,
            "error_of_allowed": error,
        }
        return facts if interpreted else facts | self._time(run, x, w, rest)

    def _time(self, run: Callable[..., jax.Array], x: Any, w: Any, rest: Any) -> dict[str, Any]:
        size = sum(plane.nbytes for plane in jax.tree.leaves(w))
        copies = max(2, min(MOST_COPIES, COPIES_BYTES // size))
        ws = [w, *(jax.tree.map(jnp.copy, w) for _ in range(copies - 1))]
        begin = time.perf_counter()
        loop = timed(jax.jit(turns_of(run)), self._evicted, x, ws, rest)
        loop(1)
        compile_seconds = time.perf_counter() - begin
        self._empty(1)
        turns = max(1, min(_MOST_TURNS, math.ceil(SECONDS_OF_A_SAMPLE / loop(1))))
        pairs = [(loop(turns), self._empty(turns)) for _ in range(self.samples)]
        seconds = [(full - empty) / (turns * copies) for full, empty in pairs]
        if min(seconds) <= 0:
            raise ValueError(
                f"the loop with calls took no longer than without: {pairs} s, {turns} turns"
            )
        return {
            "seconds": seconds,
            "loop_seconds": [full for full, _ in pairs],
            "empty_loop_seconds": [empty for _, empty in pairs],
            "turns": turns,
            "copies": copies,
            "compile_seconds": compile_seconds,
        }


def turns_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """The loop that the module's docstring describes: ``f(turns, evicted, x, copies of w, rest)``."""

    def loop(turns: jax.Array, evicted: jax.Array, x: Any, ws: list[Any], rest: list[Any]) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            tick, x, _ = carry
            # Depends on the turn before, or it would be moved out of the loop.
            tick = tick + jnp.sum(evicted ^ tick, dtype=jnp.uint32)
            tick, x = jax.lax.optimization_barrier((tick, x))
            results = []
            for w in ws:
                x, y = jax.lax.optimization_barrier((x, run(x, w, *rest)))
                results.append(y)
            return tick, x, results

        shapes = [jax.eval_shape(run, x, w, *rest) for w in ws]
        results = [jnp.zeros(y.shape, y.dtype) for y in shapes]
        return jax.lax.fori_loop(0, turns, turn, (jnp.uint32(0), x, results))

    return loop


def timed(program: Callable[..., Any], *arguments: Any) -> Callable[[int], float]:
    """``f(turns)``: seconds of the program with so many turns, from call to result."""

    def run(turns: int) -> float:
        count = jnp.int32(turns)
        jax.block_until_ready(count)
        begin = time.perf_counter()
        jax.block_until_ready(program(count, *arguments))
        return time.perf_counter() - begin

    return run


def random_arguments(call: Call | AttentionCall, case: KernelCase) -> tuple[Any, ...]:
    """x, w, ids and scale, other ones for each case; every expert has a chance."""
    key = jax.random.key(zlib.crc32(str(case).encode()))
    if isinstance(call, AttentionCall):
        return call.random_arguments(key)
    keys = iter(jax.random.split(key, 4))
    w = random_weight(next(keys), call.shapes.w, call.format)
    w = pack_array(w) if call.packed else w
    x = jax.random.normal(next(keys), call.shapes.x, jnp.bfloat16)

    def random(a: jax.ShapeDtypeStruct) -> jax.Array:
        if a.dtype == jnp.int32:
            return jax.random.randint(next(keys), a.shape, 0, call.shapes.w[0], jnp.int32)
        return jax.random.uniform(next(keys), a.shape, jnp.float32, 0.5, 1.5)

    return x, w, *map(random, call.shapes.rest)
