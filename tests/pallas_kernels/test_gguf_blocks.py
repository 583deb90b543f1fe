"""GGML's bytes and our planes say the same, to the last bit, both ways."""

from __future__ import annotations

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize
from pallas_kernels.gguf_blocks import BLOCKS, from_blocks, to_blocks

GGML = {
    "q4k": gguf.GGMLQuantizationType.Q4_K,
    "eq8_0": gguf.GGMLQuantizationType.Q8_0,
    "q6k": gguf.GGMLQuantizationType.Q6_K,
}
# where the float16 scales of a block are, so that random bytes do not make NaNs of them
SCALES = {"q4k": (0, 2), "eq8_0": (0,), "q6k": (208,)}


def _random_blocks(name: str, rows: int = 5, per_row: int = 3) -> np.ndarray:
    rng = np.random.default_rng(11)
    blocks = rng.integers(0, 256, (rows, per_row, BLOCKS[name][1]), dtype=np.uint8)
    for at in SCALES[name]:
        scale = rng.standard_normal((rows, per_row, 1)).astype(np.float16)
        blocks[..., at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_survive_the_round_trip_byte_for_byte(name: str) -> None:
    blocks = _random_blocks(name)
    array = from_blocks(blocks, name).validate()
    assert array.shape == (5, 3 * BLOCKS[name][0])
    np.testing.assert_array_equal(to_blocks(array), blocks)


@pytest.mark.parametrize("name", BLOCKS)
def test_values_are_those_the_gguf_package_reads(name: str) -> None:
    blocks = _random_blocks(name)
    theirs = gguf.quants.dequantize(blocks, GGML[name])
    ours = np.asarray(from_blocks(blocks, name).dequantize())
    # Q4K's multiply and subtract may be one rounding here and two there.
    atol = 2.0**-22 * np.abs(theirs).max() if name == "q4k" else 0
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_we_quantize_the_gguf_package_can_read(name: str) -> None:
    w = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 512)), jnp.float32)
    array = quantize(w, name)
    blocks = to_blocks(array)
    assert blocks.shape == (2, 3, 512 // BLOCKS[name][0] * BLOCKS[name][1])
    theirs = gguf.quants.dequantize(blocks.reshape(6, -1), GGML[name]).reshape(2, 3, 512)
    np.testing.assert_allclose(theirs, array.dequantize(), rtol=0, atol=1e-5)


def test_errors_name_what_was_given() -> None:
    with pytest.raises(ValueError, match="format = 'q5k'"):
        from_blocks(np.zeros((1, 144), np.uint8), "q5k")
    with pytest.raises(ValueError, match=r"uint8\[1, 100\].*multiple of 144 bytes for q4k"):
        from_blocks(np.zeros((1, 100), np.uint8), "q4k")
    with pytest.raises(ValueError, match="int8"):
        from_blocks(np.zeros((1, 144), np.int8), "q4k")
    for name in ("q4k", "q6k"):
        with pytest.raises(ValueError, match="K = 704"):
            to_blocks(quantize(jnp.ones((1, 704)), name))
