"""Attention's calls in the benchmark of kernels: right results pass, wrong results and a wrong cache are seen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import attention_calls, kernel_calls
from bench.attention_calls import AttentionCall
from bench.kernel_calls import KernelCase
from bench.kernel_timing import Kernels
from pallas_kernels.attention_decode.cases import CASES

SMALL = KernelCase("attention_decode", "small_128 depth=100", "xla", "bf16", 8, "SMALL")


def test_a_case_is_found_by_its_names() -> None:
    call = SMALL.call
    assert isinstance(call, AttentionCall)
    assert (call.layer, call.depth, call.rows) == ("small_128", 100, 8)
    assert str(SMALL) == "attention_decode small_128 depth=100 M=8 bf16 xla"


def test_every_layer_with_keys_of_its_own_is_timed_at_its_window_or_at_all_depths() -> None:
    found = list(kernel_calls.calls(ops=["attention_decode"]))
    assert {c.layer for c in found} == {name for name, case in CASES.items() if case.own}
    for layer in {c.layer for c in found}:
        window = CASES[layer].window
        depths = {c.depth for c in found if c.layer == layer}
        assert depths == ({window} if window else set(attention_calls.DEPTHS))
    assert not list(kernel_calls.calls(ops=["attention_decode"], formats=["q4k"]))


def test_bytes_are_those_of_the_cache_and_little_else() -> None:
    call = AttentionCall("31b_global", "mosaic", 8, 16384)
    cache = 2 * 2 * 8 * 16384 * 4 * 512
    assert cache < call.bytes_moved < 1.01 * cache
    assert 2 * call.weights_read == cache
    assert call.flops == 4 * 8 * 16384 * 32 * 512


def test_right_results_pass_and_wrong_ones_are_seen() -> None:
    call: Any = SMALL.call
    arguments = call.random_arguments(jax.random.key(0))
    assert 0 < call.check(call.run, *arguments) <= 1
    for wrong in (jnp.nan, 3):
        with pytest.raises(ValueError, match="elements are off by"):
            call.check(lambda *a, to=wrong: call.run(*a).at[-1, -1, -1].set(to), *arguments)
    x, cache, norms, rope, positions = arguments
    with pytest.raises(ValueError, match="elements are off by"):  # a slot is left out
        call.check(lambda *_: call.run(x, cache, norms, rope, positions - 1), *arguments)


def test_a_cache_that_is_not_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call: Any = SMALL.call
    arguments = call.random_arguments(jax.random.key(0))
    step = AttentionCall.step

    def forgets(self: AttentionCall, x: Any, cache: Any, *rest: Any, **options: Any) -> Any:
        out, written = step(self, x, cache, *rest, **options)
        return out, (written if options else cache)

    monkeypatch.setattr(AttentionCall, "step", forgets)
    with pytest.raises(ValueError, match="elements are off by"):
        call.check(call.run, *arguments)


def test_a_machine_without_a_gpu_checks_the_kernel() -> None:
    case = KernelCase("attention_decode", "small_512 depth=100", "mosaic", "bf16", 1, "SMALL")
    measured = Kernels(2).measure(case)
    assert 0 < measured["error_of_allowed"] <= 1
    assert "seconds" not in measured
