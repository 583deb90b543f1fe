"""Named shapes of Gemma 4: D, branches that are added, and norms that are wanted of the sum."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """D, number of branches, whether their sum is normed, whether there is a scalar, number of norms."""

    hidden: int
    branches: int
    outer: bool
    scalar: bool
    norms: int


CASES: dict[str, Case] = {
    "e2b_attention": Case(1536, 1, False, False, 1),
    "e4b_attention": Case(2560, 1, False, False, 1),
    "e4b_layer": Case(2560, 1, False, True, 1),
    "12b_layer": Case(3840, 1, False, True, 1),
    "26b_a4b_attention": Case(2816, 1, False, False, 1),
    "26b_a4b_experts": Case(2816, 0, False, False, 2),
    "26b_a4b_layer": Case(2816, 2, True, True, 1),
    "31b_layer": Case(5376, 1, False, True, 1),
}

SMALL: dict[str, Case] = {
    "small_64": Case(64, 1, False, True, 1),
    "small_1536": Case(1536, 2, True, False, 2),
    "small_520": Case(520, 0, False, False, 1),
}
