"""Every implementation of ``residual_norm`` against float64."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lanes
from pallas_kernels.residual_norm import IMPLEMENTATIONS, Pending, residual_norm
from pallas_kernels.residual_norm.cases import SMALL, Case

EPS = 1e-6


def inputs(case: Case, rows: tuple[int, ...], weight_dtype: Any) -> tuple[Pending, tuple[Any, ...]]:
    rng = np.random.default_rng(3)

    def vector() -> jax.Array:
        return jnp.asarray(rng.standard_normal((*rows, case.hidden)) * 5, jnp.float32)

    def weight() -> jax.Array:
        return jnp.asarray(rng.uniform(0.5, 2, case.hidden), weight_dtype)

    stream = Pending(
        vector(),
        tuple((vector(), weight()) for _ in range(case.branches)),
        weight() if case.outer else None,
        jnp.asarray([0.7], jnp.float32) if case.scalar else None,
    )
    return stream, (None, *(weight() for _ in range(case.norms)))


def exact(stream: Pending, norms: tuple[Any, ...]) -> list[np.ndarray]:
    stream, norms = jax.tree.map(lambda x: np.asarray(x, np.float64), (stream, norms))

    def norm(v: np.ndarray, w: np.ndarray) -> np.ndarray:
        return v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + EPS) * w

    z = sum(norm(y, w) for y, w in stream.branches)
    z = norm(z, stream.outer) if stream.outer is not None else z
    h = (stream.h + z) * (1 if stream.scalar is None else stream.scalar)
    return [h, *(h if w is None else norm(h, w) for w in norms)]


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_definition(
    implementation: str, dtype: Any, rows: tuple[int, ...], case: str
) -> None:
    stream, norms = inputs(SMALL[case], rows, dtype)
    run = jax.jit(
        lambda s, n: residual_norm(s, n, dtype=dtype, eps=EPS, implementation=implementation)
    )
    with lanes.interpreted():
        h, out = run(stream, norms)
    assert h.dtype == jnp.float32
    assert {x.dtype for x in out} == {jnp.dtype(dtype)}
    for have, want in zip((h, *out), exact(stream, norms), strict=True):
        # A dozen roundings of float32 and, of the mean, half as many relative errors as its terms have at most; then
        # one rounding to the type of the result.
        last = float(jnp.finfo(have.dtype).eps) / 2
        scale = np.abs(want) + 5
        assert np.all(np.abs(np.asarray(have, np.float64) - want) <= (24 * 2.0**-24 + last) * scale)


def test_errors_name_the_argument() -> None:
    stream, norms = inputs(SMALL["small_64"], (1,), jnp.float32)
    with pytest.raises(ValueError, match=re.escape("y_0 is float32[64]: expected float32[1, 64]")):
        residual_norm(stream.replace(branches=((stream.h[0], norms[1]),)), norms, dtype=jnp.float32)
    with pytest.raises(ValueError, match=re.escape("a weight has shape (32,): expected (64,)")):
        residual_norm(stream, (norms[1][:32],), dtype=jnp.float32)
    with pytest.raises(ValueError, match="outer is given, but no branch"):
        residual_norm(Pending(stream.h, outer=norms[1]), norms, dtype=jnp.float32)
    with pytest.raises(ValueError, match="the stream has 17 rows: expected 1 to 16"):
        residual_norm(
            Pending(jnp.zeros((17, 64))), norms, dtype=jnp.float32, implementation="mosaic"
        )
