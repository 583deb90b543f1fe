"""``gelu_matmul`` as XLA runs it: ``quantized_matmul``, then GELU in the fusion that follows."""

from __future__ import annotations

import jax

from pallas_kernels.packed import Weight
from pallas_kernels.quantized_matmul import xla


def why_not(x: jax.Array, w: Weight, factor: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight, factor: jax.Array) -> xla.Config:
    """That of ``quantized_matmul``."""
    return xla.default_config(x, w)


def gelu_matmul(
    x: jax.Array, w: Weight, factor: jax.Array, config: xla.Config | None = None
) -> jax.Array:
    """``[..., N]`` in the type of x: ``gelu(x @ w.T) * factor``."""
    y = xla.quantized_matmul(x, w, config)
    return (jax.nn.gelu(y, approximate=True) * factor).astype(x.dtype)
