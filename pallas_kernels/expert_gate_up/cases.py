"""Named shapes for ``expert_gate_up``: small ones for tests on any machine, and the experts of Gemma 4 26B-A4B."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[e, 2 f, k]``; every token has `per_token` experts."""

    e: int
    f: int
    k: int
    per_token: int


SMALL: dict[str, Case] = {
    "small_256": Case(6, 32, 256, 2),
    "small_192": Case(4, 16, 192, 3),
}

REAL: dict[str, Case] = {"26b_a4b": Case(128, 704, 2816, 8)}

TOKENS = (1, 8, 512)
