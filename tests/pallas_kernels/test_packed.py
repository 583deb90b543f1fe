"""Fragment order: the same numbers, moved to where the tensor cores take them, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FORMATS, PACKED, pack_array
from pallas_kernels.arrays import unpack
from pallas_kernels.packed import chunk_size, why_not_packed

SHAPES = [(32, 512), (16, 704), (48, 2112), (2, 3, 16, 64)]
PACKABLE = [
    (name, shape)
    for name, cls in FORMATS.items()
    for shape in SHAPES
    if why_not_packed(cls, shape) is None
]


@pytest.mark.parametrize(("weight_format", "shape"), PACKABLE)
def test_unpacking_gives_back_every_bit(weight_format, shape, make_weight) -> None:
    w = make_weight(weight_format, shape)
    packed = pack_array(w).validate()
    assert packed.shape == shape
    for before, after in zip(*map(jax.tree.leaves, (w, packed.unpack().validate())), strict=True):
        assert np.array_equal(before, after)
    assert np.array_equal(packed.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    ("weight_format", "k", "bits"),
    [
        ("q4k", 2560, 4.5),
        ("q4k", 2112, 5.0),
        ("eq8_0", 2560, 8.5),
        ("eq8_0", 704, 8.5),
        ("q6k", 2560, 6.5625),
    ],
)
def test_bits_per_weight(weight_format: str, k: int, bits: float) -> None:
    packed = PACKED[weight_format].abstract((128, k))
    assert packed.bits_per_weight == bits
    assert packed.chunk == chunk_size(k)


def test_a_lane_of_q4k_holds_rows_g_and_g_plus_8_and_columns_8t_to_8t_plus_7(make_weight) -> None:
    w = make_weight("q4k", (32, 512))
    q = np.asarray(unpack(w.codes, 4))
    codes = np.asarray(pack_array(w).codes)
    for lane in (0, 7, 18, 31):
        g, t = lane // 4, lane % 4
        for group in range(2):
            for i in range(2):
                word = int(
                    codes[1, 1, 3, lane, 2 * group + i]
                )  # second row tile, last 64 columns of the row
                for j in range(
                    4
                ):  # register a_j of mma.m16n8k16: row g or g + 8, pair of columns 0 or 1
                    for h in range(2):
                        row = 16 + g + 8 * (j % 2)
                        column = 256 + 192 + 32 * group + 8 * t + 4 * i + 2 * (j // 2) + h
                        assert word >> (4 * j) >> (16 * h) & 15 == q[row, column]


def test_a_lane_of_eq8_0_holds_the_same_columns(make_weight) -> None:
    w = make_weight("eq8_0", (16, 64))
    q = np.asarray(unpack(jax.lax.bitcast_convert_type(w.codes, jnp.uint32), 8))
    codes = np.asarray(pack_array(w).codes)
    for lane in (0, 13, 31):
        for word in range(4):
            for byte in range(4):
                row = lane // 4 + 8 * (byte // 2)
                column = 32 + 8 * (lane % 4) + 2 * word + byte % 2
                assert int(codes[0, 0, 1, lane, word]) >> (8 * byte) & 255 == q[row, column]


@pytest.mark.parametrize("weight_format", FORMATS)
def test_rows_are_those_of_the_array(weight_format: str, make_weight) -> None:
    w = make_weight(weight_format, (48, 512))
    ids = jnp.array([[47, 0, 16], [15, 15, 31]])
    rows = pack_array(w).rows(ids)
    assert rows.shape == (2, 3, 512)
    assert np.array_equal(rows.dequantize(), w.dequantize()[ids])


def test_experts_can_be_indexed_but_not_rows(make_weight) -> None:
    w = make_weight("q4k", (3, 32, 64))
    packed = pack_array(w)
    assert np.array_equal(packed[1].dequantize(), w[1].dequantize())
    with pytest.raises(ValueError, match="only the axes before the last two"):
        packed[1, 0]


@pytest.mark.parametrize(
    ("weight_format", "shape", "reason"),
    [
        ("q4k", (33, 256), "N = 33"),
        ("q4k", (16, 96), "K = 96"),
        ("q4k", (16, 384), "super-blocks of 256 and 64, and this one has 128"),
        ("q6k", (16, 704), "Q6K must be a multiple of 256"),
    ],
)
def test_what_cannot_be_packed_says_why(weight_format, shape, reason, make_weight) -> None:
    with pytest.raises(ValueError, match=reason):
        pack_array(make_weight(weight_format, shape))


def test_damaged_planes_are_named(make_weight) -> None:
    packed = pack_array(make_weight("eq8_0", (16, 256)))
    with pytest.raises(ValueError, match=r"PackedEQ8_0.header is uint32\[1, 1, 16, 3\]"):
        packed.replace(header=packed.header[..., :3]).validate()


def test_whole_tiles_can_be_cut_out(make_weight) -> None:
    w = make_weight("q4k", (64, 256))
    packed = pack_array(w)
    assert np.array_equal(packed[16:48].dequantize(), w[16:48].dequantize())
    with pytest.raises(ValueError, match="multiples of 16 rows"):
        packed[8:24]
