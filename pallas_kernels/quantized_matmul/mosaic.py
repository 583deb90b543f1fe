"""``quantized_matmul`` by hand-written Mosaic GPU kernels: packed weights, bfloat16 x.

No card has run them: they serve who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

import jax

from pallas_kernels.packed import Weight
from pallas_kernels.quantized_matmul import mosaic_decode

why_not = mosaic_decode.why_not
default_config = mosaic_decode.default_config
configs = mosaic_decode.configs
mmas_per_fragment = mosaic_decode.mmas_per_fragment


def quantized_matmul(
    x: jax.Array, w: Weight, config: mosaic_decode.Config | None = None
) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    return mosaic_decode.quantized_matmul(x, w, config)
