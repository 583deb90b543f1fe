"""Rows of x and the expert of each, as the mosaic kernels of a mixture of experts take them: in blocks of one expert.

A *pair* is a row of x and one of its experts; there are P. A *block* is up to `size` pairs of one expert, and a product
has the row tiles of each block's expert: an expert's weights are read in place, and those of no other. Up to
`MAX_SINGLE` pairs every pair is a block, and the kernel reads its expert from the ids as they are. More pairs are
sorted by expert on the device, ahead of the kernel, and a block has up to 8 or 16, so that many pairs share a read of
the weights. Neither x nor w is copied: the kernel looks up where a block's rows are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import decode_matmul
from pallas_kernels.decode_matmul import Config, Product, multiply
from pallas_kernels.fragments import MAX_ROWS, units, why_no_units
from pallas_kernels.packed import ROWS, Weight

MAX_SINGLE = 64
# Registers of a lane for the weights of a turn. At 16 warps an SM 48 KB are on their way: 4.8 TB/s take 25 KB for every
# 0.7 us that a read is waited for.
_HELD_REGISTERS = 24
_HELD_BESIDE_16_ROWS = 16  # whose sums take more; dequantizing bounds those, not reading


class SortedPairs(NamedTuple):
    """Pairs in the order of their experts, and how many blocks that makes.

    order: int32 ``[P]``, the pairs.
    counts: int32 ``[E]``, an expert's pairs.
    blocks_end: int32 ``[E]``, blocks of an expert and of those before it.
    """

    order: jax.Array
    counts: jax.Array
    blocks_end: jax.Array


def sort_pairs(expert_ids: jax.Array, experts: int, size: int) -> SortedPairs:
    """Sorts pairs by their ids ``[P]`` in 0..experts-1; every expert starts a new block of up to `size`."""
    counts = jnp.zeros((experts,), jnp.int32).at[expert_ids].add(1)
    order = jnp.argsort(expert_ids, stable=True)
    return SortedPairs(order, counts, jnp.cumsum(-(-counts // size)))


def most_blocks(pairs: int, experts: int, size: int) -> int:
    """How many blocks there can be: with one begun by every expert, one for every `size` pairs beside those."""
    return min(experts, pairs) + pairs // size


@dataclasses.dataclass(frozen=True)
class SingleBlocks:
    """Every pair a block; `tables` has the expert of each, int32 ``[P]``."""

    tables: tuple[jax.Array]
    most: int
    size: int = 1
    in_use: Callable[..., jax.Array] | None = None

    @classmethod
    def of(cls, expert_ids: jax.Array) -> SingleBlocks:
        """Blocks of the pairs with ids ``[P]``."""
        return cls((expert_ids,), len(expert_ids))

    def expert(self, i: Any, tables: Any, block: Any) -> Any:
        """The expert of a block, of the last one for blocks beyond it."""
        return i.load(tables[0], i.imin(block, i.u32(self.most - 1)), 1)[0]

    def pair(self, i: Any, tables: Any, block: Any, row: Any) -> tuple[Any, Any]:
        """Row `row` of a block: a pair, and whether it is there or only one that can be read instead."""
        del tables, row
        return i.imin(block, i.u32(self.most - 1)), i.less(block, i.u32(self.most))


@dataclasses.dataclass(frozen=True)
class SortedBlocks:
    """Blocks of up to `size` pairs.

    tables: int32 ``[most, 4]``, of each block its expert, where in the order it begins and ends, and how many blocks
        there are; and the order, int32 ``[P]``.
    """

    tables: tuple[jax.Array, jax.Array]
    most: int
    size: int

    @classmethod
    def of(cls, expert_ids: jax.Array, experts: int, size: int) -> SortedBlocks:
        """Blocks of the pairs with ids ``[P]`` in 0..experts-1."""
        pairs = len(expert_ids)
        order, counts, blocks_end = sort_pairs(expert_ids, experts, size)
        most = most_blocks(pairs, experts, size)
        block = jnp.arange(most)
        expert = jnp.minimum(jnp.searchsorted(blocks_end, block, side="right"), experts - 1)
        rank = block - (blocks_end - -(-counts // size))[expert]
        ends = jnp.cumsum(counts)[expert]
        # What is not in use has one pair, which keeps the kernel within its arrays.
        first = jnp.minimum(ends - counts[expert] + rank * size, pairs - 1)
        end = jnp.clip(ends, first + 1, first + size)
        in_use = jnp.broadcast_to(blocks_end[-1], (most,))
        blocks = jnp.stack([expert, first, end, in_use], axis=-1)
        return cls((blocks.astype(jnp.int32), order.astype(jnp.int32)), most, size)

    def in_use(self, tables: Any) -> jax.Array:
        """How many blocks there are."""
        return tables[0][0, 3]

    def expert(self, i: Any, tables: Any, block: Any) -> Any:
        """As `SingleBlocks.expert`."""
        return self._block(i, tables, block)[0]

    def pair(self, i: Any, tables: Any, block: Any, row: Any) -> tuple[Any, Any]:
        """As `SingleBlocks.pair`."""
        _, first, end, _ = self._block(i, tables, block)
        place = i.iadd(first, row)
        [pair] = i.load(tables[1], i.imin(place, i.iadd(end, i.u32(-1))), 1)
        return pair, i.less(place, end)

    def _block(self, i: Any, tables: Any, block: Any) -> Any:
        block = i.imin(block, i.u32(self.most - 1))
        return i.load(tables[0], i.shift_left(block, 2), 4)


Blocks = SingleBlocks | SortedBlocks


def block_size(pairs: int, experts: int) -> int:
    """1 for few pairs, then 8, and 16 once experts have more than 4 on average."""
    if pairs <= MAX_SINGLE:
        return 1
    return 8 if pairs <= 4 * experts else MAX_ROWS


def blocks_of(expert_ids: jax.Array, experts: int) -> Blocks:
    """Blocks of `block_size` of the pairs with ids ``[P]`` in 0..experts-1."""
    size = block_size(len(expert_ids), experts)
    return SingleBlocks.of(expert_ids) if size == 1 else SortedBlocks.of(expert_ids, experts, size)


def why_not(x: jax.Array, w: Weight, expert_ids: jax.Array) -> str | None:
    """Wants bfloat16 x, at least one pair, and packed or bfloat16 weights."""
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}: tensor cores take bfloat16"
    if expert_ids.size == 0:
        return "there are no rows"
    return why_no_units(w)


def mmas_per_fragment(w: Weight, pairs: int) -> float:
    """As `decode_matmul.mmas_per_fragment`, a block's pairs being the rows."""
    return decode_matmul.mmas_per_fragment(units(w), block_size(pairs, w.shape[0]))


