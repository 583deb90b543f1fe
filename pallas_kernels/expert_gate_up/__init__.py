"""``expert_gate_up``: the hidden activations of a gated FFN, for each token and each of its experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def expert_gate_up(
    x: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    scale: jax.Array,
    *,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Computes ``h[t, j] = gelu(scale[t] * (gate @ x[t])) * scale[t] * (up @ x[t])``.

    gate is the first F rows of ``w[expert_ids[t, j]]``, up the others; GELU is its tanh form.

    Args:
        x: floating point ``[T, K]``.
        w: ``[E, 2 F, K]``, a quantized array or a plain floating-point one.
        expert_ids: integers ``[T, J]``; those outside 0..E-1 are clipped to it.
        scale: float32 ``[T]``, what a norm of x left for after the product.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of
            the table that can serve the call.

    Returns:
        ``[T, J, F]`` in the type of x; sums, scale and GELU are float32.

    Raises:
        ValueError: wrong types or shapes, or the named implementation cannot serve the call.
    """
    dispatch.check_floating("expert_gate_up", "x", x)
    dispatch.check_weight("expert_gate_up", w, ndim=3)
    if x.ndim != 2 or x.shape[-1] != w.shape[-1] or w.shape[1] % 2:
        raise ValueError(
            f"expert_gate_up: x {x.shape} and w {w.shape}: expected [T, K], [E, 2 F, K]"
        )
    if (
        not jnp.issubdtype(expert_ids.dtype, jnp.integer)
        or expert_ids.ndim != 2
        or len(expert_ids) != len(x)
    ):
        raise ValueError(
            f"expert_gate_up: expert_ids is {expert_ids.dtype}{list(expert_ids.shape)}: "
            f"expected int32[{len(x)}, J]"
        )
    if scale.dtype != jnp.float32 or scale.shape != x.shape[:1]:
        raise ValueError(
            f"expert_gate_up: scale is {scale.dtype}{list(scale.shape)}: expected float32[{len(x)}]"
        )
    expert_ids = jnp.clip(expert_ids.astype(jnp.int32), 0, w.shape[0] - 1)
    args = (x, w, expert_ids, scale)
    module = dispatch.choose("expert_gate_up", IMPLEMENTATIONS, implementation, *args)
    return module.expert_gate_up(*args)
