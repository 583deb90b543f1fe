"""``expert_matmul`` as XLA runs it: never dense over the experts.

Up to 16 rows: the planes of each row's expert are gathered and multiplied word by word in the same kernel. More rows:
sorted by expert and padded so that every block of rows has one expert, then a loop over the blocks in use, each of
which dequantizes its own expert and nothing else.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import unpacked
from pallas_kernels.expert_blocks import most_blocks, sort_pairs
from pallas_kernels.packed import Weight
from pallas_kernels.quantized_matmul.xla import matmul_dense
from pallas_kernels.wordwise import weighted_sums


@dataclasses.dataclass(frozen=True)
class Config:
    """``max_wordwise_rows``: most rows done without a dot; ``block_m``: rows per block above that."""

    max_wordwise_rows: int = 16
    block_m: int = 64


def why_not(x: jax.Array, w: Weight, expert_ids: jax.Array) -> str | None:
    """Serves every call."""
    return None


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array) -> Config:
    """Blocks as long as twice the mean number of rows per expert, 8 to 256."""
    mean = max(1, x.shape[0] // w.shape[0])
    return Config(block_m=min(256, max(8, 2 ** mean.bit_length())))


def expert_matmul(
    x: jax.Array, w: Weight, expert_ids: jax.Array, config: Config | None = None
) -> jax.Array:
    """float32 ``[M, N]``: row m is ``w[expert_ids[m]] @ x[m]``, ids in 0..E-1."""
    config = config or default_config(x, w, expert_ids)
    if x.shape[0] <= config.max_wordwise_rows:
        chosen = jax.tree.map(lambda plane: plane[expert_ids], w)
        return jax.vmap(weighted_sums)(x[:, None], unpacked(chosen))[:, 0]
    return _by_blocks(x, w, expert_ids, config.block_m)


def _by_blocks(x: jax.Array, w: Weight, expert_ids: jax.Array, block_m: int) -> jax.Array:
    """Rows sorted by expert, every expert's group starting on a new block of ``block_m`` rows."""
    rows, k = x.shape
    experts, n, _ = w.shape
    most = most_blocks(experts=experts, pairs=rows, size=block_m)
    order, counts, blocks_end = sort_pairs(expert_ids, experts, block_m)
    blocks = -(-counts // block_m)
    # The place of sorted row i: first row of its expert's blocks, plus its rank within the expert.
    shift = (blocks_end - blocks) * block_m - (jnp.cumsum(counts) - counts)
    place = jnp.arange(rows) + shift[expert_ids[order]]
    padded = jnp.zeros((most * block_m, k), x.dtype).at[place].set(x[order])

    def block(b: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(blocks_end, b, side="right")
        own = jax.tree.map(
            lambda plane: jax.lax.dynamic_index_in_dim(plane, expert, keepdims=False), w
        )
        x_block = jax.lax.dynamic_slice_in_dim(padded, b * block_m, block_m)
        return jax.lax.dynamic_update_slice_in_dim(
            out, matmul_dense(x_block, unpacked(own)), b * block_m, 0
        )

    out = jnp.zeros((most * block_m, n), jnp.float32)
    out = jax.lax.fori_loop(0, blocks_end[-1], block, out)
    return jnp.zeros((rows, n), jnp.float32).at[order].set(out[place])
