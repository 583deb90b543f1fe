"""Named shapes for ``argmax_matmul``: small ones for tests on any machine, and the heads of Gemma 4."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[n, k]``."""

    n: int
    k: int


SMALL: dict[str, Case] = {"small_256": Case(112, 256), "small_192": Case(48, 192)}

REAL: dict[str, Case] = {
    "e2b": Case(262144, 1536),
    "e4b": Case(262144, 2560),
    "26b_a4b": Case(262144, 2816),
    "31b": Case(262144, 5376),
}

ROWS = (1, 8)
