"""Attention in plain XLA: all keys at once for a few queries, an online softmax over blocks of keys for many.

The blocked form never holds more than ``[B, H, block_q, block_k]`` scores, so its memory is O(T), and visits only
blocks that some query of the block can see: the work of a sliding layer grows with T * window, that of a global layer
with the filled part of the cache and not with its capacity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.reference import gathered, visible

_NO_SCORE = -1e30  # finite, so that a query which sees nothing gives 0 / 1 and not NaN
_DIRECT_QUERIES = 8
_DIRECT_SLOTS = 4096
_FEW_KV_HEADS = 2
_BLOCK_Q = 256
_BLOCK_K = 512


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    *,
    window: int | None,
    pages: jax.Array | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.attention`."""
    # Pages are copied to be multiplied: all of them only where they are few.
    most = _DIRECT_SLOTS if pages is None else _BLOCK_K
    if q.shape[1] <= _DIRECT_QUERIES and kv_positions.shape[1] <= most:
        if pages is not None:
            k, v = gathered(k, pages), gathered(v, pages)
        return _direct(q, k, v, visible(q_positions, kv_positions, window))
    return _blocked(q, k, v, q_positions, kv_positions, window, pages)


def why_not(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    pages: jax.Array | None = None,
) -> str | None:
    """XLA serves every call."""
    return None


def _grouped(q: jax.Array, k: jax.Array) -> jax.Array:
    """Query heads by the KV head they read: ``[B, T, K, G, C]`` in the type the product runs in."""
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    return q.astype(k.dtype).reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)


