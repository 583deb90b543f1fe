"""Reads tensors, whole or a range of rows at a time, from a folder of single or sharded safetensors.

Files are read with `pread` into buffers of our own and never mapped, so that the memory of a conversion is what its
buffers hold, whatever the size of the checkpoint. Headers are checked here against the size of the file, so that a
truncated or damaged file is an error that names it before the first weight is read.

Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, a JSON header, the data; the
tensors' byte ranges cover the data without gaps).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The dtypes that a decoder's weights come in; others may sit in the file but cannot be read.
READABLE_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_BYTES_PER_ELEMENT = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its name, shape, dtype (safetensors' name of it), file and byte range in that file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows: the product of all axes but the last (1 for a vector)."""
        return math.prod(self.shape[:-1])

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"tensor {self.name!r} in {self.file}"


class SafetensorsSource:
    """The tensors of a checkpoint folder by name.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards that it names.

    Raises:
        FileNotFoundError: no checkpoint in `folder`, or a shard that the index names is missing.
        ValueError: a damaged header or index, a truncated file, byte ranges that overlap or leave gaps, a tensor that
            the index places in a shard that does not hold it. The message names the tensor and the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = _find_tensors(self.folder)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def close(self) -> None:
        """Closes the files that reading has opened."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or some of its rows, as a new array.

        Args:
            name: a name in `tensors`.
            rows: a range without a step over the tensor seen as a matrix ``[prod(shape[:-1]), shape[-1]]``; None for
                the whole tensor in its own shape.

        Returns:
            An array of `shape`, or of ``[number of rows, shape[-1]]``; dtype bfloat16, float16 or float32.

        Raises:
            KeyError: no such tensor.
            ValueError: the tensor is of another dtype, or the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        if rows is None:
            return self.read_elements(name, 0, info.size).reshape(info.shape)
        first, last, step = rows.indices(info.rows)
        if step != 1:
            raise ValueError(f"rows must have no step, got {rows}")
        width = info.shape[-1] if info.shape else 1
        elements = self.read_elements(name, first * width, max(first, last) * width)
        return elements.reshape(-1, width)

    def read_elements(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of the tensor in the order they are stored, as a new vector.

        Raises:
            KeyError: no such tensor.
            ValueError: the tensor is of an unreadable dtype, or the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        dtype = READABLE_DTYPES.get(info.dtype)
        if dtype is None:
            accepted = ", ".join(READABLE_DTYPES)
            raise ValueError(f"{info} has dtype {info.dtype}; accepted: {accepted}")
        array = np.empty(stop - start, dtype)
        self._fill(info, array, info.start + start * dtype.itemsize)
        return array

    def _fill(self, info: TensorInfo, array: np.ndarray, offset: int) -> None:
        if info.file not in self._descriptors:
            self._descriptors[info.file] = os.open(info.file, os.O_RDONLY)
        descriptor = self._descriptors[info.file]
        left = memoryview(array.view(np.uint8))  # memoryview knows nothing of bfloat16
        while left:
            count = os.preadv(descriptor, [left], offset)
            if count == 0:
                raise ValueError(f"{info}: the file ends before the tensor does; it was truncated")
            left, offset = left[count:], offset + count


def _find_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE_FILE).is_file():
        return _read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"no {SINGLE_FILE} and no {INDEX_FILE} in {folder}")
    weight_map = _read_index(folder / INDEX_FILE)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            if not (folder / shard).is_file():
                raise FileNotFoundError(
                    f"shard {shard} is missing from {folder}; {INDEX_FILE} places tensor {name!r} there"
                )
            shards[shard] = _read_header(folder / shard)
        if name not in shards[shard]:
            raise ValueError(
                f"tensor {name!r} is not in {folder / shard}, where {INDEX_FILE} places it"
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors index: {error!r}") from None
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} places tensor {name!r} in {shard!r}, not a file beside it")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, after checking the header against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} is truncated or not safetensors: header of {length} bytes, file of {size}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} has a damaged safetensors header: {error}") from None
    tensors = {name: _tensor_info(name, entry, path, 8 + length) for name, entry in header.items()}
    _check_ranges(tensors, path, 8 + length, size)
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} appears twice")
    return entries


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    try:
        start, stop = entry["data_offsets"]
        info = TensorInfo(
            name=name,
            shape=tuple(int(size) for size in entry["shape"]),
            dtype=str(entry["dtype"]),
            file=path,
            start=data_start + int(start),
            stop=data_start + int(stop),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"tensor {name!r} in {path} has a damaged header entry: {error!r}"
        ) from None
    itemsize = _BYTES_PER_ELEMENT.get(info.dtype)
    if min(info.shape, default=0) < 0 or info.nbytes < 0:
        raise ValueError(f"{info} has a negative size: shape {info.shape}, {info.nbytes} bytes")
    if itemsize is not None and info.nbytes != itemsize * math.prod(info.shape):
        raise ValueError(
            f"{info} has {info.nbytes} bytes; shape {info.shape} in {info.dtype} needs "
            f"{itemsize * math.prod(info.shape)}"
        )
    return info


def _check_ranges(tensors: dict[str, TensorInfo], path: Path, start: int, size: int) -> None:
    """Checks that the byte ranges cover the data from `start` to the end of the file, each byte once."""
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            fault = (
                "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            )
            raise ValueError(f"{info} {fault}: it starts at byte {info.start}, expected {end}")
        if info.stop > size:
            raise ValueError(
                f"{info} ends at byte {info.stop} but the file has {size}: it is truncated"
            )
        end = info.stop
    if end != size:
        raise ValueError(f"{path} has {size} bytes, of which its header describes {end}")
