"""Named shapes for ``embedding_lookup``: token and per-layer embedding tables."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[v, k]``."""

    v: int
    k: int


SMALL: dict[str, Case] = {"small_256": Case(40, 256), "small_704": Case(9, 704)}

REAL: dict[str, Case] = {
    "e4b_embed": Case(262144, 2560),
    "e4b_ple": Case(262144, 10752),
    "26b_a4b_embed": Case(262144, 2816),
}

ROWS = (1, 512)
