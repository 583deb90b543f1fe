"""Named attention shapes of Gemma 4: heads, KV heads, head size and window of each kind of layer."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """H query heads, K KV heads, head size C, window (None: global)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


CASES: dict[str, Case] = {
    "e2b_sliding": Case(8, 1, 256, 512),
    "e2b_global": Case(8, 1, 512, None),
    "e4b_sliding": Case(8, 2, 256, 512),
    "e4b_global": Case(8, 2, 512, None),
    "12b_sliding": Case(16, 8, 256, 1024),
    "12b_global": Case(16, 1, 512, None),
    "26b_a4b_sliding": Case(16, 8, 256, 1024),
    "26b_a4b_global": Case(16, 2, 512, None),
    "31b_sliding": Case(32, 16, 256, 1024),
    "31b_global": Case(32, 4, 512, None),
}
