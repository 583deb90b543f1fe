"""The prefill kernel of ``attention``, emulated lane by lane, at the edges of tiles, blocks, windows and rows."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import definition, inputs

from pallas_kernels import lanes, target
from pallas_kernels.attention import mosaic, mosaic_decode, mosaic_prefill
from pallas_kernels.attention.mosaic_prefill import EMPTY, Config, visited


def check(
    shape: tuple[int, ...],
    qp: np.ndarray,
    kp: np.ndarray,
    window: int | None,
    config: Config | None = None,
) -> None:
    """`shape` is (B, T, S, H, K, C). What bfloat16 loses: as in `test_attention`."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(3, *shape))
    args = (q, k, v, jnp.asarray(qp, jnp.int32), jnp.asarray(kp, jnp.int32))
    with lanes.interpreted():
        got = jax.jit(lambda *a: mosaic_prefill.attention(*a, window=window, config=config))(*args)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    want = definition(q, k, v, qp, kp, window)
    tolerance = 4 * 2.0**-9 * np.abs(v).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("queries", [1, 32, 33, 65])
def test_queries_around_the_edges_of_tiles(queries: int) -> None:
    """Two heads a tile: 32 queries, 64 a CTA. The chunk ends the cache."""
    qp = 72 - queries + np.arange(queries)[None]
    check((1, queries, 72, 2, 1, 64), qp, np.arange(72)[None], None)


@pytest.mark.parametrize("slots", [8, 64, 72, 136])
def test_slots_around_the_edges_of_blocks(slots: int) -> None:
    """The last block begins before its first new slot, where 64 does not divide them; capacity is reached."""
    qp = np.maximum(slots - 20, 0) + np.arange(20)[None]
    qp[qp >= slots] = -1
    check((1, 20, slots, 2, 1, 64), qp, np.arange(slots)[None], None)


@pytest.mark.parametrize("window", [1, 63, 64, 500])
def test_a_window_keeps_exactly_its_keys(window: int) -> None:
    """Behind a prefix of 40 positions, in the order of slots."""
    check((1, 80, 120, 4, 2, 64), 40 + np.arange(80)[None], np.arange(120)[None], window)


def test_a_ring_that_wrapped_beside_a_chunk() -> None:
    """As `gemma_jax.cache.extend` gives them: 48 slots hold positions 52 to 99 from slot 4 on, then 24 new ones."""
    ring = 99 - (99 - np.arange(48)) % 48
    kp = np.concatenate([ring, 100 + np.arange(24)])[None]
    check((1, 24, 72, 4, 1, 64), 100 + np.arange(24)[None], kp, 48)


def test_slots_in_any_order() -> None:
    kp = np.random.default_rng(0).permutation(136)[None]
    check((1, 40, 136, 2, 1, 64), 96 + np.arange(40)[None], kp, 50)


def test_rows_of_different_lengths_one_of_length_1_and_one_that_is_empty() -> None:
    """With prefixes of 0, 0, 50 and nothing; slots that never held anything have positions below -1."""
    starts, lengths = np.array([0, 0, 50, 0]), np.array([40, 1, 17, 0])
    t, s = np.arange(40), np.arange(80)
    qp = np.where(t < lengths[:, None], starts[:, None] + t, -1)
    kp = np.where(s < (starts + lengths)[:, None], s, s - 80)
    check((4, 40, 80, 4, 1, 64), qp, kp, None)


@pytest.mark.parametrize("config", [Config(32, 2), Config(64, 3)])
def test_blocks_and_stages_change_nothing(config: Config) -> None:
    """Five blocks and three: places in shared memory are filled again."""
    check((1, 24, 160, 4, 1, 64), 136 + np.arange(24)[None], np.arange(160)[None], 150, config)


@pytest.mark.parametrize("head_dim", [256, 512])
def test_head_sizes_over_several_blocks(head_dim: int) -> None:
    """At 512 both warpgroups share a tile."""
    check((1, 40, 136, 2, 1, head_dim), 96 + np.arange(40)[None], np.arange(136)[None], 80)


