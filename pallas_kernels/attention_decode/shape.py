"""What the parts of the kernel know of a call, and how its arrays lie over lanes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.attention_decode.schedule import BLOCK
from pallas_kernels.lanes import Register

TILE_ROWS = 16  # rows of a tensor-core product
# Rows of q in shared memory are 64 bytes further apart than they are long: neighbours lie in different banks.
PADDING = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    heads: query heads H; `key_heads` and `value_heads` are those of k and v in the product.
    window, eps: as the op takes them.
    bf16_norms: whether the norms' weights are bfloat16 and not float32.
    page: slots of a page, a multiple of a block, or None where the rows of the cache are those of the batch.
    """

    batch: int
    queries: int
    heads: int
    kv_heads: int
    key_heads: int
    value_heads: int
    head_dim: int
    slots: int
    window: int | None
    eps: float
    bf16_norms: bool
    page: int | None

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows that read a KV head: row t * group + h."""
        return self.queries * self.group

    @property
    def tiles(self) -> int:
        """Of rows; each is a CTA's."""
        return -(-self.rows // TILE_ROWS)

    @property
    def tile_rows(self) -> int:
        """Rows of a tile that memory is set aside for."""
        return min(self.rows, TILE_ROWS)

    @property
    def halves(self) -> int:
        """1 if a tile has no rows from 8 on, which are the second half of a fragment's registers; else 2."""
        return 1 if self.rows <= 8 else 2

    @property
    def head_words(self) -> int:
        """32-bit words of a head in bfloat16."""
        return self.head_dim // 2

    @property
    def vector(self) -> int:
        """Columns of half a head, and words of values, that a lane takes at a time: at most 16 bytes."""
        return min(4, self.head_dim // 64)

    @property
    def pieces(self) -> int:
        """How often a lane does so."""
        return max(1, self.head_dim // 256)

    @property
    def sums(self) -> int:
        """Registers of a lane for sums of values: its warp's quarter of the columns, for 8 or 16 rows."""
        return self.halves * self.head_dim // 16

    @property
    def q_words(self) -> int:
        """Words from one row of q in shared memory to the next."""
        return self.head_words + PADDING

    def block_row(self, i: Any, pages: Any, batch: Any, block: Any) -> Register:
        """Which slot of the whole cache a block of a row of the batch begins with."""
        first = i.imul(block, i.u32(BLOCK))
        if self.page is None:
            return i.iadd(i.imul(batch, i.u32(self.slots)), first)
        table = i.iadd(
            i.imul(batch, i.u32(self.slots // self.page)), i.idiv(first, i.u32(self.page))
        )
        [number] = i.load(pages, table, 1)
        return i.iadd(i.imul(number, i.u32(self.page)), i.irem(first, i.u32(self.page)))

    def cache_word(self, i: Any, row: Any, head: Any) -> Register:
        """Where the head of a slot of the whole cache begins in keys and in values."""
        return i.imul(i.iadd(i.imul(row, i.u32(self.kv_heads)), head), i.u32(self.head_words))

    def row_of(self, i: Any, tile: Any, row: Any) -> tuple[Register, Register, Register]:
        """Of a row of a tile: its query, its head within the group, and whether it exists."""
        row = i.iadd(i.imul(tile, i.u32(TILE_ROWS)), row)
        exists = i.less(row, i.u32(self.rows))
        return i.idiv(row, i.u32(self.group)), i.irem(row, i.u32(self.group)), exists

    def out_word(self, i: Any, batch: Any, head: Any, query: Any, of_group: Any) -> Register:
        """Where a row's result begins."""
        at = i.iadd(i.imul(batch, i.u32(self.queries)), query)
        at = i.imul(i.iadd(i.imul(at, i.u32(self.kv_heads)), head), i.u32(self.group))
        return i.imul(i.iadd(at, of_group), i.u32(self.head_words))


def is_bf16(dtype: Any) -> bool:
    """Whether it is the type that tensor cores take here."""
    return dtype == jnp.bfloat16
