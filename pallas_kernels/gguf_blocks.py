"""Between GGML's byte layout and our planes, without loss, both ways.

GGML stores a row as a sequence of blocks, each a small struct of scales and codes; our planes hold the same numbers
apart from each other. Nothing is rounded: ``to_blocks(from_blocks(b, f))`` returns ``b`` byte for byte.

Formats: ``block_q4_K``, ``block_q8_0`` and ``block_q6_K`` of ggml-common.h, https://github.com/ggml-org/ggml.
All work is done in numpy on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.arrays import EQ8_0, Q4K, Q6K, QuantizedArray

# elements and bytes per block
BLOCKS: dict[str, tuple[int, int]] = {"q4k": (256, 144), "eq8_0": (32, 34), "q6k": (256, 210)}


def from_blocks(blocks: np.ndarray, format: str) -> QuantizedArray:
    """Reads GGML blocks into planes.

    Args:
        blocks: uint8 ``[..., N, bytes per row]``.
        format: "q4k" (GGML's Q4_K), "eq8_0" (Q8_0) or "q6k" (Q6_K).

    Returns:
        The quantized array ``[..., N, K]``, of exactly the same values.

    Raises:
        ValueError: unknown format, not uint8, or a row that is no whole number of blocks.
    """
    if format not in BLOCKS:
        raise ValueError(f"format = {format!r}: expected one of {', '.join(BLOCKS)}")
    size = BLOCKS[format][1]
    if blocks.dtype != np.uint8 or blocks.ndim < 1 or blocks.shape[-1] % size or not blocks.size:
        raise ValueError(
            f"blocks is {blocks.dtype}{list(blocks.shape)}: expected uint8 rows of a multiple of "
            f"{size} bytes for {format}"
        )
    split = np.ascontiguousarray(blocks).reshape(*blocks.shape[:-1], -1, size)
    return _READERS[format](split)


def to_blocks(array: QuantizedArray) -> np.ndarray:
    """Writes planes as GGML blocks: uint8 ``[..., N, bytes per row]``.

    Raises:
        ValueError: GGML has no such blocks, because its super-blocks are 256 long and 256 does not divide K.
    """
    k = array.shape[-1]
    if not isinstance(array, EQ8_0) and k % 256:
        raise ValueError(f"K = {k}: GGML's {type(array).__name__} needs a multiple of 256")
    blocks = _WRITERS[type(array)](array)
    return blocks.reshape(*blocks.shape[:-2], -1)


def _bytes_of(plane: Any, per_block: int) -> np.ndarray:
    """The plane as uint8 ``[..., blocks, bytes]``, ``per_block`` entries of the plane in each block."""
    host = np.ascontiguousarray(np.asarray(plane))
    return host.reshape(*host.shape[:-1], -1, per_block).view(np.uint8)


def _plane(data: np.ndarray, dtype: Any) -> Any:
    """``[..., blocks, bytes]`` as a plane of ``dtype``, the blocks of a row joined."""
    joined = np.ascontiguousarray(data).reshape(*data.shape[:-2], -1)
    return jnp.asarray(joined.view(dtype))


def _low_bits(nibbles: np.ndarray) -> np.ndarray:
    """Packs nibbles ``[..., n]`` in pairs, the even one low: uint8 ``[..., n / 2]``."""
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """The fields of ``bits`` bits of bytes ``[..., n]``, lowest first: ``[..., n * 8 / bits]``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((data[..., None] >> shifts) & (2**bits - 1)).reshape(*data.shape[:-1], -1)


# --------------------------------------------------------------------------------------------------- Q8_0


def _read_q8_0(blocks: np.ndarray) -> EQ8_0:
    return EQ8_0(codes=_plane(blocks[..., 2:], np.int32), scale=_plane(blocks[..., :2], np.float16))


def _write_q8_0(array: EQ8_0) -> np.ndarray:
    return np.concatenate([_bytes_of(array.scale, 1), _bytes_of(array.codes, 8)], axis=-1)


# --------------------------------------------------------------------------------------------------- Q4_K
# d, dmin, 12 bytes of scales, 128 bytes of codes: byte i of the c-th 32 bytes holds elements 64 c + i (low nibble)
# and 64 c + 32 + i. Bytes 0-3 and 4-7 of the scales hold, in their low six bits, sc and m of blocks 0-3; bytes 8-11
# hold the low four bits of sc and m of blocks 4-7, whose high two bits are bits 6-7 of bytes 0-3 and 4-7.


def _read_q4k(blocks: np.ndarray) -> Q4K:
    packed, codes = blocks[..., 4:16], blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    a, b, c = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    sc = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=-1)
    m = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=-1)
    nibbles = np.concatenate([codes & 15, codes >> 4], axis=-1).reshape(*blocks.shape[:-1], 256)
    high = (sc >> 4) | ((m >> 4) << 2)
    return Q4K(
        codes=_plane(_low_bits(nibbles), np.uint32),
        scales_low=_plane((sc & 15) | ((m & 15) << 4), np.uint8),
        scales_high=_plane(_low_bits(high), np.uint8),
        d=_plane(blocks[..., 0:2], np.float16),
        dmin=_plane(blocks[..., 2:4], np.float16),
    )


