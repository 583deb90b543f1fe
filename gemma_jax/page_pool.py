"""Which page of a paged cache belongs to whom, and which prefixes of prompts are still there: the host's side."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class PagePool:
    """Pages ``0 .. count - 1``, each free or held by one or several: rows, and prefixes of prompts."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, which are now held once; there must be as many."""
        pages = [self._free.pop() for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Somebody else holds these pages too."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One of their holders is done with these pages; those without another are free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)


class Prefix(NamedTuple):
    """The K/V of a prompt's first `tokens` tokens: their pages, and the snapshot of the rings after them."""

    tokens: int
    pages: tuple[int, ...]
    snapshot: int


class PrefixCache:
    """Prefixes of prompts, a whole number of chunks long, whose K/V are still on the device.

    A prefix is known by a hash of all its tokens, that of one chunk less among what is hashed. Each holds the pages of
    all its tokens and one snapshot; the one that was not asked for longest gives way.

    Args:
      pool: where the pages are held.
      chunk: tokens, a multiple of the page size.
      snapshots: how many prefixes there is room for.
    """

    def __init__(self, pool: PagePool, chunk: int, snapshots: int) -> None:
        self._pool, self._chunk = pool, chunk
        self._free = list(range(snapshots))
        self._known: OrderedDict[bytes, Prefix] = OrderedDict()

    def find(self, prompt: Sequence[int], limit: int) -> Prefix | None:
        """The longest known prefix of at most `limit` tokens of `prompt`."""
        found = None
        for key in self._keys(prompt, limit):
            found = key if key in self._known else found
        if found is None:
            return None
        self._known.move_to_end(found)
        return self._known[found]

    def add(self, prompt: Sequence[int], tokens: int, pages: Sequence[int]) -> int | None:
        """Remembers the first `tokens` tokens of `prompt`, which lie in `pages`.

        Returns:
          The snapshot to which the rings have to be saved now; None if the prefix is known, or there is no room at all.
        """
        *_, key = self._keys(prompt, tokens)
        if key in self._known:
            return None
        if not self._free and not self.drop_oldest():
            return None
        snapshot = self._free.pop()
        self._known[key] = Prefix(tokens, tuple(pages), snapshot)
        self._pool.share(pages)
        return snapshot

    def drop_oldest(self) -> bool:
        """Forgets the prefix that was not asked for longest, and says whether there was one."""
        if not self._known:
            return False
        _, prefix = self._known.popitem(last=False)
        self._pool.release(prefix.pages)
        self._free.append(prefix.snapshot)
        return True

    def _keys(self, prompt: Sequence[int], limit: int) -> Iterator[bytes]:
        key = b""
        for begin in range(0, limit - self._chunk + 1, self._chunk):
            part = np.asarray(prompt[begin : begin + self._chunk], np.int32)
            key = hashlib.sha256(key + part.tobytes()).digest()
            yield key
