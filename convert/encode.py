"""Turns a parameter's tensors into planes, a fixed small piece at a time.

    file --pread--> slab (8 MB) --check, hash--> pieces --XLA, a thread per core--> planes

Blocks of a quantized row know nothing of each other, so a matrix is cut without regard to its rows: every piece of
every matrix has one of a few shapes, and a whole checkpoint compiles one program per format and super-block size. On
CPUs pieces are small, because the quantizer passes over its input dozens of times and then finds it in a core's
cache, and because the last piece of a tensor is filled up with zeros (`python -m bench.convert` compares sizes).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.huggingface import Parameter
from convert.manifest import TensorEntry
from convert.policy import AS_STORED, BF16
from convert.safetensors_source import SafetensorsSource, TensorInfo
from convert.storage import Planes
from pallas_kernels.arrays import FORMATS, SUPER_BLOCKS
from pallas_kernels.packed import Weight
from pallas_kernels.quantize import quantize

PLAIN_PLANE = "value"  # the one plane of an array that is not quantized
_PIECE = 2**16
_PIECE_ON_GPU = 2**22  # where launches cost, and caches do not
_SLAB = 2**22
# Sign bit cleared, a value with all exponent bits set is infinite or not a number.
_EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One parameter ready to be stored: its planes, its manifest entry, and sha256 of its tensors by name."""

    planes: Planes
    entry: TensorEntry
    hashes: dict[str, str]


