"""The mosaic kernel of ``expert_matmul``, lane by lane on a CPU, against each row times its own expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, lanes, pack_array
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


def test_the_configuration_follows_from_shapes() -> None:
    w = jax.ShapeDtypeStruct((4, 32, 128), jnp.bfloat16)
    for rows in (1, 64, 65, 5000):
        x = jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
        assert mosaic.default_config(x, w, ids).ctas == 132
