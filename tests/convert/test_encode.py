"""Encoding in pieces: the same planes as quantizing the whole, the errors as measured, nothing infinite let through."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import encode
from convert.encode import Encoded, Encoder, as_weight
from convert.huggingface import Parameter
from convert.policy import AS_STORED, BF16
from convert.safetensors_source import SafetensorsSource
from pallas_kernels import quantize, relative_error


def encode_tensors(folder: Path, format: str, *tensors: np.ndarray, **options: Any) -> Encoded:
    """Encodes one parameter that consists of `tensors`, one after the other along the first axis."""
    named = {f"t{i}": tensor for i, tensor in enumerate(tensors)}
    save_file(named, folder / "model.safetensors")
    shape = (sum(len(t) for t in tensors), *tensors[0].shape[1:])
    dtype = np.dtype(jnp.result_type(*(t.dtype for t in tensors)))
    with SafetensorsSource(folder) as source, Encoder(source, **options) as encoder:
        found = Parameter("layers_0/x", shape, dtype, tuple(source[name] for name in named))
        return encoder.encode(found, format)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 2048 elements, slabs of 4096, so that small matrices take many."""
    monkeypatch.setattr(encode, "_PIECE", 2048)
    monkeypatch.setattr(encode, "_SLAB", 4096)


# Super-blocks of 256, 64 and 32; 96 and 224 have an odd number of blocks, which share bytes in Q4K.
@pytest.mark.parametrize(
    ("format", "k"), [("q4k", 512), ("q4k", 192), ("q4k", 96), ("eq8_0", 96), ("q6k", 224)]
)
@pytest.mark.usefixtures("small_pieces")
def test_pieces_give_the_planes_of_the_whole(
    tmp_path: Path, numbers: np.random.Generator, format: str, k: int
) -> None:
    parts = [numbers.normal(size=(n, k)).astype(ml_dtypes.bfloat16) for n in (37, 5, 11)]
    encoded = encode_tensors(tmp_path, format, *parts)
    whole = jnp.asarray(np.concatenate(parts))
    expected = quantize(whole, format)
    weight = as_weight(format, encoded.planes)
    assert weight.shape == whole.shape
    # Two programs may round a sum differently and so break a tie between scales; all else must agree.
    for name, plane in vars(expected).items():
        assert np.mean(np.asarray(plane) != np.asarray(getattr(weight, name))) < 1e-3, name
    # Float32 sums of k squares lose at most k * 2**-24 of themselves, their roots half of that.
    expected_error = relative_error(whole, weight)
    assert encoded.entry.relative_error == pytest.approx(expected_error, rel=k * 2.0**-23)
    assert encoded.entry.nbytes == weight.nbytes
    assert encoded.entry.format == format


@pytest.mark.usefixtures("small_pieces")
def test_stacked_experts_keep_their_axes(tmp_path: Path, numbers: np.random.Generator) -> None:
    w = numbers.normal(size=(5, 6, 96)).astype(np.float32)
    weight = as_weight("eq8_0", encode_tensors(tmp_path, "eq8_0", w).planes)
    assert weight.shape == w.shape
    # Half a step of the coarsest block, 4 / 127, moved by at most 9 % by the search.
    np.testing.assert_allclose(weight[3].dequantize(), w[3], atol=np.abs(w).max() / 127 / 2 * 1.1)


def test_a_tensor_of_several_slabs_at_the_real_sizes(
    tmp_path: Path, numbers: np.random.Generator
) -> None:
    """2.2 slabs, the last piece partly empty."""
    rows = int(2.2 * encode._SLAB / 4096)
    w = numbers.normal(size=(rows, 4096)).astype(ml_dtypes.bfloat16)
    sizes: list[int] = []
    encoded = encode_tensors(tmp_path, "eq8_0", w, on_bytes=sizes.append)
    assert len(sizes) == 3
    assert sum(sizes) == w.nbytes
    values = as_weight("eq8_0", encoded.planes).dequantize()
    # Plain 8-bit rounding loses half a step of amax / 127 per element at most, and the search no more in sum.
    blocks = w.astype(np.float32).reshape(-1, 32)
    bound = np.abs(blocks).max(1) / 127 / 2 * np.sqrt(32)
    lost = np.linalg.norm(blocks - np.asarray(values).reshape(-1, 32), axis=1)
    assert np.all(lost <= bound * 1.001)


