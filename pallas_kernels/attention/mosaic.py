"""``attention`` by hand-written Mosaic GPU kernels: bfloat16, by the query rows ``T * H / K`` that read a KV head:

- up to `MAX_ROWS`: `mosaic_decode`, on any GPU that Mosaic knows;
- more, on Hopper: `mosaic_prefill`.

No card has run them: they serve who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

import jax

from pallas_kernels.attention import mosaic_decode, mosaic_prefill
from pallas_kernels.attention.mosaic_decode import MAX_ROWS

Config = mosaic_decode.Config | mosaic_prefill.Config
_MODULES = {module.Config: module for module in (mosaic_decode, mosaic_prefill)}


def why_not(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    pages: jax.Array | None = None,
) -> str | None:
    """What the kernel for that many rows objects to."""
    if pages is not None:
        return "the keys lie in pages: expected a cache of each row's own"
    module = mosaic_decode if _is_decode(q, k) else mosaic_prefill
    return module.why_not(q, k, v, q_positions, kv_positions)


def default_config(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, kv_positions: jax.Array
) -> Config:
    """That of the kernel which is to serve the call; its type says which."""
    module = mosaic_decode if _is_decode(q, k) else mosaic_prefill
    return module.default_config(q, k, v, q_positions, kv_positions)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    *,
    window: int | None,
    config: Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.attention`."""
    config = config or default_config(q, k, v, q_positions, kv_positions)
    module = _MODULES[type(config)]
    return module.attention(q, k, v, q_positions, kv_positions, window=window, config=config)


def _is_decode(q: jax.Array, k: jax.Array) -> bool:
    return q.shape[1] * q.shape[2] // k.shape[2] <= MAX_ROWS
