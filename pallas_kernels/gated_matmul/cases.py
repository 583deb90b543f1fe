"""Named shapes for ``gated_matmul``: small ones for tests on any machine, and the FFNs of Gemma 4."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[2 f, k]``."""

    f: int
    k: int


SMALL: dict[str, Case] = {"small_256": Case(48, 256), "small_192": Case(32, 192)}

REAL: dict[str, Case] = {
    "e2b": Case(6144, 1536),
    "e2b_wide": Case(12288, 1536),
    "e4b": Case(10240, 2560),
    "12b": Case(15360, 3840),
    "26b_a4b_dense": Case(2112, 2816),
    "31b": Case(21504, 5376),
}

ROWS = (1, 8, 16)
