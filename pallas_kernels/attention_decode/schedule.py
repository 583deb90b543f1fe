"""Which CTA reads which slots: made on the device from the rows' positions, so that work follows their lengths.

A *pair* is a KV head of a row of the batch by a tile of the query rows that read it. Each pair's blocks of 64 slots in
use are cut into runs of at most `n`, with the least n for which the grid has a CTA for each run. So rows of different
lengths take as many CTAs as they are long, no CTA has more than n blocks, and one without a run ends at once.

XLA computes the table once a step for all layers with caches of one shape: it hangs on the positions alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

BLOCK = 64  # slots
FAN = 8  # partial results that are added up at a time

# Columns of the table.
ROW, HEAD, TILE, FIRST, END, INDEX, RUNS, LAST, ARRIVALS = range(9)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid's sizes, all known while tracing.

    batch, pairs_per_row, tiles, slots: of the call; pairs of a row are KV heads by `tiles` tiles of query rows.
    wanted: CTAs that fill the GPU.
    """

    batch: int
    pairs_per_row: int
    tiles: int
    slots: int
    wanted: int

    @property
    def most_runs(self) -> int:
        """Blocks of a pair whose row fills the cache."""
        return -(-self.slots // BLOCK)

    @property
    def pairs(self) -> int:
        return self.batch * self.pairs_per_row

    @property
    def ctas(self) -> int:
        """Twice the pairs if these alone fill the GPU: a run more for each is what cutting may cost."""
        return min(max(self.wanted, 2 * self.pairs), self.pairs * self.most_runs)

    @property
    def levels(self) -> int:
        """Of the tree in which the runs of a pair are added up."""
        levels = 1
        while FAN**levels < min(self.most_runs, self.ctas):
            levels += 1
        return levels

    @property
    def columns(self) -> int:
        """Of the table: the last of them count arrivals, a column for each level."""
        return ARRIVALS + self.levels


def schedule(positions: jax.Array, grid: Grid) -> jax.Array:
    """The table: int32 ``[ctas, columns]``.

    Columns: batch row, or -1 for a CTA without work; KV head; tile; first block and one past the last; which run of its
    pair this is, of how many; the row's last position; zeros, in which runs that are done are counted.

    Args:
        positions: int32 ``[B, T]``; a row without one that is not negative gets an empty run, which gives it zeros.
        grid: the sizes.
    """
    last = jnp.max(positions, axis=1)
    in_use = jnp.minimum(last + 1, grid.slots)
    blocks = jnp.maximum(1, (in_use + (BLOCK - 1)) // BLOCK)
    total = grid.pairs_per_row * jnp.sum(blocks)
    # Cutting makes at most total / n runs and one more a pair.
    spare = max(1, grid.ctas - grid.pairs)
    longest = jnp.where(total <= grid.ctas, 1, (total + (spare - 1)) // spare)
    runs = (blocks + (longest - 1)) // longest
    ends = jnp.cumsum(runs * grid.pairs_per_row)

    cta = jnp.arange(grid.ctas, dtype=jnp.int32)
    row = jnp.sum(ends <= cta[:, None], axis=1, dtype=jnp.int32)
    works = row < grid.batch
    row = jnp.minimum(row, grid.batch - 1)
    within = cta - jnp.where(row == 0, 0, ends[row - 1])
    pair, index = within // runs[row], within % runs[row]
    first = index * longest
    columns = [
        jnp.where(works, row, -1),
        pair // grid.tiles,
        pair % grid.tiles,
        first,
        jnp.where(last[row] < 0, first, jnp.minimum(first + longest, blocks[row])),
        index,
        runs[row],
        last[row],
        *[jnp.zeros_like(cta)] * grid.levels,
    ]
    return jnp.stack(columns, axis=1).astype(jnp.int32)
