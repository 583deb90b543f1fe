"""``embedding_lookup``: rows of a table [V, K] in any format."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "reference")


def embedding_lookup(
    w: Weight, ids: jax.Array, *, implementation: dispatch.Implementation = None
) -> jax.Array:
    """Computes ``y[..., k] = w[ids[...], k]``.

    Args:
        w: ``[V, K]``, a quantized array or a plain floating-point one.
        ids: integers ``[...]``; those outside 0..V-1 are clipped to it.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of
            the table that can serve the call.

    Returns:
        float32 ``[..., K]``.

    Raises:
        ValueError: wrong type or number of axes, or the named implementation cannot serve the call.
    """
    dispatch.check_weight("embedding_lookup", w, ndim=2)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"embedding_lookup: ids has dtype {ids.dtype}: expected integers")
    ids = jnp.clip(ids.astype(jnp.int32), 0, w.shape[0] - 1)
    module = dispatch.choose("embedding_lookup", IMPLEMENTATIONS, implementation, w, ids)
    return module.embedding_lookup(w, ids)
