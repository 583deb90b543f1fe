"""Attention: every implementation against a float64 numpy definition.

Tolerance: a float32 soft-max average of values of order one is off by a few rounding errors (2**-24) per term of a
sum of S terms, so S * 2**-22 bounds it; bfloat16 inputs and weights round at 2**-9, and 4 of those bound the average.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import IMPLEMENTATIONS, attention
from pallas_kernels.attention.cases import CASES

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def definition(
    q: np.ndarray, kv: np.ndarray, qp: np.ndarray, kp: np.ndarray, window: int | None
) -> np.ndarray:
    q, kv = q.astype(np.float64), kv.astype(np.float64)
    batch, queries, heads, _ = q.shape
    kv_heads = kv.shape[2] // 2
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
                scores = kv[b, seen, head] @ q[b, t, h]
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ kv[b, seen, kv_heads + head] / weights.sum()
    return out


def inputs(seed: int, b: int, t: int, s: int, h: int, k: int, c: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((b, t, h, c), dtype=np.float32)
    kv = rng.standard_normal((b, s, 2 * k, c), dtype=np.float32) / np.float32(c**0.25)
    return q, kv


def check(
    implementation: str,
    q: np.ndarray,
    kv: np.ndarray,
    qp: np.ndarray,
    kp: np.ndarray,
    window: int | None,
    dtype: jnp.dtype = jnp.float32,
) -> None:
    q, kv = (np.asarray(jnp.asarray(x, dtype)) for x in (q, kv))
    have = attention(
        jnp.asarray(q),
        jnp.asarray(kv),
        jnp.asarray(qp, jnp.int32),
        jnp.asarray(kp, jnp.int32),
        window=window,
        implementation=implementation,
    )
    assert have.dtype == dtype
    tolerance = kv.shape[1] * 2.0**-22 if dtype == jnp.float32 else 4 * 2.0**-9
    largest = np.abs(kv.astype(np.float64)).max()
    want = definition(q, kv, np.asarray(qp), np.asarray(kp), window)
    np.testing.assert_allclose(np.asarray(have, np.float64), want, rtol=0, atol=tolerance * largest)


@implementations
@pytest.mark.parametrize("name", CASES)
def test_decode_of_every_gemma_shape(implementation: str, name: str) -> None:
    heads, kv_heads, head_dim, window = CASES[name]
    q, kv = inputs(0, 2, 1, 40, heads, kv_heads, head_dim)
    check(implementation, q, kv, [[39], [11]], np.tile(np.arange(40), (2, 1)), window and 16)


@implementations
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 64, 255, 256, 257, 5000])
def test_prefill_around_block_and_window_edges(
    implementation: str, dtype: jnp.dtype, window: int | None
) -> None:
    """600 queries and keys: two and a bit blocks of queries, one and a bit of keys."""
    q, kv = inputs(1, 1, 600, 600, 2, 1, 8)
    positions = np.arange(600)[None]
    check(implementation, q, kv, positions, positions, window, dtype)


@implementations
def test_ragged_rows_padding_and_empty_rows(implementation: str) -> None:
    q, kv = inputs(2, 3, 20, 30, 4, 2, 8)
    qp, kp = np.full((3, 20), -1), np.full((3, 30), -1)
    qp[0], kp[0] = np.arange(10, 30), np.arange(30)
    qp[1, :1], kp[1, :1] = 0, 0  # a row of length 1; row 2 has nothing at all
    check(implementation, q, kv, qp, kp, None)


@implementations
@pytest.mark.parametrize("queries", [1, 4, 12])
def test_slots_may_be_in_any_order(implementation: str, queries: int) -> None:
    """A ring after it wrapped, as in decode and in verifying drafts."""
    q, kv = inputs(3, 1, queries, 16, 4, 1, 8)
    kp = (np.arange(16) - 5) % 16 + 40
    check(implementation, q, kv, kp.max() - np.arange(queries)[None, ::-1], kp[None], 9)


@implementations
def test_a_long_cache_is_read_in_blocks(implementation: str) -> None:
    q, kv = inputs(4, 2, 1, 5000, 2, 2, 8)
    kp = np.where(np.arange(5000) < np.array([[4097], [3]]), np.arange(5000), -1)
    check(implementation, q, kv, [[4096], [2]], kp, None)


def test_window_keeps_exactly_window_keys() -> None:
    """Values that are one-hot in their slot show which keys were averaged."""
    slots = 12
    kv = np.zeros((1, slots, 2, slots), np.float32)
    kv[0, :, 1] = np.eye(slots)
    q = np.zeros((1, slots, 1, slots), np.float32)
    positions = jnp.arange(slots)[None]
    out = attention(jnp.asarray(q), jnp.asarray(kv), positions, positions, window=4)
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
            shape(1, length, 2, 64),
            shape(1, length, dtype=jnp.int32),
            shape(1, length, dtype=jnp.int32),
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) <= 4.5 * temporaries(4096)


@pytest.mark.parametrize(
    ("q", "kv", "message"),
    [
        ((1, 2, 3, 8), (1, 4, 4, 8), "multiple of K"),
        ((1, 2, 4, 8), (2, 4, 2, 8), "do not fit"),
        ((1, 2, 4, 8), (1, 4, 2, 16), "do not fit"),
        ((1, 2, 4, 8), (1, 4, 3, 8), "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(q: tuple, kv: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(jnp.zeros(q), jnp.zeros(kv), jnp.zeros(q[:2], int), jnp.zeros(kv[:2], int))


def test_an_unknown_implementation_is_refused() -> None:
    q, kv, p = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 2, 2)), jnp.zeros((1, 1), int)
    with pytest.raises(ValueError, match="expected None or one of xla, reference"):
        attention(q, kv, p, p, implementation="cudnn")
