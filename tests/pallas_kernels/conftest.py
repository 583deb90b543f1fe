"""Weights in every format, and how far two right answers may lie apart."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, Q4K, Weight, quantize

WEIGHT_FORMATS = (*FORMATS, "bf16", "f32")


@pytest.fixture
def make_weight() -> Callable[..., Weight]:
    """``make_weight(format, shape, seed)``: normal weights in that format."""

    def make(weight_format: str, shape: tuple[int, ...], seed: int = 0) -> Weight:
        w = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
        if weight_format in FORMATS:
            return quantize(w, weight_format)
        return w.astype(jnp.bfloat16 if weight_format == "bf16" else jnp.float32)

    return make


@pytest.fixture
def magnitudes() -> Callable[[Weight], np.ndarray]:
    """The size of what is added up per weight: |w|, for Q4K |scale * q| + |minimum| <= |w| + 2 |minimum|."""

    def of(w: Weight) -> np.ndarray:
        if not isinstance(w, Q4K):
            return np.abs(np.asarray(w.dequantize() if hasattr(w, "dequantize") else w, np.float32))
        minimum = np.repeat(np.asarray(w.block_scales()[1]), 32, axis=-1)
        return np.abs(np.asarray(w.dequantize())) + 2 * minimum

    return of


@pytest.fixture
def sum_tolerance() -> Callable[[int], float]:
    """Relative to ``sum |x w|``, how far two float32 sums of K products may differ by order alone.

    Each of K roundings is at most 2**-24 of a partial sum; if they are independent, the total is below
    8 sqrt(K) 2**-24 with a probability of 1 - 2 exp(-32) (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Twice,
    because there are two sums. One weight's code off by one would move the result by more.
    """
    return lambda k: 2 * 8 * np.sqrt(k) * 2.0**-24


@pytest.fixture
def kernel_tolerance(magnitudes, sum_tolerance) -> Callable[[Weight], np.ndarray]:
    """Per |x| and weight, how far a sum of a mosaic kernel may be off.

    As any float32 sum of K products, and for Q4K by what comes of adding 128 to its codes and taking it away again
    within the 512 products of a chunk (64 of a group where that is all): half of those are of the 128 alone.
    """

    def of(w: Weight) -> np.ndarray:
        tolerance = sum_tolerance(w.shape[-1]) * magnitudes(w)
        if not isinstance(w, Q4K):
            return tolerance
        scale = np.repeat(np.asarray(w.block_scales()[0]), 32, axis=-1)
        return tolerance + sum_tolerance(512 if w.shape[-1] % 256 == 0 else 64) * 128 * scale

    return of


@pytest.fixture
def bf16_rounding() -> float:
    """Relative to ``sum |x w|``, what rounding the weights to bfloat16 may cost: half a unit of 8 bits."""
    return float(jnp.finfo(jnp.bfloat16).eps) / 2


@pytest.fixture
def offset_rounding() -> Callable[[str], float]:
    """Relative to ``sum |x w|``, what adding 128 (Q6K: 160) to codes on tensor cores and taking it away again may cost.

    A chunk's eight groups (Q6K: a group's 16 products) are added up in float32 before the offset goes, each rounding at
    most 2**-24 of ``sum (offset + q) |x|``. Over
    independent x, ``sum |x w|`` is at least ``scale * E|q - mean| * sum |x|``, and E|q - mean| of normal weights is a
    quarter of the range of Q4K, and a tenth of that of the others, whose scale follows the largest of 16 or 32.
    """
    typical = {"q4k": 16 / 4, "q6k": 64 / 10}
    offsets = {"q4k": 128 + 15, "q6k": 160 + 63}

    def of(weight_format: str) -> float:
        if weight_format not in offsets:
            return 0.0  # eQ8_0 and bfloat16 are multiplied as they are
        return 8 * 2.0**-24 * offsets[weight_format] / typical[weight_format]

    return of
