"""``expert_matmul`` by a hand-written Mosaic GPU kernel: packed or bfloat16 weights, bfloat16 x.

The kernel is that of `pallas_kernels.decode_matmul` over the blocks of `pallas_kernels.expert_blocks`. Bytes moved: the
weights of the rows' experts, once per row up to 64 rows and once per 8 or 16 rows of an expert beyond; x from L2. Up to
about 16 rows an expert that is what bounds it; with more, each block dequantizes its expert anew, which then takes
longer than reading it. No card has run it: it serves who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import expert_blocks
from pallas_kernels.decode_matmul import Config
from pallas_kernels.expert_blocks import blocks_of, multiply_blocks
from pallas_kernels.packed import Weight

why_not = expert_blocks.why_not


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array) -> Config:
    """As many units as registers allow, and the number of tiles with the fewest turns."""
    del x
    return expert_blocks.default_config(w, expert_ids.size)


def mmas_per_fragment(x: jax.Array, w: Weight, expert_ids: jax.Array) -> float:
    """As `expert_blocks.mmas_per_fragment`."""
    del x
    return expert_blocks.mmas_per_fragment(w, expert_ids.size)


def expert_matmul(
    x: jax.Array, w: Weight, expert_ids: jax.Array, config: Config | None = None
) -> jax.Array:
    """float32 ``[M, N]``: row m is ``w[expert_ids[m]] @ x[m]``, ids in 0..E-1."""
    experts, n, _ = w.shape

    def store(
        i: Any, _: Any, y: Any, pair: Any, row: Any, inside: Any, totals: list[list[Any]]
    ) -> None:
        i.store(y, i.iadd(i.imul(pair, i.u32(n)), row), totals[0], where=inside)

    out = jax.ShapeDtypeStruct((len(x), n), jnp.float32)
    config = config or default_config(x, w, expert_ids)
    blocks = blocks_of(expert_ids, experts)
    return multiply_blocks(x, w, blocks, store, out, config, name="expert_matmul")