def _write_q4k(array: Q4K) -> np.ndarray:
    low, high = _bytes_of(array.scales_low, 8), _fields(_bytes_of(array.scales_high, 4), 4)
    sc, m = (low & 15) | ((high & 3) << 4), (low >> 4) | ((high >> 2) << 4)
    a = sc[..., :4] | ((sc[..., 4:] >> 4) << 6)
    b = m[..., :4] | ((m[..., 4:] >> 4) << 6)
    c = (sc[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)
    nibbles = _fields(_bytes_of(array.codes, 32), 4)
    halves = nibbles.reshape(*nibbles.shape[:-1], 4, 2, 32)
    codes = (halves[..., 0, :] | (halves[..., 1, :] << 4)).reshape(*nibbles.shape[:-1], 128)
    return np.concatenate([_bytes_of(array.d, 1), _bytes_of(array.dmin, 1), a, b, c, codes], -1)


# --------------------------------------------------------------------------------------------------- Q6_K
# ql[128], qh[64], scales[16], d. In each half of 128 elements, byte i of the 64 low bytes holds the low nibbles of
# elements i and 64 + i, byte i of the 32 high bytes the top bits of elements i, 32 + i, 64 + i and 96 + i.


def _read_q6k(blocks: np.ndarray) -> Q6K:
    leading = blocks.shape[:-1]
    ql = blocks[..., :128].reshape(*leading, 2, 64)
    qh = blocks[..., 128:192].reshape(*leading, 2, 1, 32)
    nibbles = np.concatenate([ql & 15, ql >> 4], axis=-1).reshape(*leading, 256)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    tops = ((qh >> shifts) & 3).reshape(*leading, 64, 4)
    high = tops[..., 0] | (tops[..., 1] << 2) | (tops[..., 2] << 4) | (tops[..., 3] << 6)
    return Q6K(
        low=_plane(_low_bits(nibbles), np.uint32),
        high=_plane(high, np.uint32),
        scales=_plane(blocks[..., 192:208], np.int8),
        d=_plane(blocks[..., 208:210], np.float16),
    )


def _write_q6k(array: Q6K) -> np.ndarray:
    nibbles = _fields(_bytes_of(array.low, 32), 4)
    leading = nibbles.shape[:-1]
    halves = nibbles.reshape(*leading, 2, 2, 64)
    ql = (halves[..., 0, :] | (halves[..., 1, :] << 4)).reshape(*leading, 128)
    tops = _fields(_bytes_of(array.high, 16), 2).reshape(*leading, 2, 4, 32)
    qh = tops[..., 0, :] | (tops[..., 1, :] << 2) | (tops[..., 2, :] << 4) | (tops[..., 3, :] << 6)
    scales, d = _bytes_of(array.scales, 16), _bytes_of(array.d, 1)
    return np.concatenate([ql, qh.reshape(*leading, 64), scales, d], axis=-1)


_READERS: dict[str, Callable[[np.ndarray], QuantizedArray]] = {
    "q4k": _read_q4k,
    "eq8_0": _read_q8_0,
    "q6k": _read_q6k,
}
_WRITERS: dict[type, Any] = {Q4K: _write_q4k, EQ8_0: _write_q8_0, Q6K: _write_q6k}