class Encoder:
    """Reads, checks and encodes parameters with a thread per core. A context manager.

    Args:
        source: the checkpoint.
        on_bytes: called with the number of source bytes after each slab.
        hash_tensors: whether to compute the sha256 of each tensor.
    """

    def __init__(
        self,
        source: SafetensorsSource,
        on_bytes: Callable[[int], None] = lambda count: None,
        *,
        hash_tensors: bool = False,
    ) -> None:
        self._source = source
        self._on_bytes = on_bytes
        self._hash_tensors = hash_tensors
        self._threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="encode")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, parameter: Parameter, format: str) -> Encoded:
        """Encodes one parameter.

        Args:
            parameter: what and from which tensors.
            format: as `convert.policy.format_of` gives it.

        Raises:
            ValueError: a tensor holds NaN or an infinity, or does not fit into bfloat16; the message names tensor
                and file.
        """
        hashes: dict[str, str] = {}
        if format in FORMATS:
            planes, squares = self._quantize(parameter, format, hashes)
        else:
            dtype = np.dtype(ml_dtypes.bfloat16) if format == BF16 else parameter.dtype
            assert format in (BF16, AS_STORED)
            planes, squares = self._copy(parameter, dtype, hashes)
            format = dtype.name
        error, norm = squares
        if not np.isfinite(error + norm):
            names = " + ".join(map(str, parameter.tensors))
            raise ValueError(f"{names} has values too large for {format}")
        entry = TensorEntry(
            format=format,
            shape=parameter.shape,
            nbytes=sum(plane.nbytes for plane in planes.values()),
            relative_error=float(np.sqrt(error / norm)) if norm else 0.0,
        )
        return Encoded(planes, entry, hashes)

    def _slabs(
        self, parameter: Parameter, unit: int, hashes: dict[str, str]
    ) -> Iterator[tuple[TensorInfo, np.ndarray]]:
        """The parameter's elements in order, checked, cut at multiples of `unit` and between tensors."""
        step = _SLAB // unit * unit
        for tensor in parameter.tensors:
            digest = hashlib.sha256()
            for start in range(0, tensor.size, step):
                stop = min(start + step, tensor.size)
                slab = self._source.read_elements(tensor.name, start, stop)
                _check_finite(slab, tensor, start)
                if self._hash_tensors:
                    digest.update(slab.view(np.uint8))
                yield tensor, slab
                self._on_bytes(slab.nbytes)
            hashes[tensor.name] = digest.hexdigest()

    def _copy(
        self, parameter: Parameter, dtype: np.dtype, hashes: dict[str, str]
    ) -> tuple[Planes, np.ndarray]:
        values = np.empty(parameter.size, dtype)
        squares, place = np.zeros(2), 0
        for tensor, slab in self._slabs(parameter, 1, hashes):
            copied = values[place : place + slab.size]
            with np.errstate(over="ignore"):
                copied[:] = slab.astype(dtype)
            place += slab.size
            if slab.dtype != dtype:
                _check_finite(copied, tensor, None)
                exact = slab.astype(np.float64)
                squares += np.sum((exact - copied.astype(np.float64)) ** 2), np.sum(exact**2)
        return {PLAIN_PLANE: values.reshape(parameter.shape)}, squares

    def _quantize(
        self, parameter: Parameter, format: str, hashes: dict[str, str]
    ) -> tuple[Planes, np.ndarray]:
        width = unit_width(format, parameter.shape[-1])
        abstract = FORMATS[format].abstract((parameter.size // width, width))
        planes = {name: np.empty(spec.shape, spec.dtype) for name, spec in vars(abstract).items()}
        squares, unit, rows = np.zeros(2), 0, _piece_size() // width
        pending: collections.deque[Future[np.ndarray]] = collections.deque()
        for _, slab in self._slabs(parameter, width, hashes):
            encode = compiled(format, (rows, width), slab.dtype)
            units = slab.reshape(-1, width)
            for first in range(0, len(units), rows):
                piece = units[first : first + rows]
                pending.append(self._pool.submit(_encode_piece, encode, piece, rows, planes, unit))
                unit += len(piece)
            while len(pending) > 2 * self._threads:
                squares += pending.popleft().result()
        while pending:
            squares += pending.popleft().result()
        stored = {name: p.reshape(*parameter.shape[:-1], -1) for name, p in planes.items()}
        return stored, squares


def as_weight(format: str, planes: Planes) -> Weight:
    """The device's array, quantized or plain, of the planes stored in a format (`TensorEntry.format`).

    Raises:
        ValueError: planes of the wrong names, shapes or dtypes.
    """
    if format not in FORMATS:
        if list(planes) != [PLAIN_PLANE] or planes[PLAIN_PLANE].dtype.name != format:
            found = {name: plane.dtype.name for name, plane in planes.items()}
            raise ValueError(f"expected one plane {PLAIN_PLANE!r} of dtype {format}, found {found}")
        return jax.device_put(planes[PLAIN_PLANE])
    names = {field.name for field in dataclasses.fields(FORMATS[format])}
    if set(planes) != names:
        raise ValueError(f"{format} has planes {sorted(names)}, found {sorted(planes)}")
    # Not `jnp.asarray`, which compiles a program for every new shape and copies what is mapped from a file.
    weight = FORMATS[format](**jax.device_put(planes))
    return weight.validate()


def _piece_size() -> int:
    return _PIECE if jax.default_backend() == "cpu" else _PIECE_ON_GPU


def unit_width(format: str, k: int) -> int:
    """The least number of elements that a row's planes are a whole number of copies of: a super-block, or a block.

    Where neighbouring blocks share bytes and their number is odd, it is the row.
    """
    rows = vars(FORMATS[format].abstract((k,)))
    for width in sorted(SUPER_BLOCKS):
        if k % width == 0:
            units = vars(FORMATS[format].abstract((width,)))
            if all(rows[name].shape[0] == units[name].shape[0] * (k // width) for name in rows):
                return width
    return k


def _encode(w: jax.Array, format: str) -> tuple[Any, jax.Array]:
    quantized = quantize(w, format)
    w = w.astype(jnp.float32)
    # Sums per row in float32, the rest of the sum in float64 on the host.
    squares = jnp.stack([jnp.sum((w - quantized.dequantize()) ** 2, -1), jnp.sum(w * w, -1)])
    return quantized, squares


@functools.cache
def compiled(format: str, shape: tuple[int, int], dtype: np.dtype) -> Any:
    """The program that encodes a piece of `shape`: ``piece -> (quantized, [squared errors, squared norms])``."""
    # Ahead of time: threads that meet an uncompiled jitted function would compile it once each.
    spec = jax.ShapeDtypeStruct(shape, dtype)
    return jax.jit(_encode, static_argnums=1).lower(spec, format).compile()


def _encode_piece(
    encode: Any, piece: np.ndarray, rows: int, planes: Planes, unit: int
) -> np.ndarray:
    """Encodes at most `rows` units of a matrix into `planes` from `unit` on; returns (squared error, squared norm)."""
    count, width = piece.shape
    if count < rows:  # zeros cost time but no error
        piece = np.concatenate([piece, np.zeros((rows - count, width), piece.dtype)])
    quantized, squares = encode(piece)
    for name, plane in planes.items():
        plane[unit : unit + count] = np.asarray(getattr(quantized, name))[:count]
    return np.sum(np.asarray(squares), axis=1, dtype=np.float64)


def _check_finite(values: np.ndarray, tensor: TensorInfo, start: int | None) -> None:
    word, magnitude, infinity = _EXPONENTS[values.dtype]
    bad = (values.view(word) & magnitude) >= infinity
    if not bad.any():
        return
    if start is None:
        raise ValueError(f"{tensor} has values that {values.dtype.name} cannot hold")
    index = np.unravel_index(start + int(np.argmax(bad)), tensor.shape)
    value = float(values[np.argmax(bad)])
    raise ValueError(f"{tensor} holds {value} at index {[int(i) for i in index]}")
