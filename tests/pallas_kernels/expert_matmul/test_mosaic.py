"""The mosaic kernels of ``expert_matmul``, lane by lane on a CPU, against each row times its own expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, expert_prefill, lanes, pack_array, prefill_matmul, target
from pallas_kernels.decode_matmul import Config
from pallas_kernels.expert_matmul import mosaic

# ids: out of order and repeated; more than 64 in blocks of 8, then of 16, where one expert has none and one has many.
IDS = {
    "few": [5, 0, 3, 3, 1],
    "blocks_of_8": [*[5] * 9, *np.random.default_rng(0).integers(0, 4, 60)],
    "blocks_of_16": [*[2] * 33, *np.random.default_rng(1).integers(0, 2, 60)],
}


@pytest.mark.parametrize(
    ("weight_format", "ids", "experts", "n", "k", "config"),
    [
        ("q4k", "few", 6, 48, 256, None),
        ("eq8_0", "few", 6, 48, 256, Config(tiles=1, warpgroups=1, ctas=2)),
        ("eq8_0", "few", 6, 32, 192, Config(tiles=2, warpgroups=2, ctas=1, units=2)),
        ("bf16", "few", 6, 32, 704, Config(tiles=4, warpgroups=1, ctas=2)),
        ("q6k", "few", 6, 16, 256, Config(tiles=1, warpgroups=1, ctas=2)),
        ("q4k", "blocks_of_8", 24, 16, 192, Config(tiles=2, warpgroups=1, ctas=2, units=3)),
        ("eq8_0", "blocks_of_8", 24, 32, 64, Config(tiles=4, warpgroups=1, ctas=2)),
        ("q4k", "blocks_of_16", 4, 16, 192, Config(tiles=4, warpgroups=1, ctas=2)),
        ("bf16", "blocks_of_16", 4, 32, 128, Config(tiles=2, warpgroups=1, ctas=2)),
    ],
)
def test_every_row_meets_its_own_expert(
    weight_format, ids, experts, n, k, config, make_weight, kernel_tolerance
) -> None:
    w = make_weight(weight_format, (experts, n, k))
    rows = np.array(IDS[ids], np.int32)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((len(rows), k)), jnp.bfloat16)
    packed = pack_array(w) if weight_format in FORMATS else w
    with lanes.interpreted():
        got = jax.jit(lambda *a: mosaic.expert_matmul(*a, config))(x, packed, rows)
    values = np.asarray(w.dequantize() if weight_format in FORMATS else w, np.float64)
    x64 = np.asarray(x, np.float64)
    want = np.einsum("mk,mnk->mn", x64, values[rows])
    tolerance = np.einsum("mk,mnk->mn", np.abs(x64), kernel_tolerance(w)[rows])
    assert (got.shape, got.dtype) == ((len(rows), n), jnp.float32)
    assert np.all(np.abs(got - want) <= tolerance)


PREFILL = prefill_matmul.Config
# Blocks in use and not; one that ends where the next expert begins, one that the array ends; an expert without rows.
MANY = [*[2] * 35, *[0] * 32, *[5] * 3, *np.random.default_rng(3).integers(3, 5, 20)]


@pytest.mark.parametrize(
    ("weight_format", "n", "k", "config"),
    [
        ("q4k", 48, 256, PREFILL(32, stages=3)),
        ("q4k", 144, 64, PREFILL(32, stages=4)),  # a second block of w; chunks of 64
        ("eq8_0", 16, 320, PREFILL(64, splits=2, stages=3)),
        ("bf16", 80, 192, PREFILL(128, stages=3)),
    ],
)
def test_many_rows_meet_their_experts_weights_rounded_to_bfloat16_once(
    weight_format, n, k, config, make_weight, sum_tolerance
) -> None:
    w = make_weight(weight_format, (6, n, k))
    ids = np.random.default_rng(4).permutation(MANY).astype(np.int32)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((len(ids), k)), jnp.bfloat16)
    packed = pack_array(w) if weight_format in FORMATS else w
    with lanes.interpreted():
        got = jax.jit(lambda *a: mosaic.expert_matmul(*a, config))(x, packed, ids)
    values = w.dequantize(jnp.bfloat16) if weight_format in FORMATS else w
    x64, w64 = np.asarray(x, np.float64), np.asarray(values, np.float64)[ids]
    want = np.einsum("mk,mnk->mn", x64, w64)
    scale = np.einsum("mk,mnk->mn", np.abs(x64), np.abs(w64))
    assert (got.shape, got.dtype) == ((len(ids), n), jnp.float32)
    assert np.all(np.abs(got - want) <= sum_tolerance(k) * scale)


def test_rows_an_expert_and_the_gpu_decide_which_kernel_serves() -> None:
    w = jax.ShapeDtypeStruct((4, 32, 128), jnp.bfloat16)

    def config(rows: int):
        x = jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16)
        return mosaic.default_config(x, w, jax.ShapeDtypeStruct((rows,), jnp.int32))

    with target.compiling_for(target.HOPPER):
        assert isinstance(config(4 * 17 - 1), Config)
        assert config(4 * 17) == PREFILL(block_m=64)
        assert config(4 * 100) == PREFILL(block_m=128)
        assert "67 rows for 4 experts: expected 17 each" in expert_prefill.why_not(w, 67)
    with target.compiling_for("10.0"):
        assert isinstance(config(4 * 1000), Config)
        assert "compute capability 10.0: wgmma is Hopper's" in expert_prefill.why_not(w, 4000)


def test_the_configuration_follows_from_shapes() -> None:
    w = jax.ShapeDtypeStruct((4, 32, 128), jnp.bfloat16)
    for rows in (1, 64, 65, 5000):
        x = jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
        assert mosaic.default_config(x, w, ids).ctas == 132
