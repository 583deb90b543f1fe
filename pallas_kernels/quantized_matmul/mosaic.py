"""``quantized_matmul`` by hand-written Mosaic GPU kernels: packed weights, bfloat16 x. By rows of x:

- up to 16: `mosaic_decode`, on any GPU that Mosaic knows;
- more, on Hopper: `mosaic_prefill`;
- `DEQUANTIZE_ROWS` and more, or more than 16 elsewhere, or plain bfloat16 weights: `mosaic_dense`, then XLA's matmul.

No card has run them: they serve who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

import math

import jax

from pallas_kernels.fragments import MAX_ROWS
from pallas_kernels.packed import PackedArray, Weight
from pallas_kernels.quantized_matmul import mosaic_decode, mosaic_dense, mosaic_prefill

# From here on making a bfloat16 matrix costs little beside the matmul: 3 to 11 %, by a count of bytes and operations.
# No card has tuned it.
DEQUANTIZE_ROWS = 2048

Config = mosaic_decode.Config | mosaic_prefill.Config | mosaic_dense.Config
_MODULES = {module.Config: module for module in (mosaic_decode, mosaic_prefill, mosaic_dense)}


def why_not(x: jax.Array, w: Weight) -> str | None:
    """Wants bfloat16 x of at least one row, and packed or bfloat16 weights."""
    few = math.prod(x.shape[:-1]) <= MAX_ROWS
    return (mosaic_decode if few else mosaic_dense).why_not(x, w)


def default_config(x: jax.Array, w: Weight, dequantize_rows: int = DEQUANTIZE_ROWS) -> Config:
    """That of the kernel which is to serve the call; its type says which."""
    rows = math.prod(x.shape[:-1])
    if rows <= MAX_ROWS:
        return mosaic_decode.default_config(x, w)
    unserved = rows >= dequantize_rows or mosaic_prefill.why_not(x, w)
    if isinstance(w, PackedArray) and not unserved:
        return mosaic_prefill.default_config(x, w)
    return mosaic_dense.default_config(x, w)


def configs(x: jax.Array, w: Weight) -> list[Config]:
    """What is worth measuring of the kernel that `default_config` chooses."""
    module = _MODULES[type(default_config(x, w))]
    return list(module.configs(x, w)) if module is mosaic_decode else [default_config(x, w)]


def mmas_per_fragment(x: jax.Array, w: Weight) -> float:
    """Tensor-core instructions of the chosen kernel for each 16 x 16 weights."""
    few = math.prod(x.shape[:-1]) <= MAX_ROWS
    return mosaic_decode.mmas_per_fragment(x, w) if few else 1


def quantized_matmul(x: jax.Array, w: Weight, config: Config | None = None) -> jax.Array:
    """float32 ``[..., N] = x [..., K] @ w [N, K].T``."""
    config = config or default_config(x, w)
    return _MODULES[type(config)].quantized_matmul(x, w, config)
