"""Attention: every implementation against a float64 numpy definition.

Tolerance: a float32 soft-max average of values of order one is off by a few rounding errors (2**-24) per term of a
sum of S terms, so S * 2**-22 bounds it; bfloat16 inputs and weights round at 2**-9, and 4 of those bound the average.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lanes
from pallas_kernels.attention import IMPLEMENTATIONS, attention
from pallas_kernels.attention.cases import CASES

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def definition(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    qp: np.ndarray,
    kp: np.ndarray,
    window: int | None,
) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, queries, heads, _ = q.shape
    kv_heads = k.shape[2]
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(queries):
            p = qp[b, t]
            seen = (kp[b] >= 0) & (kp[b] <= p)
            if window is not None:
                seen &= kp[b] > p - window
            if p < 0 or not seen.any():
                continue
            for h in range(heads):
                head = h // (heads // kv_heads)
                scores = k[b, seen, head] @ q[b, t, h]
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, seen, head] / weights.sum()
    return out


def inputs(seed: int, b: int, t: int, s: int, h: int, k: int, c: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((b, t, h, c), dtype=np.float32)
    keys, values = rng.standard_normal((2, b, s, k, c), dtype=np.float32) / np.float32(c**0.25)
    return q, keys, values


def check(
    implementation: str,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    qp: np.ndarray,
    kp: np.ndarray,
    window: int | None,
    dtype: jnp.dtype = jnp.float32,
) -> None:
    if implementation == "mosaic":
        dtype = jnp.bfloat16
    q, k, v = (np.asarray(jnp.asarray(x, dtype)) for x in (q, k, v))
    args = [*map(jnp.asarray, (q, k, v)), jnp.asarray(qp, jnp.int32), jnp.asarray(kp, jnp.int32)]
    if reason := IMPLEMENTATIONS[implementation].why_not(*args):
        with pytest.raises(ValueError, match=re.escape(reason)):
            attention(*args, window=window, implementation=implementation)
        return
    with lanes.interpreted():
        have = attention(*args, window=window, implementation=implementation)
    assert have.dtype == dtype
    tolerance = k.shape[1] * 2.0**-22 if dtype == jnp.float32 else 4 * 2.0**-9
    largest = np.abs(v.astype(np.float64)).max()
    want = definition(q, k, v, np.asarray(qp), np.asarray(kp), window)
    np.testing.assert_allclose(np.asarray(have, np.float64), want, rtol=0, atol=tolerance * largest)


@implementations
@pytest.mark.parametrize("name", CASES)
def test_decode_of_every_gemma_shape(implementation: str, name: str) -> None:
    heads, kv_heads, head_dim, window = CASES[name]
    q, k, v = inputs(0, 2, 1, 40, heads, kv_heads, head_dim)
    check(implementation, q, k, v, [[39], [11]], np.tile(np.arange(40), (2, 1)), window and 16)


@implementations
@pytest.mark.parametrize("name", CASES)
def test_a_chunk_after_a_prefix_of_every_gemma_shape(implementation: str, name: str) -> None:
    """Prefixes of 28 and 3 positions, chunks of 20 and 7."""
    heads, kv_heads, head_dim, window = CASES[name]
    q, k, v = inputs(0, 2, 20, 48, heads, kv_heads, head_dim)
    prefixes, ends = np.array([[28], [3]]), np.array([[48], [10]])
    qp, kp = prefixes + np.arange(20), np.tile(np.arange(48), (2, 1))
    qp, kp = (np.where(p < ends, p, -1) for p in (qp, kp))
    check(implementation, q, k, v, qp, kp, window and 16)


@implementations
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 64, 255, 256, 257, 5000])
def test_prefill_around_block_and_window_edges(
    implementation: str, dtype: jnp.dtype, window: int | None
) -> None:
    """600 queries and keys: two and a bit blocks of queries, one and a bit of keys."""
    q, k, v = inputs(1, 1, 600, 600, 2, 1, 8)
    positions = np.arange(600)[None]
    check(implementation, q, k, v, positions, positions, window, dtype)


@implementations
def test_ragged_rows_padding_and_empty_rows(implementation: str) -> None:
    q, k, v = inputs(2, 3, 20, 30, 4, 2, 8)
    qp, kp = np.full((3, 20), -1), np.full((3, 30), -1)
    qp[0], kp[0] = np.arange(10, 30), np.arange(30)
    qp[1, :1], kp[1, :1] = 0, 0  # a row of length 1; row 2 has nothing at all
    check(implementation, q, k, v, qp, kp, None)


@implementations
@pytest.mark.parametrize("queries", [1, 4, 12])
def test_slots_may_be_in_any_order(implementation: str, queries: int) -> None:
    """A ring after it wrapped, as in decode and in verifying drafts."""
    q, k, v = inputs(3, 1, queries, 16, 4, 1, 8)
    kp = (np.arange(16) - 5) % 16 + 40
    check(implementation, q, k, v, kp.max() - np.arange(queries)[None, ::-1], kp[None], 9)


@implementations
def test_a_long_cache_is_read_in_blocks(implementation: str) -> None:
    q, k, v = inputs(4, 2, 1, 5000, 2, 2, 8)
    kp = np.where(np.arange(5000) < np.array([[4097], [3]]), np.arange(5000), -1)
    check(implementation, q, k, v, [[4096], [2]], kp, None)


def test_decode_reads_only_the_filled_blocks_of_a_long_cache() -> None:
    """What lies past them may be anything: even a weight of zero would let a NaN through."""
    q, k, v = (jnp.asarray(x) for x in inputs(5, 1, 1, 20_000, 4, 2, 8))
    filled = 4096  # a block of the XLA form
    slots = jnp.arange(20_000)[None]
    kp = jnp.where(slots < filled, slots, -1)
    qp = jnp.array([[filled - 1]])
    poisoned = (x.at[:, filled:].set(jnp.nan) for x in (k, v))
    have = attention(q, *poisoned, qp, kp, implementation="xla")
    want = attention(q, k[:, :filled], v[:, :filled], qp, kp[:, :filled], implementation="xla")
    np.testing.assert_allclose(have, want, rtol=0, atol=filled * 2.0**-22 * float(jnp.abs(v).max()))


def test_window_keeps_exactly_window_keys() -> None:
    """Values that are one-hot in their slot show which keys were averaged."""
    slots = 12
    q = k = jnp.zeros((1, slots, 1, slots))
    v = jnp.eye(slots)[None, :, None]
    positions = jnp.arange(slots)[None]
    out = attention(q, k, v, positions, positions, window=4)
    for t in range(slots):
        np.testing.assert_array_equal(np.flatnonzero(out[0, t, 0]), np.arange(max(0, t - 3), t + 1))


def test_work_of_a_sliding_layer_grows_with_the_window() -> None:
    """The blocks that a query block visits: counted where the program decides it."""
    from pallas_kernels.attention.xla import _needed

    newest = jnp.arange(64) * 512 + 511
    oldest = jnp.arange(64) * 512
    first, end = _needed(jnp.arange(20_000, 20_256)[None], oldest, newest, 512)
    assert int(end - first) == 2
    first, end = _needed(jnp.arange(20_000, 20_256)[None], oldest, newest, None)
    assert (int(first), int(end)) == (0, 40)


def test_memory_is_linear_in_the_length() -> None:
    def temporaries(length: int) -> int:
        def shape(*s: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(s, dtype)

        program = jax.jit(attention).lower(
            shape(1, length, 2, 64),
            shape(1, length, 1, 64),
            shape(1, length, 1, 64),
            shape(1, length, dtype=jnp.int32),
            shape(1, length, dtype=jnp.int32),
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) <= 4.5 * temporaries(4096)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((1, 2, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8), "multiple of K"),
        ((1, 2, 4, 8), (2, 4, 1, 8), (2, 4, 1, 8), "do not fit"),
        ((1, 2, 4, 8), (1, 4, 1, 16), (1, 4, 1, 16), "do not fit"),
        ((1, 2, 4, 8), (1, 4, 2, 8), (1, 4, 1, 8), r"v \(1, 4, 1, 8\) do not fit"),
        ((1, 2, 4, 8), (1, 4, 0, 8), (1, 4, 0, 8), "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(q: tuple, k: tuple, v: tuple, message: str) -> None:
    arrays = [jnp.zeros(shape) for shape in (q, k, v)]
    with pytest.raises(ValueError, match=message):
        attention(*arrays, jnp.zeros(q[:2], int), jnp.zeros(k[:2], int))


def test_an_unknown_implementation_is_refused() -> None:
    x, p = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1), int)
    with pytest.raises(ValueError, match=r"one .or several. of xla, mosaic, reference"):
        attention(x, x, x, p, p, implementation="cudnn")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("queries", "slots"), [(1, 96), (40, 96), (1, 1536), (300, 1536)])
def test_keys_in_pages_give_what_they_give_side_by_side(
    implementation: str, queries: int, slots: int
) -> None:
    """A few slots, which are gathered, and many, which are visited block by block; rows share a page."""
    page, rng = 16, np.random.default_rng(0)
    q, k, v = inputs(3, 2, queries, slots, 4, 2, 8)
    lengths = np.array([slots - 5, slots // 3])
    q_positions = lengths[:, None] - queries + np.arange(queries)
    kv_positions = np.where(np.arange(slots) < lengths[:, None], np.arange(slots), -1)
    k[1, :page], v[1, :page] = k[0, :page], v[0, :page]
    count = slots // page
    pages = rng.permutation(2 * count).reshape(2, count)
    pools = [np.full((2 * count, page, 2, 8), np.nan, np.float32) for _ in range(2)]
    for pool, x in zip(pools, (k, v), strict=True):
        pool[pages] = x.reshape(2, count, page, 2, 8)
    pages[1, 0] = pages[0, 0]
    positions = (jnp.asarray(q_positions), jnp.asarray(kv_positions))
    have = attention(
        jnp.asarray(q),
        *map(jnp.asarray, pools),
        *positions,
        pages=jnp.asarray(pages),
        implementation=implementation,
    )
    want = definition(q, k, v, q_positions, kv_positions, None)
    assert np.abs(np.asarray(have) - want).max() <= slots * 2.0**-22


def test_pages_that_do_not_fit_are_refused() -> None:
    q, k, v = (jnp.asarray(x) for x in inputs(0, 2, 1, 16, 2, 1, 8))
    positions = jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 32), jnp.int32)
    with pytest.raises(ValueError, match="pages has shape"):
        attention(q, k, v, *positions, pages=jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(ValueError, match="kv_positions"):
        attention(q, k, v, *positions, pages=jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="lie in pages"):
        attention(
            q.astype(jnp.bfloat16),
            k,
            v,
            *positions,
            pages=jnp.zeros((2, 2), jnp.int32),
            implementation="mosaic",
        )