def test_plain_arrays_are_kept_bit_by_bit(tmp_path: Path, numbers: np.random.Generator) -> None:
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        w = numbers.normal(size=(9, 7)).astype(dtype)
        encoded = encode_tensors(tmp_path, AS_STORED, w)
        np.testing.assert_array_equal(encoded.planes["value"], w)
        assert encoded.entry.format == w.dtype.name
        assert encoded.entry.relative_error == 0


def test_float32_is_rounded_to_bf16_and_the_loss_measured(
    tmp_path: Path, numbers: np.random.Generator
) -> None:
    w = numbers.normal(size=(9, 7)).astype(np.float32)
    encoded = encode_tensors(tmp_path, BF16, w)
    rounded = w.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(encoded.planes["value"], rounded)
    expected = np.linalg.norm(w - rounded.astype(np.float32)) / np.linalg.norm(w)
    assert encoded.entry.relative_error == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 2**-8


def test_parts_of_different_dtypes_take_the_wider(tmp_path: Path) -> None:
    parts = np.full((2, 4), 1 / 3, np.float32), np.ones((1, 4), ml_dtypes.bfloat16)
    encoded = encode_tensors(tmp_path, AS_STORED, *parts)
    assert encoded.entry.format == "float32"
    np.testing.assert_array_equal(encoded.planes["value"][0], parts[0][0])


def test_hashes_are_those_of_the_tensors_bytes(tmp_path: Path) -> None:
    import hashlib

    parts = [np.full((3, 32), i, np.float32) for i in range(2)]
    encoded = encode_tensors(tmp_path, "eq8_0", *parts, hash_tensors=True)
    expected = {f"t{i}": hashlib.sha256(p.tobytes()).hexdigest() for i, p in enumerate(parts)}
    assert encoded.hashes == expected


@pytest.mark.parametrize("format", ["q4k", "eq8_0", BF16, AS_STORED])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_name_and_place(
    tmp_path: Path, format: str, dtype: Any, bad: float
) -> None:
    good, broken = np.ones((4, 64), dtype), np.ones((3, 64), dtype)
    broken[2, 17] = bad
    message = f"'t1' in {tmp_path / 'model.safetensors'} holds {bad} at index [2, 17]"
    with pytest.raises(ValueError, match=re.escape(message.replace("-nan", "nan"))):
        encode_tensors(tmp_path, format, good, broken)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_largest_and_smallest_numbers_are_not_taken_for_infinite(
    tmp_path: Path, dtype: Any
) -> None:
    info = ml_dtypes.finfo(dtype)
    w = np.array(
        [[float(info.max), float(info.min), float(info.smallest_subnormal), -0.0] * 8], dtype
    )
    encode_tensors(tmp_path, AS_STORED, w)


def test_values_too_large_for_the_format_are_refused(tmp_path: Path) -> None:
    w = np.full((1, 32), np.finfo(np.float32).max, np.float32)
    with pytest.raises(ValueError, match=r"'t0'.*bfloat16 cannot hold"):
        encode_tensors(tmp_path, BF16, w)
    with pytest.raises(ValueError, match=r"'t0'.*too large for eq8_0"):
        encode_tensors(tmp_path, "eq8_0", w)


def test_planes_that_do_not_fit_their_format_are_refused() -> None:
    good = {"codes": np.zeros((2, 16), np.int32), "scale": np.zeros((2, 2), np.float16)}
    as_weight("eq8_0", good)
    with pytest.raises(ValueError, match="scale"):
        as_weight("eq8_0", good | {"scale": np.zeros((2, 3), np.float16)})
    with pytest.raises(ValueError, match="codes"):
        as_weight("eq8_0", good | {"codes": np.zeros((2, 16), np.float32)})
    with pytest.raises(ValueError, match="planes"):
        as_weight("q4k", good)
    with pytest.raises(ValueError, match="bfloat16"):
        as_weight("bfloat16", {"value": np.zeros(3, np.float32)})
