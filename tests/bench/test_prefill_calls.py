"""Prefill attention's calls in the benchmark of kernels: right results pass, wrong ones are seen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import kernel_calls
from bench.kernel_calls import KernelCase
from bench.prefill_calls import PrefillCall
from pallas_kernels import lanes
from pallas_kernels.target import compiling_for

SMALL = KernelCase("attention", "small_64 depth=40", "xla", "bf16", 24, "SMALL")


def test_a_sliding_layers_prefix_is_its_window() -> None:
    found = list(kernel_calls.calls(ops=["attention"], implementations=lambda n: n == "xla"))
    assert {c.depth for c in found if c.layer == "31b_sliding"} == {1024}
    assert {c.depth for c in found if c.layer == "31b_global"} == {0, 8192}


def test_work_is_that_of_pairs_that_see_each_other() -> None:
    assert PrefillCall("small_512", "xla", 3, 2).flops == 4 * (3 + 4 + 5) * 4 * 512
    assert PrefillCall("small_64", "xla", 3, 40).flops == 4 * (3 * 40) * 4 * 64


def test_right_results_pass_and_wrong_ones_are_seen() -> None:
    call: Any = SMALL.call
    arguments = call.random_arguments(jax.random.key(0))
    assert 0 < call.check(call.run, *arguments) <= 1
    for wrong in (jnp.nan, 3):
        with pytest.raises(ValueError, match="elements are off by"):
            call.check(lambda *a, to=wrong: call.run(*a).at[-1, -1, -1].set(to), *arguments)


def test_the_kernel_passes_where_a_cpu_emulates_it() -> None:
    with lanes.interpreted():
        call: Any = KernelCase("attention", "small_64 depth=40", "mosaic", "bf16", 24, "SMALL").call
        assert 0 < call.check(call.run, *call.random_arguments(jax.random.key(0))) <= 1


def test_kernels_are_listed_for_the_gpu_that_is_compiled_for() -> None:
    def kernels() -> int:
        found = kernel_calls.calls(ops=["attention"], implementations=kernel_calls.is_hand_kernel)
        return sum(1 for _ in found)

    assert kernels() == 0
    with compiling_for("9.0"):
        assert kernels() == 2 * 5 + 4 * 5  # sliding layers and global ones
