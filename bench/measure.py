"""Our engine under the clock: prefill, first token and decode of one model in one format."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.least_work import decode_bytes_min, prefill_flops_min
from bench.plan import DECODE, PREFILL, SEED, Case
from bench.published import PUBLISHED, SMALL, published
from bench.random_weights import random_params
from gemma_jax.cache import KVCache, init_cache
from gemma_jax.checkpoints import resolve
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import DecodeState, FinishReason, continue_generation, prefill, start
from gemma_jax.model import Gemma4, Params
from gemma_jax.parameters import pack_params
from gemma_jax.sampling import Sampling, TokenCounts, stack_sampling
from pallas_kernels.dispatch import Implementation


def load_weights(model: str, weight_format: str) -> tuple[Gemma4Config, Params]:
    """Random weights for the name of an architecture, a checkpoint's own for anything else.

    Raises:
      ValueError, OSError: there is no such checkpoint, or it is damaged or converted to another format.
    """
    if model in (*PUBLISHED, *SMALL):
        config = published(model)
        return config, random_params(config, weight_format, SEED)
    from convert import hub  # Orbax is slow to import
    from convert.load import load_checkpoint

    config, params, _ = load_checkpoint(hub.resolve(resolve(model)), format=weight_format)
    return config, params


class Prepared(NamedTuple):
    """A compiled case: `sample` runs it once and returns the seconds that count."""

    sample: Callable[[], float]
    program: jax.stages.Compiled
    compile_seconds: float


class GemmaJax:
    """This package as a `bench.processes.Engine`."""

    def __init__(self, model: str, weight_format: str, samples: int) -> None:
        jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured too
        self.samples = samples
        self._source = (model, weight_format)
        self.config, self.params = load_weights(*self._source)
        self._stored: Params = jax.eval_shape(lambda params: params, self.params)
        self._is_packed = False
        self.dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def close(self) -> None:
        """Nothing outlives the process."""

    def measure(self, case: Case) -> dict[str, Any]:
        """Compiles, warms up and times one case.

        Raises:
          jax.errors.JaxRuntimeError: out of memory, most likely.
          ValueError: more positions than the model has, or kernels that cannot serve it.
        """
        model = self._served(case.implementation)
        memory = PeakMemory()
        prepare = {DECODE: self._decode, PREFILL: self._prefill}.get(case.phase, self._first_token)
        prepared = prepare(case, model)
        memory.leave_out_compilation()
        prepared.sample()
        seconds = [prepared.sample() for _ in range(self.samples)]
        peak, peak_of = memory.reading(prepared.program)
        return {
            "seconds": seconds,
            "peak_bytes": peak,
            "peak_bytes_of": peak_of,
            "compile_seconds": prepared.compile_seconds,
            "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)),
            "layers": self.config.num_layers,
            "activations": jnp.dtype(self.dtype).name,
        } | self._least(case)

    def _served(self, implementation: str | None) -> Gemma4:
        """The decoder for an implementation, its weights in the order that it wants; of them there is never a copy."""
        wants_packed = implementation == "mosaic"
        if wants_packed and not self._is_packed:
            self.params = pack_params(self.params)
        elif self._is_packed and not wants_packed:
            self.params = {}
            _, self.params = load_weights(*self._source)
        self._is_packed = wants_packed
        names: Implementation = None if implementation == "auto" else implementation
        return Gemma4(self.config, self.dtype, ("mosaic", "xla") if wants_packed else names)

    def _least(self, case: Case) -> dict[str, Any]:
        """What no engine can do without: bytes per token of decode, in the middle of it; operations of a prompt."""
        if case.phase != DECODE:
            assert case.tokens is not None
            return {"flops_min": case.batch * prefill_flops_min(self.config, case.tokens)}
        assert case.depth is not None
        assert case.new_tokens is not None
        step = decode_bytes_min(
            self.config,
            self._stored,
            case.batch,
            depth=case.depth + case.new_tokens // 2,
            itemsize=jnp.dtype(self.dtype).itemsize,
        )
        return {"bytes_min": step / case.batch}

    def _tokens(self, case: Case) -> np.ndarray:
        assert case.tokens is not None
        rng = np.random.default_rng(SEED)
        ids = rng.integers(0, self.config.vocab_size, (case.batch, case.tokens))
        return ids.astype(np.int32)

    def _prefill(self, case: Case, model: Gemma4) -> Prepared:
        assert case.tokens is not None
        tokens = jnp.asarray(self._tokens(case))
        lengths = jnp.full((case.batch,), case.tokens, jnp.int32)
        cache = init_cache(self.config, case.batch, case.tokens, self.dtype)
        program, seconds = _compiled(prefill, self.params, tokens, lengths, cache, model=model)

        def sample() -> float:
            nonlocal cache
            empty = cache.replace(lengths=jnp.zeros_like(cache.lengths))
            jax.block_until_ready(empty)
            begin = time.perf_counter()
            logits, cache = program(self.params, tokens, lengths, empty)
            logits.block_until_ready()
            return time.perf_counter() - begin

        return Prepared(sample, program, seconds)

    def _first_token(self, case: Case, model: Gemma4) -> Prepared:
        tokens = self._tokens(case)
        lengths = np.full((case.batch,), case.tokens, np.int32)
        sampling = self._greedy(case.batch, 1)
        program, seconds = _compiled(
            start, self.params, tokens, lengths, sampling, model=model, capacity=case.tokens
        )

        def sample() -> float:
            begin = time.perf_counter()
            state = program(self.params, tokens, lengths, sampling)
            jax.device_get(state.token)
            return time.perf_counter() - begin

        return Prepared(sample, program, seconds)

    def _decode(self, case: Case, model: Gemma4) -> Prepared:
        assert case.depth is not None
        assert case.new_tokens is not None
        # One of these tokens is the state's own, which the loop has no step for.
        room = case.new_tokens + 1
        sampling = self._greedy(case.batch, room)
        depth = case.depth
        state = self._state_at(depth, case.batch, case.new_tokens)
        program, seconds = _compiled(
            continue_generation, self.params, state, sampling, model=model, max_new_tokens=room
        )

        def sample() -> float:
            nonlocal state
            again = _at_depth(state, depth)
            jax.block_until_ready(again)
            begin = time.perf_counter()
            result, state = program(self.params, again, sampling)
            result.tokens.block_until_ready()
            elapsed = time.perf_counter() - begin
            if int(result.lengths.min()) != room:
                raise RuntimeError(
                    f"a row ended after {int(result.lengths.min())} of {room} tokens"
                )
            return elapsed

        return Prepared(sample, program, seconds)

    def _greedy(self, batch: int, new_tokens: int) -> Any:
        rows = [Sampling(ignore_eos=True)] * batch
        return stack_sampling(rows, max_new_tokens=new_tokens, vocab_size=self.config.vocab_size)

    def _state_at(self, depth: int, batch: int, room: int) -> DecodeState:
        """A state with `depth` random positions in its cache and one token to go on from."""
        empty = jax.eval_shape(lambda: init_cache(self.config, batch, depth + room, self.dtype))
        leaves, tree = jax.tree.flatten(empty.layers)
        keys = jax.random.split(jax.random.key(SEED), len(leaves))
        filled = [_random(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        layers = jax.tree.unflatten(tree, filled)
        token = jnp.full((batch,), self.config.bos_id, jnp.int32)
        zeros = jnp.zeros((batch,), jnp.int32)
        state = DecodeState(
            cache=KVCache(layers, zeros, depth + room),
            counts=TokenCounts.from_prompt(token[:, None], zeros, self.config.vocab_size),
            token=token,
            generated=zeros,
            reason=zeros,
            logprobs=None,
        )
        return _at_depth(state, depth)


def _at_depth(state: DecodeState, depth: int) -> DecodeState:
    """The state as before its first step, each counter an array of its own, as donating it asks for."""
    rows = state.token.shape
    return state.replace(
        cache=state.cache.replace(lengths=jnp.full(rows, depth, jnp.int32)),
        generated=jnp.ones(rows, jnp.int32),
        reason=jnp.full(rows, int(FinishReason.UNFINISHED), jnp.int32),
    )


def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    make = jax.jit(lambda key: jax.random.uniform(key, shape, dtype, -1, 1))
    return make(key)


def _compiled(function: Any, *args: Any, **static: Any) -> tuple[jax.stages.Compiled, float]:
    begin = time.perf_counter()
    program = function.lower(*args, **static).compile()
    return program, time.perf_counter() - begin


class PeakMemory:
    """The most memory in use since it was made: of the device where that says so, else of this process."""

    def __init__(self) -> None:
        self._device = jax.devices()[0]
        self._before = self._stats().get("peak_bytes_in_use")
        self._reset = False

    def leave_out_compilation(self) -> None:
        """Starts anew where the compiler's memory would count: a CPU's is the same."""
        self._reset = self._before is None and _reset_peak_rss()

    def reading(self, program: jax.stages.Compiled) -> tuple[int, str]:
        """Bytes, and what they are of.

        A device's peak counts from the start of the process. Where an earlier case has had more, this one's is made up
        of what is in use now and the temporaries of its program.
        """
        stats = self._stats()
        if self._before is None:
            since = "this case's runs" if self._reset else "the process"
            return _peak_rss(), f"resident memory of the process, peak of {since}"
        if stats["peak_bytes_in_use"] > self._before:
            return stats["peak_bytes_in_use"], "peak_bytes_in_use of the device"
        plan: Any = program.memory_analysis()
        extra = plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return stats["bytes_in_use"] + extra, "bytes_in_use of the device and the program's own"

    def _stats(self) -> dict[str, int]:
        return self._device.memory_stats() or {}


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
