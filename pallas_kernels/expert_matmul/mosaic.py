"""``expert_matmul`` by hand-written Mosaic GPU kernels: packed or bfloat16 weights, bfloat16 x.

With few rows an expert the kernel is that of `pallas_kernels.decode_matmul` over the blocks of
`pallas_kernels.expert_blocks`. Bytes moved: the weights of the rows' experts, once per row up to 64 rows and once per 8
or 16 rows of an expert beyond; x from L2. Up to about 16 rows an expert that is what bounds it; with more, each block
dequantizes its expert anew, which then takes longer than reading it. There, on Hopper, `pallas_kernels.expert_prefill`
serves; elsewhere nothing else does. No card has run them: they serve who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import decode_matmul, expert_blocks, expert_prefill, prefill_matmul
from pallas_kernels.expert_blocks import blocks_of, multiply_blocks
from pallas_kernels.packed import Weight

Config = decode_matmul.Config | prefill_matmul.Config

why_not = expert_blocks.why_not


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array) -> Config:
    """That of the kernel which is to serve the call; its type says which."""
    del x
    if expert_prefill.why_not(w, expert_ids.size) is None:
        return expert_prefill.default_config(w, expert_ids.size)
    return expert_blocks.default_config(w, expert_ids.size)


def mmas_per_fragment(x: jax.Array, w: Weight, expert_ids: jax.Array) -> float:
    """Tensor-core instructions of the chosen kernel for each 16 x 16 weights."""
    del x
    serves = expert_prefill.why_not(w, expert_ids.size) is None
    return 1 if serves else expert_blocks.mmas_per_fragment(w, expert_ids.size)


def intermediate_bytes(x: jax.Array, w: Weight, expert_ids: jax.Array) -> int:
    """As `expert_prefill.intermediate_bytes`, where that serves."""
    serves = expert_prefill.why_not(w, expert_ids.size) is None
    return expert_prefill.intermediate_bytes(x, expert_ids.size) if serves else 0


def expert_matmul(
    x: jax.Array, w: Weight, expert_ids: jax.Array, config: Config | None = None
) -> jax.Array:
    """float32 ``[M, N]``: row m is ``w[expert_ids[m]] @ x[m]``, ids in 0..E-1."""
    config = config or default_config(x, w, expert_ids)
    if isinstance(config, prefill_matmul.Config):
        return expert_prefill.expert_matmul(x, w, expert_ids, config)
    experts, n, _ = w.shape

    def store(
        i: Any, _: Any, y: Any, pair: Any, row: Any, inside: Any, totals: list[list[Any]]
    ) -> None:
        i.store(y, i.iadd(i.imul(pair, i.u32(n)), row), totals[0], where=inside)

    out = jax.ShapeDtypeStruct((len(x), n), jnp.float32)
    blocks = blocks_of(expert_ids, experts)
    return multiply_blocks(x, w, blocks, store, out, config, name="expert_matmul")
