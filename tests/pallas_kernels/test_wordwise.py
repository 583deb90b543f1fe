"""The word-wise products as GPUs run them, in every form, against the dequantized matrix in float64.

Calls the form by name: on a CPU `weighted_sums` takes another.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize, wordwise, wordwise_cpu
from pallas_kernels.arrays import FORMATS, Q4K

# Least matrix sizes of the two forms without conversion, such that the matrices below take each.
FORMS = {"small": (1 << 62, 1 << 62), "large": (0, 1 << 62), "huge": (0, 0)}


@pytest.mark.parametrize("k", [256, 704, 2112, 2560])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("format", FORMATS)
def test_sums_are_those_of_the_dequantized_matrix(
    format: str, dtype: jnp.dtype, form: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wordwise, "_LARGE", FORMS[form][0])
    monkeypatch.setattr(wordwise, "_HUGE", FORMS[form][1])
    rng = np.random.default_rng(k)
    w = quantize(jnp.asarray(rng.standard_normal((24, k), dtype=np.float32) + 0.5), format)
    x = jnp.asarray(rng.standard_normal(k), dtype)
    have = np.asarray(wordwise._sums_in_one_step(x[None], w))[0]
    values, xs = np.asarray(w.dequantize(), np.float64), np.asarray(x, np.float64)
    # Each of the k products takes part in at most k / 8 + 40 additions, whose roundings of 2**-24 add up like a random
    # walk, four deviations of it. Where a code is read as 1 + q / 256, what is added is up to 272 / 15 times the code's
    # own range, and that is at most the range of the row.
    span = np.ptp(values, axis=1) if format == "q4k" else np.abs(values).max(axis=1)
    walk = np.sqrt(k / 8 + 40) * np.linalg.norm(xs) * span * (272 / 15 if form != "small" else 2)
    bound = 4 * 2.0**-24 * walk
    assert np.all(bound < np.abs(values).mean(axis=1) / 4)  # one code that is read wrongly shows
    assert np.all(np.abs(have - values @ xs) <= bound)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_batch_and_of_experts_are_those_of_one(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Siblings over one matrix, and vmap over both as `expert_matmul` calls it."""
    monkeypatch.setattr(wordwise, "_LARGE", FORMS[form][0])
    monkeypatch.setattr(wordwise, "_HUGE", FORMS[form][1])
    rng = np.random.default_rng(1)
    w = quantize(jnp.asarray(rng.standard_normal((3, 16, 256), dtype=np.float32)), "q4k")
    x = jnp.asarray(rng.standard_normal((3, 1, 256)), jnp.bfloat16)
    want = [wordwise._sums_in_one_step(x[i], w[i]) for i in range(3)]
    have = jax.vmap(wordwise._sums_in_one_step)(x, w)
    np.testing.assert_array_equal(have, jnp.stack(want))
    siblings = wordwise._sums_in_one_step(x[:, 0], w[1])
    np.testing.assert_array_equal(siblings[1], want[1][0])


@pytest.mark.parametrize(
    ("rows", "words", "parts"), [(256, 320, 8), (2560, 1280, 2), (6144, 320, 1), (64, 88, 2)]
)
def test_short_matrices_are_split_along_k(rows: int, words: int, parts: int) -> None:
    """Enough sums for a GPU, and never fewer than 40 words in one."""
    assert wordwise._parts(rows, words) == parts


@pytest.mark.parametrize("k", [256, 704, 768, 2112])
@pytest.mark.parametrize("format", FORMATS)
def test_sums_as_a_cpu_runs_them(format: str, k: int) -> None:
    rng = np.random.default_rng(k)
    w = quantize(jnp.asarray(rng.standard_normal((24, k), dtype=np.float32)), format)
    x = jnp.asarray(rng.standard_normal((2, k)), jnp.float32)
    have = np.asarray(wordwise_cpu.weighted_sums(x, w))
    values, xs = np.asarray(w.dequantize(), np.float64), np.asarray(x, np.float64)
    # At most k / 16 + 40 roundings; Q4K's minimum and Q6K's 32 are sums of their own, of up to twice the terms' size.
    bound = 4 * 2.0**-24 * np.sqrt(k / 16 + 40) * 4 * np.abs(values).max() * np.linalg.norm(xs)
    np.testing.assert_allclose(have, xs @ values.T, rtol=0, atol=bound)
    assert bound < np.abs(values).mean() / 4  # one code that is read wrongly shows


def test_a_decode_loop_on_a_cpu_unpacks_no_codes_ahead() -> None:
    """What the loop over tokens carries is no larger than the quantized matrix it was given."""
    w = FORMATS["q4k"].abstract((1024, 1024))

    def loop(x: jax.Array, w: Q4K, steps: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda _, x: wordwise.weighted_sums(x, w), x)

    shape = jax.ShapeDtypeStruct
    program = jax.jit(loop).lower(shape((1, 1024), jnp.float32), w, shape((), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < w.nbytes
