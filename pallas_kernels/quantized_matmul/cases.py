"""Named shapes for ``quantized_matmul``: small ones for tests on any machine, and the matrices of Gemma 4."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """w is ``[n, k]``."""

    n: int
    k: int


# The odd ones: K with super-blocks of 256, 64, 64 and 32, and N that no tile divides.
SMALL: dict[str, Case] = {
    "small_256": Case(48, 256),
    "small_704": Case(33, 704),
    "small_2112": Case(16, 2112),
    "small_96": Case(7, 96),
    "small_packed": Case(32, 192),
}

REAL: dict[str, Case] = {
    "e2b_sliding_qkv": Case(2560, 1536),
    "e2b_wide_down": Case(1536, 12288),
    "e4b_sliding_qkv": Case(3072, 2560),
    "e4b_global_o": Case(2560, 4096),
    "e4b_gate_up": Case(20480, 2560),
    "e4b_down": Case(2560, 10240),
    "e4b_ple_gate": Case(256, 2560),
    "e4b_ple_projection": Case(2560, 256),
    "26b_a4b_dense_gate_up": Case(4224, 2816),
    "26b_a4b_dense_down": Case(2816, 2112),
    "31b_gate_up": Case(43008, 5376),
    "e4b_head": Case(262144, 2560),
}

ROWS = (1, 8, 16, 512)
