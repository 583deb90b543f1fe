"""Which row gets a slot and pages, and which has to give them back: the host's side of continuous batching.

Rows are served in the order they came. One that has a slot keeps it until it ends, unless a row that came before it
needs its pages: then the youngest goes back to the head of the queue, with what it has generated so far. The oldest row
is never short of pages, because all others can be made to give theirs: something always ends.
"""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np

from gemma_jax.page_pool import PagePool, Prefix, PrefixCache
from gemma_jax.paged_cache import Plan


@dataclasses.dataclass(eq=False)
class Row:
    """What the scheduler knows of a request.

    Attributes:
      order: of arrival.
      prompt: token ids.
      positions: how many the row may come to hold in the cache.
      slot: where it is, -1 while it waits and after it has ended.
      pages: of the global layers, in order.
      length: positions that the cache holds, or will when all that was dispatched is done.
      is_decoding: whether all of the prompt but its last token is in the cache.
    """

    order: int
    prompt: tuple[int, ...]
    positions: int
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    length: int = 0
    is_decoding: bool = False


class Scheduler:
    """The queue, the slots and the page table.

    Attributes:
      waiting: rows without a slot, in order.
      table: int32 ``[slots, context / page]``, the pages of the row in each slot.
      evictions: how many rows had to give their slot back so far.
    """

    def __init__(self, slots: int, context: int, chunk: int, plan: Plan) -> None:
        self.waiting: deque[Row] = deque()
        self.table = np.zeros((slots, context // plan.page_size), np.int32)
        self.evictions = 0
        self._page_size = plan.page_size
        self._pool = PagePool(plan.pages)
        self.prefixes = PrefixCache(self._pool, chunk, plan.snapshots)
        self._slots: list[Row | None] = [None] * slots

    @property
    def running(self) -> list[Row]:
        """Rows with a slot, the oldest first."""
        return sorted((row for row in self._slots if row is not None), key=lambda row: row.order)

    def pages_for(self, positions: int) -> int:
        """How many pages hold `positions`."""
        return -(-positions // self._page_size)

    def admit(self) -> tuple[Row, Prefix | None] | None:
        """Gives the row that waits longest a slot, and pages for its prompt; None if either is missing.

        Returns:
          The row and the prefix of its prompt that is in its pages already.
        """
        if not self.waiting or None not in self._slots:
            return None
        row = self.waiting[0]
        prefix = self.prefixes.find(row.prompt, len(row.prompt) - 1)
        row.slot = self._slots.index(None)
        if prefix is not None:
            self._pool.share(prefix.pages)  # before others are dropped to make room
            row.pages = list(prefix.pages)
            self.table[row.slot, : len(row.pages)] = row.pages
        if not self.reserve(row, len(row.prompt)):
            self._give_back(row)
            return None
        self.waiting.popleft()
        self._slots[row.slot] = row
        row.length = prefix.tokens if prefix is not None else 0
        return row, prefix

    def reserve(self, row: Row, positions: int) -> bool:
        """Sees to it that `row` has pages for `positions`; says whether there were enough without an eviction."""
        missing = self.pages_for(positions) - len(row.pages)
        while self._pool.free < missing and self.prefixes.drop_oldest():
            pass
        if self._pool.free < missing:
            return False
        if missing > 0:
            held = len(row.pages)
            row.pages += self._pool.take(missing)
            self.table[row.slot, held : len(row.pages)] = row.pages[held:]
        return True

    def evict_youngest(self) -> Row:
        """Sends the youngest row back to the head of the queue; nothing that was dispatched may still write to it."""
        row = self.running[-1]
        self.release(row)
        self.waiting.appendleft(row)
        self.evictions += 1
        return row

    def release(self, row: Row) -> None:
        """Takes slot and pages from a row."""
        self._slots[row.slot] = None
        self._give_back(row)
        row.length, row.is_decoding = 0, False

    def _give_back(self, row: Row) -> None:
        self._pool.release(row.pages)
        row.pages, row.slot = [], -1
