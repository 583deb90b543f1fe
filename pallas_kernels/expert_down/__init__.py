"""``expert_down``: the outputs of a token's experts, added up with the token's weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def expert_down(
    h: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    weights: jax.Array,
    *,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Computes ``y[t] = sum_j weights[t, j] * w[expert_ids[t, j]] @ h[t, j]``.

    Args:
        h: floating point ``[T, J, F]``.
        w: ``[E, N, F]``, a quantized array or a plain floating-point one.
        expert_ids: integers ``[T, J]``; those outside 0..E-1 are clipped to it.
        weights: float32 ``[T, J]``.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of
            the table that can serve the call.

    Returns:
        float32 ``[T, N]``, sums carried in float32, in an order that depends on shapes alone.

    Raises:
        ValueError: wrong types or shapes, or the named implementation cannot serve the call.
    """
    dispatch.check_floating("expert_down", "h", h)
    dispatch.check_weight("expert_down", w, ndim=3)
    if h.ndim != 3 or h.shape[-1] != w.shape[-1]:
        raise ValueError(f"expert_down: h {h.shape} and w {w.shape}: expected [T, J, F], [E, N, F]")
    if not jnp.issubdtype(expert_ids.dtype, jnp.integer) or expert_ids.shape != h.shape[:2]:
        raise ValueError(
            f"expert_down: expert_ids is {expert_ids.dtype}{list(expert_ids.shape)}: "
            f"expected int32{list(h.shape[:2])}, the experts of each row of h"
        )
    if weights.dtype != jnp.float32 or weights.shape != h.shape[:2]:
        raise ValueError(
            f"expert_down: weights is {weights.dtype}{list(weights.shape)}: "
            f"expected float32{list(h.shape[:2])}"
        )
    expert_ids = jnp.clip(expert_ids.astype(jnp.int32), 0, w.shape[0] - 1)
    args = (h, w, expert_ids, weights)
    module = dispatch.choose("expert_down", IMPLEMENTATIONS, implementation, *args)
    return module.expert_down(*args)
