"""The decode kernel of ``attention``, emulated lane by lane, at the edges of blocks, windows and rows."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import definition, inputs

from pallas_kernels import lanes
from pallas_kernels.attention import mosaic_decode


def check(
    shape: tuple[int, ...], qp: np.ndarray, kp: np.ndarray, window: int | None, splits: int
) -> None:
    """`shape` is (B, T, S, H, K, C). What bfloat16 loses: as in `test_attention`."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(3, *shape))
    args = (q, k, v, jnp.asarray(qp, jnp.int32), jnp.asarray(kp, jnp.int32))
    config = mosaic_decode.Config(splits)
    with lanes.interpreted():
        got = jax.jit(lambda *a: mosaic_decode.attention(*a, window=window, config=config))(*args)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    want = definition(q, k, v, qp, kp, window)
    tolerance = 4 * 2.0**-9 * np.abs(v).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 112])
def test_lengths_around_the_edges_of_tiles_and_blocks(length: int) -> None:
    kp = np.where(np.arange(112) < length, np.arange(112), -1)[None]
    check((1, 1, 112, 4, 2, 64), np.array([[length - 1]]), kp, None, 2)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 48])
def test_a_window_keeps_exactly_its_keys_in_a_ring(window: int) -> None:
    """48 slots that have been written around: slot s holds the last position congruent to s."""
    last = 100
    kp = last - (last - np.arange(48)) % 48
    check((1, 1, 48, 8, 1, 64), np.array([[last]]), kp[None], window, 1)


def test_rows_of_different_lengths_and_one_that_sees_nothing() -> None:
    lengths = np.array([1, 40, 80, 5])
    kp = np.where(np.arange(80) < lengths[:, None], np.arange(80), -1)
    qp = lengths[:, None] - 1
    kp[3], qp[3] = -1, -1
    check((4, 1, 80, 4, 2, 64), qp, kp, None, 3)


@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(4, 2, 3), (8, 1, 2), (16, 1, 1)])
def test_several_queries_of_a_row_each_see_up_to_themselves(heads, kv_heads, queries) -> None:
    kp = np.where(np.arange(64) < 40, np.arange(64), -1)[None]
    qp = 40 - queries + np.arange(queries)[None]
    check((1, queries, 64, heads, kv_heads, 64), qp, kp, None, 1)


@pytest.mark.parametrize("splits", [1, 2, 64])
def test_how_many_ctas_share_the_slots_changes_nothing(splits: int) -> None:
    kp = np.arange(160)[None]
    check((1, 1, 160, 8, 2, 256), np.array([[159]]), kp, 100, splits)


def test_what_it_cannot_serve_it_says() -> None:
    def reason(t: int, s: int, c: int, dtype: jnp.dtype = jnp.bfloat16) -> str | None:
        q = jax.ShapeDtypeStruct((1, t, 8, c), dtype)
        kv = jax.ShapeDtypeStruct((1, s, 2, c), dtype)
        positions = jax.ShapeDtypeStruct((1, s), jnp.int32)
        return mosaic_decode.why_not(q, kv, kv, positions, positions)

    assert reason(1, 64, 256) is None
    assert reason(3, 64, 256) == "12 query rows read a KV head: expected 1 to 8"
    assert reason(3, 64, 128) is None
    assert reason(5, 64, 128) == "20 query rows read a KV head: expected 1 to 16"
    assert reason(1, 64, 512) == "the head size is 512: expected 64, 128 or 256"
    assert reason(1, 60, 256) == "the cache has 60 slots: expected a multiple of 16"
    assert reason(1, 64, 256, jnp.float32) == "q has dtype float32: tensor cores take bfloat16"


_COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from bench import aot, static_kernels
from pallas_kernels.attention import mosaic_decode
from pallas_kernels.attention.cases import CASES

jax.config.update("jax_platforms", "cpu")
for case in sorted({c for c in CASES.values() if c.head_dim <= 256}):
    q = jax.ShapeDtypeStruct((2, 1, case.heads, case.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, case.window, case.kv_heads, case.head_dim), jnp.bfloat16)
    positions = [jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (1, case.window)]
    with static_kernels.dumped() as folder:
        aot.compile_for(sys.argv[1], lambda *a: mosaic_decode.attention(*a, window=case.window), q, kv, kv, *positions)
        [machine] = static_kernels.read_dumps(folder)
    print(json.dumps([*case, machine.registers, machine.spill_bytes]))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["h200", "b200", "gb10"])
def test_sliding_layers_compile_without_spills(target: str) -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    command = [sys.executable, "-c", _COMPILE, target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    machines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(machines) == 4
    assert all(registers <= 255 and spilled == 0 for *_, registers, spilled in machines), machines
