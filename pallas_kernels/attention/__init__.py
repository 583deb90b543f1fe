"""``attention``: grouped-query attention of queries over keys and values whose positions are given."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    *,
    window: int | None = None,
    pages: jax.Array | None = None,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Computes ``out[t] = sum_s softmax_s(q[t] . k[s]) v[s]`` over the slots s that query t sees.

    A query at position p sees the slots whose position lies in ``[0, p]`` and, with a window, in ``(p - window, p]``:
    at most `window` keys, itself among them. Query head h reads KV head ``h // (H / K)``. The logit scale is 1.

    Args:
        q: ``[B, T, H, C]``.
        k, v: ``[B, S, K, C]``, in any type; with `pages` a pool ``[P, page, K, C]`` that the rows share.
        q_positions: int32 ``[B, T]``; a negative one is padding and its output is zero.
        kv_positions: int32 ``[B, S]``, in any order; a negative one is an empty slot.
        pages: int32 ``[B, n]``, or None: slot s of row b is then ``k[pages[b, s // page], s % page]``, and S = n * page
            (Kwon et al., arXiv:2309.06180). All entries lie in ``[0, P)``; those without a position are not looked at.
        window: how many positions a query looks back, or None for all.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of
            the table that can serve the call.

    Returns:
        ``[B, T, H, C]`` of q's type; soft-max and sums in float32.

    Raises:
        ValueError: shapes that do not fit together, or the named implementation cannot serve the call.
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        dispatch.check_floating("attention", name, array)
    fits = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and (pages is not None or q.shape[0] == k.shape[0])
        and q.shape[3] == k.shape[3]
        and k.shape[2] > 0
        and q.shape[2] % k.shape[2] == 0
    )
    if not fits:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit: expected [B, T, H, C] and twice "
            "[B, S, K, C] with H a multiple of K"
        )
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != q.shape[0]):
        raise ValueError(f"attention: pages has shape {pages.shape}; expected [{q.shape[0]}, n]")
    slots = k.shape[:2] if pages is None else (pages.shape[0], pages.shape[1] * k.shape[1])
    for name, positions, expected in (("q", q_positions, q.shape[:2]), ("kv", kv_positions, slots)):
        if positions.shape != expected:
            raise ValueError(
                f"attention: {name}_positions {positions.shape} differ from {name}'s first axes {expected}"
            )
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; expected None or at least 1")
    args = (q, k, v, q_positions, kv_positions)
    module = dispatch.choose("attention", IMPLEMENTATIONS, implementation, *args, pages)
    # Those that cannot read pages have no word for them.
    paged = {} if pages is None else {"pages": pages}
    return module.attention(*args, window=window, **paged)
