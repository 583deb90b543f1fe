"""Named shapes of Gemma 4's layers, by what the product with W_qkv has, and the rows and queries of a decode step."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """H query heads, K KV heads, head size C, window (None: global), heads of k and v in the product (0, K or 2 K)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    own: int


CASES: dict[str, Case] = {
    "e2b_sliding": Case(8, 1, 256, 512, 2),
    "e2b_global": Case(8, 1, 512, None, 2),
    "e4b_sliding": Case(8, 2, 256, 512, 4),
    "e4b_global": Case(8, 2, 512, None, 4),
    "e4b_sliding_shared": Case(8, 2, 256, 512, 0),
    "e4b_global_shared": Case(8, 2, 512, None, 0),
    "12b_sliding": Case(16, 8, 256, 1024, 16),
    "12b_global": Case(16, 1, 512, None, 1),
    "26b_a4b_sliding": Case(16, 8, 256, 1024, 16),
    "26b_a4b_global": Case(16, 2, 512, None, 2),
    "31b_sliding": Case(32, 16, 256, 1024, 32),
    "31b_global": Case(32, 4, 512, None, 4),
}
