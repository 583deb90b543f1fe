"""Named shapes for ``expert_down``: small ones for tests on any machine, and the experts of Gemma 4 26B-A4B."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[e, n, f]``; every token has `per_token` experts."""

    e: int
    n: int
    f: int
    per_token: int


SMALL: dict[str, Case] = {
    "small_256": Case(6, 32, 256, 2),
    "small_704": Case(4, 48, 704, 3),
}

REAL: dict[str, Case] = {"26b_a4b": Case(128, 2816, 704, 8)}

TOKENS = (1, 8, 512)
