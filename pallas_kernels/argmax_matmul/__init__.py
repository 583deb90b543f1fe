"""``argmax_matmul``: which row of a matrix has the largest product with x, as greedy decoding asks of the head."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.packed import Weight

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


def argmax_matmul(
    x: jax.Array, w: Weight, *, implementation: dispatch.Implementation = None
) -> jax.Array:
    """Computes ``argmax_n sum_k x[..., k] * w[n, k]``, the lowest n among equals.

    What is monotonic leaves it as it is: a positive scale per row of x, a soft cap.

    Args:
        x: floating point ``[..., K]``, without NaN.
        w: ``[N, K]``, a quantized array or a plain floating-point one.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of the
            table that can serve the call.

    Returns:
        int32 ``[...]``; sums are carried in float32.

    Raises:
        ValueError: wrong type or number of axes, K differs, or the named implementation cannot serve the call.
    """
    dispatch.check_floating("argmax_matmul", "x", x)
    dispatch.check_weight("argmax_matmul", w, ndim=2)
    if x.ndim < 1 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"argmax_matmul: x {x.shape} and w {w.shape} differ in their last axis")
    module = dispatch.choose("argmax_matmul", IMPLEMENTATIONS, implementation, x, w)
    return module.argmax_matmul(x, w)