def test_large_scores_do_not_overflow() -> None:
    """A query that sees nothing in its first blocks, then scores of 10^4: 2 to their power is no float32."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(5, 1, 40, 136, 2, 1, 64))
    args = (100 * q, 40 * k, v, 96 + jnp.arange(40)[None], jnp.arange(136)[None])
    with lanes.interpreted():
        got = mosaic_prefill.attention(*args, window=30)
    assert np.all(np.isfinite(np.asarray(got, np.float32)))
    # One weight is all but 1, so a result is a value, whose neighbours' share is that of rounding.
    want = definition(
        *(np.asarray(x, np.float64) for x in args[:3]), *map(np.asarray, args[3:]), 30
    )
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=0.05)


@pytest.mark.parametrize("window", [None, 64])
def test_blocks_that_are_visited_are_those_from_the_first_to_the_last_in_reach(window) -> None:
    tiles = np.arange(512).reshape(1, 16, 32)
    blocks = np.arange(512).reshape(1, 16, 32).copy()
    blocks[0, 15] = EMPTY  # not yet written
    ranges = np.asarray(visited(jnp.asarray(tiles), jnp.asarray(blocks), window))[0]
    for tile, (first, end) in enumerate(ranges):
        oldest = 0 if window is None else max(0, 32 * tile - window + 1) // 32
        assert (first, end) == (oldest, min(tile + 1, 15))
    if window:
        assert max(end - first for first, end in ranges) == 3  # however long the prompt


def test_of_a_tile_of_padding_or_an_empty_cache_nothing_is_visited() -> None:
    nothing = jnp.full((1, 2, 8), -1)
    some = jnp.arange(16).reshape(1, 2, 8)
    for tiles, blocks in ((nothing, some), (some, jnp.full((1, 3, 8), EMPTY))):
        first, end = visited(tiles, blocks, 4)[0, 0]
        assert first == end


def test_what_it_cannot_serve_it_says() -> None:
    def reason(t: int, s: int, c: int, dtype: jnp.dtype = jnp.bfloat16, capability="9.0"):
        q = jax.ShapeDtypeStruct((1, t, 8, c), dtype)
        kv = jax.ShapeDtypeStruct((1, s, 2, c), dtype)
        positions = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (t, s)]
        with target.compiling_for(capability):
            return mosaic.why_not(q, kv, kv, *positions)

    assert reason(64, 64, 256) is None
    assert reason(64, 64, 512) is None
    assert reason(5, 64, 80) == "the head size is 80: expected one of 64, 128, 256, 512"
    assert reason(64, 60, 256) == "the cache has 60 slots: expected a multiple of 8"
    assert reason(64, 0, 256) == "q (1, 64, 8, 256) or k (1, 0, 2, 256) is empty"
    assert reason(64, 64, 256, jnp.float32) == "q has dtype float32: tensor cores take bfloat16"
    assert "compute capability 10.0" in reason(64, 64, 256, capability="10.0")
    assert reason(1, 64, 256, capability="10.0") is None  # which the decode kernel serves


def test_the_number_of_query_rows_chooses_the_kernel() -> None:
    def chosen(queries: int, heads: int) -> type:
        q = jax.ShapeDtypeStruct((1, queries, heads, 64), jnp.bfloat16)
        kv = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
        positions = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (queries, 64)]
        return type(mosaic.default_config(q, kv, kv, *positions))

    assert chosen(1, 16) is chosen(2, 8) is mosaic_decode.Config
    assert chosen(2, 16) is chosen(17, 1) is mosaic_prefill.Config


@pytest.mark.parametrize(("block_kv", "stages"), [(16, 2), (128, 2), (64, 1)])
def test_impossible_configs_are_refused(block_kv: int, stages: int) -> None:
    with pytest.raises(ValueError, match="block_kv must be 32 or 64, stages at least 2"):
        Config(block_kv, stages)


_COMPILE = """
import json
import jax, jax.numpy as jnp
from bench import aot, static_kernels
from pallas_kernels.attention import mosaic
from pallas_kernels.attention.cases import CASES

jax.config.update("jax_platforms", "cpu")
# By head size and query heads a tile: 2, 4 and 8, 4 and 8.
for name in ("12b_sliding", "e4b_sliding", "e2b_sliding", "e4b_global", "26b_a4b_global"):
    case = CASES[name]
    q = jax.ShapeDtypeStruct((2, 1024, case.heads, case.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 1544, case.kv_heads, case.head_dim), jnp.bfloat16)
    positions = [jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (1024, 1544)]
    with static_kernels.dumped() as folder:
        program = aot.compile_for(
            "h200", lambda *a: mosaic.attention(*a, window=case.window), q, kv, kv, *positions
        )
        [machine] = static_kernels.read_dumps(folder)
    temporaries = program.memory_analysis().temp_size_in_bytes
    print(json.dumps([machine.registers, machine.spill_bytes, machine.shared_bytes, temporaries]))
"""


@pytest.mark.heavy
def test_every_kind_of_tile_compiles_for_hopper_without_spills_or_copies() -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    command = [sys.executable, "-c", _COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    machines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(machines) == 5
    for registers, spilled, shared, temporaries in machines:
        assert (registers <= 255, spilled, shared) == (True, 0, 192 * 1024), machines
        assert temporaries < 2**18  # positions and ranges; q alone is 8 MB and more