def _direct(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """All keys at once: a product, a soft-max and a product, three kernels on a GPU."""
    if q.shape[0] == q.shape[1] == 1 and k.shape[2] <= _FEW_KV_HEADS:
        return lax.platform_dependent(
            q, k, v, seen, cpu=_direct_in_cache_order, default=_direct_by_head
        )
    return _direct_by_head(q, k, v, seen)


def _direct_by_head(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    grouped = _grouped(q, k)
    to_scores, to_values, mask = "BTKGC,BSKC->BKGTS", "BKGTS,BSKC->BTKGC", seen[:, None, None]
    if q.shape[0] == q.shape[1] == 1:
        grouped, k, v, mask = grouped[0, 0], k[0], v[0], seen[0]
        to_scores, to_values = "KGC,SKC->KGS", "KGS,SKC->KGC"
    einsum = _einsum(k.dtype)
    weights = _softmax(einsum(to_scores, grouped, k), mask)
    return einsum(to_values, weights.astype(v.dtype), v).reshape(q.shape).astype(q.dtype)


def _direct_in_cache_order(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """`_direct_by_head` for one query, with every query head multiplied by every KV head and the others' left out.

    XLA:CPU copies keys and values into another order for a batched product at every step. As two plain products over
    the cache as it lies, with K times the work, it is 2.5 to 3.6 times faster for one or two KV heads.
    """
    _, slots, kv_heads, head_dim = k.shape
    k, v = lax.optimization_barrier((k, v))  # otherwise XLA transposes the cache and not the scores
    einsum = _einsum(k.dtype)
    scores = einsum("XC,HC->XH", k.reshape(-1, head_dim), q[0, 0].astype(k.dtype))
    own = jnp.arange(kv_heads)
    by_head = scores.reshape(slots, kv_heads, kv_heads, -1)[:, own, own]  # [S, K, G]
    weights = _softmax(jnp.moveaxis(by_head, 0, -1), seen[0])
    spread = jnp.where(own == own[:, None, None, None], weights[..., None], 0.0)  # [K, G, S, K]
    spread = spread.reshape(-1, slots * kv_heads).astype(v.dtype)
    return einsum("HX,XC->HC", spread, v.reshape(-1, head_dim)).reshape(q.shape).astype(q.dtype)


def _einsum(dtype: jnp.dtype) -> Callable[..., jax.Array]:
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Over the last axis, where `mask` is true; a query that sees nothing gets zeros."""
    weights = jax.nn.softmax(jnp.where(mask, scores, _NO_SCORE), axis=-1)
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, 0.0)


def _empty(q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Online-softmax state before any key: running maximum and sum ``[B, T, H]``, weighted values ``[B, T, H, C]``."""
    return (
        jnp.full(q.shape[:3], _NO_SCORE, jnp.float32),
        jnp.zeros(q.shape[:3], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def _accumulate(
    state: tuple[jax.Array, jax.Array, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes one block of keys into the online softmax (Milakov and Gimelshein, arXiv:1805.02867)."""
    highest, total, values = state
    precision = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "BTKGC,BSKC->BTKGS", q, k, preferred_element_type=jnp.float32, precision=precision
    )
    mask = seen[:, :, None, None, :]
    scores = jnp.where(mask, scores, _NO_SCORE)
    shape = highest.shape
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1).reshape(shape))
    weights = jnp.where(
        mask, jnp.exp(scores - new_highest.reshape(scores.shape[:-1])[..., None]), 0.0
    )
    rescale = jnp.exp(highest - new_highest)
    block = jnp.einsum(
        "BTKGS,BSKC->BTKGC",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=precision,
    )
    total = total * rescale + jnp.sum(weights, axis=-1).reshape(shape)
    return new_highest, total, values * rescale[..., None] + block.reshape(values.shape)


def _finish(state: tuple[jax.Array, jax.Array, jax.Array], q: jax.Array) -> jax.Array:
    _, total, values = state
    return (values / jnp.where(total == 0.0, 1.0, total)[..., None]).astype(q.dtype)


def _blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    window: int | None,
    pages: jax.Array | None,
) -> jax.Array:
    batch, queries = q.shape[:2]
    block_q = min(_BLOCK_Q, queries)
    q, q_positions = _pad(q, block_q, 0), _pad(q_positions, block_q, -1)
    if pages is None:
        # A few queries take long blocks: what a block costs them is its launches.
        block_k = min(_DIRECT_SLOTS if queries <= _DIRECT_QUERIES else _BLOCK_K, k.shape[1])
        k, v = _pad(k, block_k, 0), _pad(v, block_k, 0)
    else:
        block_k = k.shape[1] * min(max(1, _BLOCK_K // k.shape[1]), pages.shape[1])
        pages = _pad(pages, block_k // k.shape[1], 0)
    kv_positions = _pad(kv_positions, block_k, -1)
    key_blocks = kv_positions.reshape(batch, -1, block_k)
    newest = jnp.max(key_blocks, axis=(0, 2))
    oldest = jnp.min(jnp.where(key_blocks < 0, jnp.iinfo(jnp.int32).max, key_blocks), axis=(0, 2))

    def key_block(x: jax.Array, i: jax.Array) -> jax.Array:
        if pages is None:
            return lax.dynamic_slice_in_dim(x, i * block_k, block_k, axis=1)
        count = block_k // x.shape[1]
        return gathered(x, lax.dynamic_slice_in_dim(pages, i * count, count, axis=1))

    def one_query_block(start: jax.Array) -> jax.Array:
        q_block = lax.dynamic_slice_in_dim(q, start, block_q, axis=1)
        positions = lax.dynamic_slice_in_dim(q_positions, start, block_q, axis=1)
        grouped = _grouped(q_block, k)
        first, end = _needed(positions, oldest, newest, window)

        def one_key_block(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            slots = lax.dynamic_slice_in_dim(kv_positions, i * block_k, block_k, axis=1)
            seen = visible(positions, slots, window)
            return _accumulate(state, grouped, key_block(k, i), key_block(v, i), seen)

        return _finish(lax.fori_loop(first, end, one_key_block, _empty(q_block)), q_block)

    starts = jnp.arange(0, q.shape[1], block_q, dtype=jnp.int32)
    blocks = lax.map(one_query_block, starts)  # [blocks, B, block_q, H, C]
    return jnp.moveaxis(blocks, 0, 1).reshape(q.shape)[:, :queries]


def _needed(
    positions: jax.Array, oldest: jax.Array, newest: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """First and one-past-last key block that some query at `positions` may see."""
    highest = jnp.max(positions)
    lowest = jnp.min(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions))
    needed = (newest >= 0) & (oldest <= highest)
    if window is not None:
        needed &= newest > lowest - window
    blocks = needed.shape[0]
    end = jnp.max(jnp.where(needed, jnp.arange(1, blocks + 1), 0))
    return jnp.minimum(jnp.argmax(needed), end), end


def _pad(x: jax.Array, block: int, value: int) -> jax.Array:
    """Pads axis 1 to a multiple of `block`."""
    missing = -x.shape[1] % block
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)
