"""Reading safetensors: values, ranges of rows, and every way in which a file can be damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.safetensors_source import SafetensorsSource

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path.parent


def entry(start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4], "data_offsets": [start, stop]}


def fails(folder: Path, *parts: str) -> None:
    """Expects one ValueError that has all `parts` in its message, in order."""
    with pytest.raises(ValueError, match=".*".join(re.escape(part) for part in parts)):
        SafetensorsSource(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4), (0, 4)])
def test_reads_what_safetensors_wrote(
    tmp_path: Path, numbers: np.random.Generator, shape: tuple[int, ...], dtype: Any
) -> None:
    tensors = {name: np.asarray(numbers.normal(size=shape), dtype) for name in ("a", "b.c")}
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source:
        assert set(source) == set(tensors)
        for name, expected in tensors.items():
            assert source[name].shape == shape
            read = source.read(name)
            assert read.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected)


def test_reads_ranges_of_rows(tmp_path: Path, numbers: np.random.Generator) -> None:
    w = numbers.normal(size=(4, 6, 5)).astype(np.float32)
    save_file({"before": np.ones(3, np.float32), "w": w}, tmp_path / "model.safetensors")
    rows = w.reshape(-1, 5)
    with SafetensorsSource(tmp_path) as source:
        for part in (slice(0, 1), slice(5, 17), slice(20, 99), slice(None), slice(7, 7)):
            np.testing.assert_array_equal(source.read("w", part), rows[part])
        with pytest.raises(ValueError, match="step"):
            source.read("w", slice(0, 9, 2))


def test_a_dtype_that_is_not_a_weight_cannot_be_read(tmp_path: Path) -> None:
    save_file({"ids": np.arange(3)}, tmp_path / "model.safetensors")
    with (
        SafetensorsSource(tmp_path) as source,
        pytest.raises(ValueError, match=r"'ids'.*I64.*BF16"),
    ):
        source.read("ids")


def test_truncated_file_names_tensor_and_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(100, np.float32), "z": np.ones(100, np.float32)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    fails(tmp_path, "'z'", str(path), "truncated")
    path.write_bytes(whole[:20])
    fails(tmp_path, str(path), "truncated")
    path.write_bytes(b"abc")
    fails(tmp_path, str(path), "truncated")


def test_file_truncated_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(100, np.float32)}, path)
    with SafetensorsSource(tmp_path) as source:
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match=f"'a' in {path}.*truncated"):
            source.read("a")


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fails(write_raw(path, {"a": entry(0, 8)}, bytes(9)), str(path), "describes")


def test_overlapping_ranges_and_gaps_name_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fails(write_raw(path, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b'", "overlaps")
    fails(write_raw(path, {"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "'b'", "gap")
    fails(write_raw(path, {"a": entry(4, 8)}, bytes(8)), "'a'", "gap")


def test_shape_and_byte_range_disagree(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    wrong = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    fails(write_raw(path, {"a": wrong}, bytes(8)), "'a'", "8 bytes", "(3,)", "needs 12")
    negative = {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}
    fails(write_raw(path, {"a": negative}, bytes(8)), "'a'", "negative")


@pytest.mark.parametrize(
    "broken", [{}, {"dtype": "F32", "shape": [2], "data_offsets": [0]}, 3, {"shape": "x"}]
)
def test_damaged_header_entry_names_the_tensor(tmp_path: Path, broken: Any) -> None:
    path = tmp_path / "model.safetensors"
    fails(write_raw(path, {"a": broken}, b""), "'a'", str(path), "header entry")


@pytest.mark.parametrize(
    "header", [b"{not json", b"[1]", b'{"a": 1, "a": 2}', b"\xff\xfe\x00"], ids=str
)
def test_damaged_header_names_the_file(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    fails(write_raw(path, header, b""), str(path), "header")


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        SafetensorsSource(tmp_path)


def write_shards(folder: Path, weight_map: Any) -> Path:
    save_file({"a": np.ones(2, np.float32)}, folder / "one.safetensors")
    save_file({"b": np.full(2, 2, np.float32)}, folder / "two.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with SafetensorsSource(tmp_path) as source:
        assert [source.read(name)[0] for name in ("a", "b")] == [1, 2]
        assert source["b"].file == tmp_path / "two.safetensors"


def test_missing_shard_is_named_with_a_tensor_of_it(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "one.safetensors", "b": "three.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"three\.safetensors.*'b'"):
        SafetensorsSource(tmp_path)


def test_tensor_in_the_index_but_not_in_its_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "two.safetensors", "b": "two.safetensors"})
    fails(tmp_path, "'a'", str(tmp_path / "two.safetensors"))


def test_index_must_not_point_outside_the_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "../one.safetensors"})
    fails(tmp_path, "'a'", "../one.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index_names_the_file(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    fails(tmp_path, str(index))
