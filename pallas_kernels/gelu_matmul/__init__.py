"""``gelu_matmul``: a product, GELU, and what it gates, as a per-layer embedding is gated into the residual stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def gelu_matmul(
    x: jax.Array,
    w: Weight,
    factor: jax.Array,
    *,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Computes ``y = gelu(x @ w.T) * factor``; GELU is its tanh form.

    Args:
        x: floating point ``[..., K]``.
        w: ``[N, K]``, a quantized array or a plain floating-point one.
        factor: float32 ``[..., N]``.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of the
            table that can serve the call.

    Returns:
        ``[..., N]`` in the type of x; sums, factor and GELU are float32.

    Raises:
        ValueError: wrong types or shapes, or the named implementation cannot serve the call.
    """
    dispatch.check_floating("gelu_matmul", "x", x)
    dispatch.check_weight("gelu_matmul", w, ndim=2)
    if x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"gelu_matmul: x {x.shape} and w {w.shape}: expected [..., K], [N, K]")
    if factor.dtype != jnp.float32 or factor.shape != (*x.shape[:-1], w.shape[0]):
        raise ValueError(
            f"gelu_matmul: factor is {factor.dtype}{list(factor.shape)}: "
            f"expected float32{[*x.shape[:-1], w.shape[0]]}"
        )
    module = dispatch.choose("gelu_matmul", IMPLEMENTATIONS, implementation, x, w, factor)
    return module.gelu_matmul(x, w, factor)
