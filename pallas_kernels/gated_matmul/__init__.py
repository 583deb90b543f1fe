"""``gated_matmul``: the hidden activations of a gated FFN."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def gated_matmul(
    x: jax.Array,
    w: Weight,
    scale: jax.Array,
    *,
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """Computes ``h = gelu(scale * (x @ gate.T)) * scale * (x @ up.T)``.

    gate is the first F rows of w, up the others; GELU is its tanh form.

    Args:
        x: floating point ``[..., K]``.
        w: ``[2 F, K]``, a quantized array or a plain floating-point one.
        scale: float32 ``[..., 1]``, what a norm of x left for after the product.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of the
            table that can serve the call.

    Returns:
        ``[..., F]`` in the type of x; sums, scale and GELU are float32.

    Raises:
        ValueError: wrong types or shapes, or the named implementation cannot serve the call.
    """
    dispatch.check_floating("gated_matmul", "x", x)
    dispatch.check_weight("gated_matmul", w, ndim=2)
    if x.ndim < 1 or x.shape[-1] != w.shape[-1] or w.shape[0] % 2:
        raise ValueError(f"gated_matmul: x {x.shape} and w {w.shape}: expected [..., K], [2 F, K]")
    if scale.dtype != jnp.float32 or scale.shape != (*x.shape[:-1], 1):
        raise ValueError(
            f"gated_matmul: scale is {scale.dtype}{list(scale.shape)}: "
            f"expected float32{[*x.shape[:-1], 1]}"
        )
    module = dispatch.choose("gated_matmul", IMPLEMENTATIONS, implementation, x, w, scale)
    return module.gated_matmul(x, w, scale)
