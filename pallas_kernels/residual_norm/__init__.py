"""``residual_norm``: what a block has computed goes into the residual stream, and norms of that into the next block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import dispatch

IMPLEMENTATIONS = dispatch.Table(__name__, "xla", "mosaic", "reference")


@struct.dataclass
class Pending:
    """A residual stream and what is still to be done to it: ``(h + outer(sum_i norm(y_i) * weight_i)) * scalar``.

    ``norm(v) = v / sqrt(mean(v**2) + eps)`` over the last axis, and ``outer(z) = norm(z) * outer``, or z without it.

    Attributes:
      h: float32 ``[..., D]``.
      branches: pairs of y_i float32 ``[..., D]`` and weight_i ``[D]``; none where nothing is added.
      outer: ``[D]``, or None.
      scalar: float32 ``[1]``, or None for 1.
    """

    h: jax.Array
    branches: tuple[tuple[jax.Array, jax.Array], ...] = ()
    outer: jax.Array | None = None
    scalar: jax.Array | None = None


def residual_norm(
    stream: Pending,
    norms: tuple[jax.Array | None, ...],
    *,
    dtype: Any,
    eps: float = 1e-6,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Computes ``h``, the stream with everything done to it, and ``norm(h) * weight`` for each weight of `norms`.

    Args:
        stream: see `Pending`.
        norms: weights ``[D]``; None for h itself.
        dtype: of the norms.
        eps: of all norms.
        implementation: a name in ``IMPLEMENTATIONS``, or several in order of preference; None takes the first of the
            table that can serve the call.

    Returns:
        float32 ``[..., D]``, and as many arrays ``[..., D]`` of `dtype` as there are norms; everything between is
        float32.

    Raises:
        ValueError: shapes or types that do not fit together, or the named implementation cannot serve the call.
    """
    _check(stream, norms)
    module = dispatch.choose("residual_norm", IMPLEMENTATIONS, implementation, stream, norms, dtype)
    return module.residual_norm(stream, norms, dtype=dtype, eps=eps)


def has_kernel(
    stream: Pending,
    norms: tuple[jax.Array | None, ...],
    dtype: Any,
    implementation: dispatch.Implementation,
) -> bool:
    """Whether another implementation than XLA's would serve the call."""
    args = (stream, norms, dtype)
    module = dispatch.choose("residual_norm", IMPLEMENTATIONS, implementation, *args)
    return module is not IMPLEMENTATIONS["xla"]


def _check(stream: Pending, norms: tuple[jax.Array | None, ...]) -> None:
    shape = stream.h.shape
    for name, array in (
        ("h", stream.h),
        *((f"y_{i}", y) for i, (y, _) in enumerate(stream.branches)),
    ):
        if array.dtype != jnp.float32 or array.shape != shape or array.ndim < 1:
            raise ValueError(
                f"residual_norm: {name} is {array.dtype}{list(array.shape)}: expected float32{list(shape)}"
            )
    weights = [w for _, w in stream.branches] + [stream.outer, *norms]
    for weight in weights:
        if weight is not None:
            dispatch.check_floating("residual_norm", "a weight", weight)
            if weight.shape != shape[-1:]:
                raise ValueError(
                    f"residual_norm: a weight has shape {weight.shape}: expected {shape[-1:]}"
                )
    if stream.outer is not None and not stream.branches:
        raise ValueError("residual_norm: outer is given, but no branch")
    if stream.scalar is not None and stream.scalar.shape != (1,):
        raise ValueError(f"residual_norm: scalar has shape {stream.scalar.shape}: expected (1,)")