def default_config(w: Weight, pairs: int, span: int = 1) -> Config:
    """`fewest_turns` of `multiply_blocks` for so many pairs."""
    experts, n, k = w.shape
    size = block_size(pairs, experts)
    most = pairs if size == 1 else most_blocks(pairs, experts, size)
    return fewest_turns(w, size, most * n // ROWS, k // units(w).chunk, span)


def fewest_turns(w: Weight, rows: int, tiles: int, chunks: int, span: int = 1) -> Config:
    """`Config.fewest_turns` with as many units as fit the registers kept for them."""
    unit = units(w)
    held = max(1, (_HELD_BESIDE_16_ROWS if rows > 8 else _HELD_REGISTERS) // unit.registers)
    return Config.fewest_turns(unit, tiles, chunks, span=span, units=held)


def multiply_blocks(
    x: jax.Array,
    w: Weight,
    blocks: Blocks,
    store: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    config: Config,
    *,
    name: str,
    pairs_per_row: int = 1,
    span: int = 1,
    vector: int = 1,
    tables: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """Multiplies every pair's row of x by its expert's matrices; what becomes of the products is up to `store`.

    Args:
        x: bfloat16 ``[P / pairs_per_row, K]``; pair p is of row ``p // pairs_per_row``.
        w: ``[E, span * N, K]``: `span` matrices of N rows, one after the other.
        blocks: of the pairs.
        store: lane program ``(i, tables, y, pair, row, inside, totals)``: stores, where `inside`, what follows from
            ``totals[s][v]``, the product of the pair with row ``row + v`` of matrix s.
        out: of y.
        name: of the kernel.
        vector: how many rows `store` wants at a time.
        tables: further arrays for `store`.
    """
    _, n, k = w.shape
    unit = units(w)
    row_tiles, chunks = n // ROWS, k // unit.chunk

    def unit_at(i: Any, tables: Any, tile: Any, chunk: Any) -> Any:
        block, row_tile = i.idiv(tile, i.u32(row_tiles)), i.irem(tile, i.u32(row_tiles))
        matrix, row_tile = i.irem(row_tile, i.u32(span)), i.idiv(row_tile, i.u32(span))
        row_tile = i.iadd(i.imul(matrix, i.u32(row_tiles // span)), row_tile)
        tile = i.iadd(i.imul(blocks.expert(i, tables, block), i.u32(row_tiles)), row_tile)
        return i.iadd(i.imul(tile, i.u32(chunks)), chunk)

    def x_at(i: Any, tables: Any, tile: Any, chunk: Any, row: Any) -> Any:
        pair, _ = blocks.pair(i, tables, i.idiv(tile, i.u32(row_tiles)), row)
        x_row = i.idiv(pair, i.u32(pairs_per_row))
        # Where there is no unit its weights are zeros, and x must be numbers.
        chunk = i.imin(chunk, i.u32(chunks - 1))
        return i.iadd(i.imul(x_row, i.u32(k // 2)), i.imul(chunk, i.u32(unit.chunk // 2)))

    def write(
        i: Any, refs: Any, y: Any, tile: Any, row: Any, x_row: Any, inside: Any, totals: Any
    ) -> None:
        block, row_tile = i.idiv(tile, i.u32(row_tiles)), i.irem(tile, i.u32(row_tiles))
        pair, is_there = blocks.pair(i, refs, block, x_row)
        row = i.iadd(i.imul(i.idiv(row_tile, i.u32(span)), i.u32(ROWS)), row)
        own = refs[len(blocks.tables) :]
        store(i, own, y, pair, row, i.both(inside, is_there), totals)

    def tiles_in_use(tables: Any) -> jax.Array:
        assert blocks.in_use is not None
        return blocks.in_use(tables) * row_tiles

    product = Product(
        name=name,
        rows=blocks.size,
        tiles=blocks.most * row_tiles,
        chunks=chunks,
        unit_at=unit_at,
        x_at=x_at,
        write=write,
        shape=out.shape,
        dtype=out.dtype,
        tables=(*blocks.tables, *tables),
        tiles_in_use=tiles_in_use if blocks.in_use else None,
        span=span,
        vector=vector,
    )
    return multiply(x, unit, product, config)
