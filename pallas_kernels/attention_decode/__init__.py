"""``attention_decode``: from the product of the next tokens with W_qkv to attention's result, the cache updated."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")

Pair = tuple[jax.Array, jax.Array]


class Heads(NamedTuple):
    """H query heads, and how many heads of keys and of values the product has: K, or 0 where it has none of its own."""

    queries: int
    keys: int
    values: int


def attention_decode(
    qkv: jax.Array,
    norms: tuple[jax.Array, jax.Array | None],
    rope: Pair,
    cache: Pair,
    positions: jax.Array,
    *,
    heads: int,
    window: int | None = None,
    pages: jax.Array | None = None,
    eps: float = 1e-6,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, Pair]:
    """Norms and rotates queries and keys, norms values, takes keys and values into the cache, and attends to it.

    With ``norm(x) = x / sqrt(mean(x**2) + eps)`` over a head, ``q = rope(norm(q) * q_norm)``,
    ``k = rope(norm(k) * k_norm)`` and ``v = norm(v)``; then ``out[t] = sum_s softmax_s(q[t] . k[s]) v[s]`` over the
    slots s that query t sees. Query head h reads KV head ``h // (H / K)``. The logit scale is 1.

    The cache is a ring: position p lies in slot ``p % S``, so that a row whose last position is p holds the S positions
    up to p. A query at position p sees what is held of ``[0, p]`` and, with a window, of ``(p - window, p]``.

    Args:
        qkv: float32 ``[B, T, (H + 2 K) C]``, heads of q, then of k, then of v; ``(H + K) C`` where v is k before its
            norm; ``H C`` where the cache has these positions already and stays as it is.
        norms: q_norm and k_norm ``[C]``; k_norm is None if the product has no k.
        rope: cosines and sines, float32 ``[B, T, C / 2]``; pairs are (j, j + C / 2).
        cache: keys and values ``[B, S, K, C]``, or ``[P, page, K, C]`` with `pages`. Donate them: they are then updated
            in place.
        positions: int32 ``[B, T]``, each row's next positions in order, then -1 for padding, whose output is zero and
            which changes nothing.
        heads: H.
        window: how many positions a query looks back, or None for all; at most S, and at most ``S - T + 1`` for T > 1:
            what the last query's position overwrites the first must not miss.
        pages: int32 ``[B, N]``, for a cache in pages: ``S = N page``, and slot s of row b is slot ``s % page`` of page
            ``pages[b, s // page]``. Rows may share pages to which neither writes. What is named beyond a row's last
            position need not exist.
        eps: of the norms.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of
            the table that can serve the call.

    Returns:
        ``[B, T, H C]`` of the cache's type, soft-max and sums in float32, and the cache.

    Raises:
        ValueError: shapes that do not fit together, or the named implementation cannot serve the call.
    """
    _check(qkv, norms, rope, cache, positions, heads, window, pages)
    args = (qkv, rope, cache, positions, heads, pages)
    module = dispatch.choose("attention_decode", IMPLEMENTATIONS, implementation, *args)
    return module.attention_decode(
        qkv, norms, rope, cache, positions, heads=heads, window=window, pages=pages, eps=eps
    )


def has_kernel(
    qkv: jax.Array,
    rope: Pair,
    cache: Pair,
    positions: jax.Array,
    heads: int,
    implementation: dispatch.Implementation,
    pages: jax.Array | None = None,
) -> bool:
    """Whether another implementation than XLA's would serve the call: without one, prompts' separate ops do as well."""
    args = (qkv, rope, cache, positions, heads, pages)
    module = dispatch.choose("attention_decode", IMPLEMENTATIONS, implementation, *args)
    return module is not IMPLEMENTATIONS["xla"]


def heads_of(qkv: jax.Array, cache: Pair, heads: int) -> Heads:
    """Which heads the product has."""
    _, _, kv_heads, head_dim = cache[0].shape
    beside = qkv.shape[-1] // head_dim - heads
    return Heads(heads, min(beside, kv_heads), max(0, beside - kv_heads))


def _check(
    qkv: jax.Array,
    norms: tuple[jax.Array, jax.Array | None],
    rope: Pair,
    cache: Pair,
    positions: jax.Array,
    heads: int,
    window: int | None,
    pages: jax.Array | None,
) -> None:
    keys, values = cache
    dispatch.check_floating("attention_decode", "qkv", qkv)
    dispatch.check_floating("attention_decode", "keys", keys)
    if keys.ndim != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"attention_decode: cache has {keys.dtype} {keys.shape} and {values.dtype} {values.shape}: expected twice "
            "[B, S, K, C] of one type"
        )
    batch, slots, kv_heads, head_dim = keys.shape
    if pages is not None:
        if pages.ndim != 2 or not jnp.issubdtype(pages.dtype, jnp.integer):
            raise ValueError(
                f"attention_decode: pages is {pages.dtype} {pages.shape}: expected integers [B, N]"
            )
        batch, slots = pages.shape[0], pages.shape[1] * slots
    widths = {head_dim * (heads + n * kv_heads): n for n in (0, 1, 2)}
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"attention_decode: heads = {heads}: expected a multiple of {kv_heads} KV heads"
        )
    if qkv.ndim != 3 or qkv.shape[0] != batch or qkv.shape[2] not in widths:
        raise ValueError(
            f"attention_decode: qkv has shape {qkv.shape}: expected [{batch}, T, N] with N one of "
            f"{', '.join(map(str, widths))}"
        )
    queries = qkv.shape[1]
    expected = {
        "positions": (positions, (batch, queries)),
        "cosines": (rope[0], (batch, queries, head_dim // 2)),
        "sines": (rope[1], (batch, queries, head_dim // 2)),
        "q_norm": (norms[0], (head_dim,)),
    }
    if norms[1] is not None:
        expected["k_norm"] = (norms[1], (head_dim,))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"attention_decode: {name} has shape {array.shape}: expected {shape}")
    if (norms[1] is None) != (widths[qkv.shape[2]] == 0):
        raise ValueError(
            "attention_decode: k_norm is "
            + ("None, but the product has keys" if norms[1] is None else "given without keys")
        )
    most = slots - queries + 1
    if window is not None and not 1 <= window <= most:
        raise ValueError(
            f"attention_decode: window is {window}: expected None or 1 to {most} for {queries} queries over "
            f"{slots} slots"
        )
