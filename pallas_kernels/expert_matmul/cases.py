"""Named shapes for ``expert_matmul``: small ones for tests on any machine, and the experts of Gemma 4 26B-A4B."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[e, n, k]``; ``per_token`` rows of x come from one token."""

    e: int
    n: int
    k: int
    per_token: int


SMALL: dict[str, Case] = {
    "small_256": Case(6, 24, 256, 2),
    "small_704": Case(4, 33, 704, 2),
    "small_96": Case(3, 7, 96, 1),
}

REAL: dict[str, Case] = {
    "26b_a4b_gate_up": Case(128, 1408, 2816, 8),
    "26b_a4b_down": Case(128, 2816, 704, 8),
}

TOKENS = (1, 8, 512)
