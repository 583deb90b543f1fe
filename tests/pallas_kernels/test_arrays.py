"""The formats: their value equations, sizes, shapes, and that they are well-behaved pytrees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arrays import EQ8_0, FORMATS, Q4K, Q6K, pack, super_block_size, unpack

RNG = np.random.default_rng(1)
KS = (32, 96, 64, 128, 704, 2112, 256, 2560)


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """An independent reading of the layout: little-endian bytes, lowest bits first."""
    octets = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little"
    ).reshape(*words.shape[:-1], -1, bits)
    return (octets * 2 ** np.arange(bits)).sum(-1)


@pytest.mark.parametrize("k", KS)
def test_super_block_is_the_largest_that_divides_k(k: int) -> None:
    s = super_block_size(k)
    assert k % s == 0
    assert not any(k % larger == 0 for larger in (64, 128, 256) if larger > s)


@pytest.mark.parametrize("k", [0, 16, 100, -32])
def test_k_that_32_does_not_divide_is_named(k: int) -> None:
    with pytest.raises(ValueError, match=f"K = {k}"):
        super_block_size(k)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_inverts_unpack_and_is_little_endian(bits: int) -> None:
    words = RNG.integers(0, 2**32, (3, 5), dtype=np.uint32)
    fields = unpack(jnp.asarray(words), bits)
    np.testing.assert_array_equal(fields, _fields(words, bits))
    np.testing.assert_array_equal(pack(fields, bits), words)


@pytest.mark.parametrize("k", KS)
def test_q4k_values_follow_the_equation(k: int) -> None:
    s = super_block_size(k)
    q = RNG.integers(0, 16, (2, 3, k))
    sc, m = RNG.integers(0, 64, (2, 2, 3, k // 32))
    d, dmin = RNG.standard_normal((2, 2, 3, k // s)).astype(np.float16)
    array = Q4K.from_fields(*map(jnp.asarray, (q, sc, m, d, dmin)))
    assert array.validate().shape == (2, 3, k)
    np.testing.assert_array_equal(_fields(np.asarray(array.codes), 4), q)

    def spread(per_block: np.ndarray) -> np.ndarray:
        return np.repeat(per_block.astype(np.float32), k // per_block.shape[-1], axis=-1)

    scale, minimum = spread(d) * spread(sc), spread(dmin) * spread(m)
    # The last multiply and subtract may be one rounding (FMA) or two.
    np.testing.assert_allclose(
        array.dequantize(), scale * q - minimum, rtol=0, atol=2.0**-22 * np.abs(scale * 15).max()
    )


@pytest.mark.parametrize("k", KS)
def test_eq8_0_values_follow_the_equation(k: int) -> None:
    q = RNG.integers(-128, 128, (2, 3, k))
    scale = RNG.standard_normal((2, 3, k // 32)).astype(np.float16)
    array = EQ8_0.from_fields(jnp.asarray(q), jnp.asarray(scale))
    assert array.validate().shape == (2, 3, k)
    np.testing.assert_array_equal(np.asarray(array.codes).view(np.int8), q)
    np.testing.assert_array_equal(
        array.dequantize(), q * np.repeat(scale.astype(np.float32), 32, -1)
    )


@pytest.mark.parametrize("k", KS)
def test_q6k_values_follow_the_equation(k: int) -> None:
    s = super_block_size(k)
    q = RNG.integers(0, 64, (2, 3, k))
    sc = RNG.integers(-128, 128, (2, 3, k // 16))
    d = RNG.standard_normal((2, 3, k // s)).astype(np.float16)
    array = Q6K.from_fields(*map(jnp.asarray, (q, sc, d)))
    assert array.validate().shape == (2, 3, k)
    np.testing.assert_array_equal(_fields(np.asarray(array.low), 4), q % 16)
    np.testing.assert_array_equal(_fields(np.asarray(array.high), 2), q // 16)
    scale = np.repeat(d.astype(np.float32), s, -1) * np.repeat(sc.astype(np.float32), 16, -1)
    np.testing.assert_array_equal(array.dequantize(), scale * (q - 32))


@pytest.mark.parametrize("k", KS)
def test_bits_per_weight_come_from_the_planes(k: int) -> None:
    s = super_block_size(k)
    unused_nibble = 4 / k if (k // 32) % 2 else 0
    expected = {
        "q4k": 4 + 12 / 32 + 32 / s + unused_nibble,
        "eq8_0": 8.5,
        "q6k": 6 + 8 / 16 + 16 / s,
    }
    for name, bits in expected.items():
        array = FORMATS[name].abstract((3, 8, k))
        assert array.bits_per_weight == pytest.approx(bits, rel=1e-12)
        assert array.nbytes == round(3 * 8 * k * bits / 8)


@pytest.mark.parametrize("name", FORMATS)
def test_leading_axes_index_scan_and_vmap_like_a_plain_array(name: str, make_weight) -> None:
    w = make_weight(name, (3, 4, 64))
    values = w.dequantize()
    assert (w.shape, w.ndim, w.dtype) == ((3, 4, 64), 3, np.float32)
    np.testing.assert_array_equal(w[1].dequantize(), values[1])
    np.testing.assert_array_equal(w[jnp.array([2, 0])].dequantize(), values[jnp.array([2, 0])])
    np.testing.assert_array_equal(w[0, 1:3].dequantize(), values[0, 1:3])
    _, scanned = jax.lax.scan(lambda _, layer: (None, layer.dequantize()), None, w)
    np.testing.assert_array_equal(scanned, values)
    mapped = jax.vmap(lambda layer: layer.dequantize(jnp.bfloat16))(w)
    np.testing.assert_array_equal(mapped, values.astype(jnp.bfloat16))


@pytest.mark.parametrize("index", [(0, 0, 0), (slice(None), slice(None), 1), ..., (..., 0)])
def test_the_last_axis_cannot_be_indexed(index) -> None:
    with pytest.raises(ValueError, match="only the first 2 axes"):
        Q4K.from_fields(*(jnp.zeros((3, 4, n)) for n in (64, 2, 2, 1, 1)))[index]


def test_planes_that_do_not_fit_are_named_with_both_shapes() -> None:
    good = Q6K.abstract((4, 512))
    with pytest.raises(ValueError, match=r"Q6K\.scales is int8\[4, 31\].*int8\[4, 32\]"):
        good.replace(scales=jax.ShapeDtypeStruct((4, 31), jnp.int8)).validate()
    with pytest.raises(ValueError, match=r"Q6K\.d is float32\[4, 2\].*float16\[4, 2\]"):
        good.replace(d=jax.ShapeDtypeStruct((4, 2), jnp.float32)).validate()
