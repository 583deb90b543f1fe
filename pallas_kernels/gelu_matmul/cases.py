"""Named shapes for ``gelu_matmul``: small ones for tests on any machine, and the gates of Gemma 4's embeddings."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[n, k]``."""

    n: int
    k: int


SMALL: dict[str, Case] = {"small_256": Case(48, 256), "small_192": Case(32, 192)}

REAL: dict[str, Case] = {"e2b": Case(256, 1536), "e4b": Case(256, 2560)}

ROWS = (1, 8, 16)
