"""``expert_matmul``: each row of x times the matrix of its own expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def expert_matmul(
    x: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    *,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Computes ``y[m, n] = sum_k x[m, k] * w[expert_ids[m], n, k]``.

    Args:
        x: floating point ``[M, K]``.
        w: ``[E, N, K]``, a quantized array or a plain floating-point one.
        expert_ids: integers ``[M]``; those outside 0..E-1 are clipped to it.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of
            the table that can serve the call.

    Returns:
        float32 ``[M, N]``, sums carried in float32.

    Raises:
        ValueError: wrong types or shapes, or the named implementation cannot serve the call.
    """
    dispatch.check_floating("expert_matmul", "x", x)
    dispatch.check_weight("expert_matmul", w, ndim=3)
    if x.ndim != 2 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"expert_matmul: x {x.shape} and w {w.shape}: expected [M, K], [E, N, K]")
    if not jnp.issubdtype(expert_ids.dtype, jnp.integer) or expert_ids.shape != x.shape[:1]:
        raise ValueError(
            f"expert_matmul: expert_ids is {expert_ids.dtype}{list(expert_ids.shape)}: "
            f"expected int32[{x.shape[0]}], one expert per row of x"
        )
    expert_ids = jnp.clip(expert_ids.astype(jnp.int32), 0, w.shape[0] - 1)
    module = dispatch.choose("expert_matmul", IMPLEMENTATIONS, implementation, x, w, expert_ids)
    return module.expert_matmul(x, w, expert_ids)
