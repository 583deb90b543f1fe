"""Products of a mixture of experts for many rows, on Hopper: the kernel of `pallas_kernels.prefill_matmul`.

Pairs of a row of x and one of its experts are sorted by expert on the device, and XLA gathers their rows of x in that
order. A block is up to `Config.block_m` sorted pairs of one expert: it reads so many rows from its first on, those of
the next expert too, whose sums nobody stores. An expert's weights are read in place and dequantized once a block; no
table leaves the device. Sums go to the rows of their pairs.

Bytes moved: an expert's weights once a block, from L2 after the first; x once more written and read by the gather, and
from L2 once for 128 rows of w. Bound: dequantizing, until a block of 128 has its pairs. No card has run it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import prefill_matmul
from pallas_kernels.expert_blocks import SortedBlocks
from pallas_kernels.fragments import MAX_ROWS
from pallas_kernels.packed import Weight
from pallas_kernels.prefill_matmul import Config, Product

# Pairs an expert, on average, from which on this kernel serves: the other dequantizes an expert for every 16 of them.
# No card has tuned it.
MIN_PAIRS_PER_EXPERT = MAX_ROWS + 1
_BLOCKS = (64, 128)
# Cycles that a step of 64 columns takes the tensor cores for a row of x, and at least, to dequantize.
_CYCLES_PER_ROW, _LEAST_CYCLES = 4, 500


def why_not(w: Weight, pairs: int) -> str | None:
    """Wants Hopper, and more pairs an expert than the kernel for few of them has in a block.

    x and w are those of `expert_blocks.why_not`.
    """
    if pairs < MIN_PAIRS_PER_EXPERT * w.shape[0]:
        return (
            f"{pairs} rows for {w.shape[0]} experts: expected {MIN_PAIRS_PER_EXPERT} each or more"
        )
    return prefill_matmul.why_not_here()


def default_config(w: Weight, pairs: int) -> Config:
    """The blocks that keep an SM busy for the shortest time if all experts have as many pairs."""
    mean = -(-pairs // w.shape[0])
    return min(
        (Config(block_m=size) for size in _BLOCKS),
        key=lambda c: -(-mean // c.block_m) * max(_CYCLES_PER_ROW * c.block_m, _LEAST_CYCLES),
    )


def intermediate_bytes(x: jax.Array, pairs: int) -> int:
    """Of x, written and read by the gather."""
    return 2 * 2 * pairs * x.shape[-1]


def expert_matmul(
    x: jax.Array, w: Weight, expert_ids: jax.Array, config: Config, pairs_per_row: int = 1
) -> jax.Array:
    """float32 ``[P, N]``: row p is ``w[expert_ids[p]] @ x[p // pairs_per_row]``, for ids ``[P]`` in 0..E-1."""
    blocks = SortedBlocks.of(expert_ids, w.shape[0], config.block_m)
    _, order = blocks.tables

    def place(tables: Any, block: Any) -> tuple[Any, Any, Any]:
        table, _ = tables
        first, end = table[block, 1], table[block, 2]
        return first, jnp.where(block < blocks.in_use(tables), end, first), table[block, 0]

    def y_row(i: Any, tables: Any, row: Any, inside: Any) -> Any:
        return i.load(tables[1], row, 1, where=inside)[0]

    product = Product("expert_prefill", len(order), blocks.most, place, y_row, blocks.tables)
    rows = prefill_matmul.in_fragment_order(x, w)[order // pairs_per_row]
    return prefill_matmul.multiply(rows, w, product, config)
