"""``quantized_matmul``: x @ w.T for weights [N, K] in any format, rows along K."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def quantized_matmul(
    x: jax.Array, w: Weight, *, implementation: dispatch.Implementation = None
) -> jax.Array:
    """Computes ``y[..., n] = sum_k x[..., k] * w[n, k]``.

    Args:
        x: floating point ``[..., K]``.
        w: ``[N, K]``, a quantized array or a plain floating-point one.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of
            the table that can serve the call.

    Returns:
        float32 ``[..., N]``, sums carried in float32.

    Raises:
        ValueError: wrong type or number of axes, K differs, or the named implementation cannot serve the call.
    """
    dispatch.check_floating("quantized_matmul", "x", x)
    dispatch.check_weight("quantized_matmul", w, ndim=2)
    if x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"quantized_matmul: x {x.shape} and w {w.shape} differ in their last axis")
    module = dispatch.choose("quantized_matmul", IMPLEMENTATIONS, implementation, x, w)
    return module.quantized_matmul(x, w)
