"""Quantized arrays in the order in which tensor cores take them: packed once, read by every Mosaic kernel.

The same numbers as in `pallas_kernels.arrays`, moved: 16 rows are a *row tile*, and the codes that one lane of a warp
holds of a tile lie side by side, so that it gets them in 16-byte loads and needs neither shared memory nor shuffles.
The order is that of the A operand of ``mma.m16n8k16`` (`pallas_kernels.lanes` draws it) with the columns permuted
within a group: lane 4 g + t has rows g and g + 8 and, of every group of 32 columns, columns 8 t to 8 t + 7 (of 16:
4 t to 4 t + 3), which it also reads of x in one piece.

K is cut into *chunks* of C columns, 256 where that divides K and 64 otherwise; all planes are
``[..., N/16, K/C, …]``, so a tile's chunk is one contiguous piece of each. Leading axes can be indexed, scanned and
vmapped.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import EQ8_0, FORMATS, Q4K, Q6K, PlaneArray, QuantizedArray, pack, unpack

ROWS = 16
CHUNKS = (256, 64)
_TILES_AT_ONCE = 64


def chunk_size(k: int) -> int:
    """C, the larger of 256 and 64 that divides `k`.

    Raises:
        ValueError: neither does.
    """
    for size in CHUNKS:
        if k > 0 and k % size == 0:
            return size
    raise ValueError(f"K = {k}: the last axis of a packed array must be a multiple of 64")


class _PackedArray(PlaneArray):
    """What the packed formats share; `codes` is a plane of each of them."""

    format: ClassVar[str]
    codes: jax.Array
    # Weights in a lane's words of the last three axes of `codes` ([…, pieces, lanes, words]).
    _per_word: ClassVar[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``[..., N, K]``."""
        *leading, tiles, chunks, _, _, _ = self.codes.shape
        return (*leading, tiles * ROWS, chunks * self.chunk)

    @property
    def chunk(self) -> int:
        """C, columns in a chunk."""
        return math.prod(self.codes.shape[-3:]) * self._per_word // ROWS

    def __getitem__(self, index: Any) -> Self:
        """Indexes axes before the last two, or takes a slice of whole row tiles of ``[N, K]``.

        Raises:
            ValueError: anything else.
        """
        if self.ndim == 2 and isinstance(index, slice):
            first, end, step = index.indices(self.shape[0])
            if step == 1 and first % ROWS == 0 and end % ROWS == 0:
                tiles = slice(first // ROWS, end // ROWS)
                return jax.tree.map(lambda plane: plane[tiles], self)
        entries = index if isinstance(index, tuple) else (index,)
        too_many = sum(i is not None for i in entries) > self.ndim - 2
        if too_many or any(i is Ellipsis for i in entries):
            raise ValueError(
                f"index {index!r} of a packed array of shape {self.shape}: only the axes before the last two can be "
                f"indexed, without '...', and [N, K] be cut at multiples of {ROWS} rows"
            )
        return jax.tree.map(lambda plane: plane[index], self)

    @classmethod
    def abstract(cls, shape: tuple[int, ...]) -> Self:
        """The planes of an array of logical `shape` as ``jax.ShapeDtypeStruct``.

        Raises:
            ValueError: `why_not_packed`.
        """
        reason = why_not_packed(FORMATS[cls.format], shape)
        if reason:
            raise ValueError(reason)
        return jax.eval_shape(_packed, FORMATS[cls.format].abstract(shape))

    def unpack(self) -> QuantizedArray:
        """The same array in the order of `pallas_kernels.arrays`, bit for bit."""
        return _unpacked(self)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the values ``[..., N, K]``, computed in float32, as `dtype`."""
        return self.unpack().dequantize(dtype)

    def rows(self, ids: jax.Array) -> QuantizedArray:
        """Rows `ids` ``[...]`` of a packed ``[N, K]``, each with its tile read: a quantized ``[..., K]``."""
        tiles = jax.tree.map(lambda plane: plane[ids // ROWS], self)
        flat = jax.tree.map(lambda plane: plane.reshape(-1, *plane.shape[ids.ndim :]), tiles)
        unpacked = lax.map(type(self)._unpack_tile, flat, batch_size=_TILES_AT_ONCE)
        places = (ids % ROWS).reshape(-1)
        picked = jax.tree.map(lambda plane: plane[jnp.arange(len(places)), places], unpacked)
        return jax.tree.map(lambda plane: plane.reshape(*ids.shape, -1), picked)

    @classmethod
    def _pack_tile(cls, w: Any) -> Self:
        """Packs ``[16, K]``."""
        raise NotImplementedError

    def _unpack_tile(self) -> Any:
        """Inverse of `_pack_tile`."""
        raise NotImplementedError


@flax.struct.dataclass
class PackedQ4K(_PackedArray):
    """`Q4K` in fragment order: 4.5 bits per weight where 256 divides K, 5 where 64 does.

    Attributes:
        codes: uint32 ``[..., N/16, K/C, C/64, 32 lanes, 4]``. Of a lane's 64 columns (two groups of 32) word
            2 group + i holds columns 8 t + 4 i + 2 j + h of rows g + 8 r as nibble 4 h + 2 j + r: what ``mma`` number
            i of the group takes as a0 to a3 is bits 0-3 and 16-19 of the word shifted by 0, 4, 8 and 12.
        header: uint32 ``[..., N/16, K/C, 16, 4 or 2]``, what a row's chunk is scaled by. First the bits of d (low half)
            and dmin. For C = 256 then the 12 bytes of GGML's Q4_K: sc and m of groups 0-3 in the low six bits of bytes
            0-3 and 4-7, low four bits of those of groups 4-7 in the halves of bytes 8-11, their high two bits in the
            top of bytes 0-7. For C = 64 sc, m, sc, m, a byte each.
    """

    codes: jax.Array
    header: jax.Array

    format: ClassVar = "q4k"
    _per_word: ClassVar = 8

    @classmethod
    def _pack_tile(cls, w: Q4K) -> Self:
        k = w.shape[-1]
        c = chunk_size(k)
        # half row, g, sub-chunk, group, t, i, j, h
        q = unpack(w.codes, 4).reshape(2, 8, k // 64, 2, 4, 2, 2, 2)
        codes = pack(q.transpose(2, 1, 4, 3, 5, 7, 6, 0).reshape(-1, 8), 4)
        sc, m = (s.astype(jnp.uint32).reshape(ROWS, k // c, c // 32) for s in w.integer_scales())
        first = _halves(w.d, w.dmin)
        if c == 256:
            low = [sc[..., :4], m[..., :4], sc[..., 4:] & 15 | (m[..., 4:] & 15) << 4]
            low[0] |= sc[..., 4:] >> 4 << 6
            low[1] |= m[..., 4:] >> 4 << 6
            words = [first, *(pack(fields, 8)[..., 0] for fields in low)]
        else:
            words = [first, pack(jnp.stack([sc, m], -1).reshape(ROWS, -1, 4), 8)[..., 0]]
        return cls(
            codes=codes.reshape(k // c, c // 64, 32, 4),
            header=jnp.stack(words, axis=-1).transpose(1, 0, 2),
        )

    def _unpack_tile(self) -> Q4K:
        chunks, c = self.codes.shape[0], self.chunk
        k = chunks * c
        q = unpack(self.codes.reshape(-1, 1), 4).reshape(k // 64, 8, 4, 2, 2, 2, 2, 2)
        q = q.transpose(7, 1, 0, 3, 2, 4, 6, 5).reshape(ROWS, k)
        header = self.header.transpose(1, 0, 2)
        d, dmin = _floats(header[..., 0])
        if c == 256:
            low = [unpack(header[..., i : i + 1], 8) for i in (1, 2, 3)]
            sc = jnp.concatenate([low[0] & 63, low[2] & 15 | low[0] >> 6 << 4], -1)
            m = jnp.concatenate([low[1] & 63, low[2] >> 4 | low[1] >> 6 << 4], -1)
        else:
            pairs = unpack(header[..., 1:], 8)
            sc, m = pairs[..., 0::2], pairs[..., 1::2]
        return Q4K.from_fields(q, sc.reshape(ROWS, -1), m.reshape(ROWS, -1), d, dmin)


@flax.struct.dataclass
class PackedEQ8_0(_PackedArray):  # noqa: N801 - the format's name
    """`EQ8_0` in fragment order: 8.5 bits per weight.

    Attributes:
        codes: uint32 ``[..., N/16, K/C, C/32, 32 lanes, 4]``. Word 2 i + j of a group holds columns 8 t + 4 i + 2 j + h
            of rows g + 8 r as byte 2 r + h.
        header: uint32 ``[..., N/16, K/C, 16, C/64]``: the float16 scales of a row's groups, two a word.
    """

    codes: jax.Array
    header: jax.Array

    format: ClassVar = "eq8_0"
    _per_word: ClassVar = 4

    @classmethod
    def _pack_tile(cls, w: EQ8_0) -> Self:
        k = w.shape[-1]
        c = chunk_size(k)
        q = unpack(lax.bitcast_convert_type(w.codes, jnp.uint32), 8)
        q = q.reshape(2, 8, k // 32, 4, 2, 2, 2)  # half row, g, group, t, i, j, h
        codes = pack(q.transpose(2, 1, 3, 4, 5, 0, 6).reshape(-1, 4), 8)
        scale = w.scale.reshape(ROWS, k // c, c // 64, 2)
        return cls(
            codes=codes.reshape(k // c, c // 32, 32, 4),
            header=_halves(scale[..., 0], scale[..., 1]).transpose(1, 0, 2),
        )

    def _unpack_tile(self) -> EQ8_0:
        k = self.codes.shape[0] * self.chunk
        q = unpack(self.codes.reshape(-1, 1), 8).reshape(k // 32, 8, 4, 2, 2, 2, 2)
        q = q.transpose(5, 1, 0, 2, 3, 4, 6).reshape(ROWS, k)
        scale = jnp.stack(_floats(self.header.transpose(1, 0, 2)), axis=-1)
        return EQ8_0.from_fields(q, scale.reshape(ROWS, -1))


@flax.struct.dataclass
class PackedQ6K(_PackedArray):
    """`Q6K` in fragment order: 6.5625 bits per weight; 256 divides K.

    Attributes:
        codes: uint32 ``[..., N/16, K/256, 4, 32 lanes, 4]``, the low four bits. Of a lane's 64 columns (four groups of
            16) word `group` holds columns 4 t + 2 j + h of rows g + 8 r as nibble 4 h + 2 j + r.
        high: uint32 ``[..., N/16, K/256, 2, 32 lanes, 4]``, the high two bits: of a lane's 128 columns word w is that
            of groups 2 w and 2 w + 1, in field 8 h + 4 (group % 2) + 2 j + r.
        header: uint32 ``[..., N/16, K/256, 16, 4]``: the int8 scales of a row's 16 groups.
        d: uint32 ``[..., N/16, K/256, 8]``: the bits of d of rows g (low half) and g + 8.
    """

    codes: jax.Array
    high: jax.Array
    header: jax.Array
    d: jax.Array

    format: ClassVar = "q6k"
    _per_word: ClassVar = 8

    @classmethod
    def _pack_tile(cls, w: Q6K) -> Self:
        k = w.shape[-1]
        # half row, g, sub-chunk, pair of groups, group, t, j, h
        shape = (2, 8, k // 64, 2, 2, 4, 2, 2)
        low, high = unpack(w.low, 4).reshape(shape), unpack(w.high, 2).reshape(shape)
        codes = pack(low.transpose(2, 1, 5, 3, 4, 7, 6, 0).reshape(-1, 8), 4)
        tops = pack(high.transpose(2, 1, 5, 3, 7, 4, 6, 0).reshape(-1, 16), 2)
        tops = tops.reshape(k // 256, 2, 2, 32, 2).transpose(0, 1, 3, 2, 4)
        scales = pack(w.scales.reshape(ROWS, k // 256, 4, 4), 8)[..., 0]
        d = w.d.reshape(2, 8, k // 256)
        return cls(
            codes=codes.reshape(k // 256, 4, 32, 4),
            high=tops.reshape(k // 256, 2, 32, 4),
            header=scales.transpose(1, 0, 2),
            d=_halves(d[0], d[1]).T,
        )

    def _unpack_tile(self) -> Q6K:
        chunks = self.codes.shape[0]
        k = chunks * 256
        low = unpack(self.codes.reshape(-1, 1), 4).reshape(k // 64, 8, 4, 2, 2, 2, 2, 2)
        low = low.transpose(7, 1, 0, 3, 4, 2, 6, 5)
        tops = self.high.reshape(chunks, 2, 32, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 1)
        tops = unpack(tops, 2).reshape(k // 64, 8, 4, 2, 2, 2, 2, 2)
        tops = tops.transpose(7, 1, 0, 3, 5, 2, 6, 4)
        scales = unpack(self.header.transpose(1, 0, 2)[..., None], 8)
        d = jnp.concatenate([half.T for half in _floats(self.d)])
        return Q6K.from_fields(
            (low | tops << 4).reshape(ROWS, k), scales.reshape(ROWS, -1).astype(jnp.int8), d
        )


PackedArray = PackedQ4K | PackedEQ8_0 | PackedQ6K
Weight = QuantizedArray | PackedArray | jax.Array
PACKED: dict[str, type[PackedQ4K | PackedEQ8_0 | PackedQ6K]] = {
    cls.format: cls for cls in (PackedQ4K, PackedEQ8_0, PackedQ6K)
}


def why_not_packed(array_type: type, shape: tuple[int, ...]) -> str | None:
    """Why an array of that format and logical shape has no packed form, or None."""
    n, k = shape[-2:]
    if n % ROWS:
        return f"N = {n}: a packed array has rows in tiles of {ROWS}"
    if k <= 0 or k % CHUNKS[-1]:
        return f"K = {k}: the last axis of a packed array must be a multiple of {CHUNKS[-1]}"
    if array_type is Q6K and k % 256:
        return f"K = {k}: the last axis of a packed Q6K must be a multiple of 256"
    if array_type is Q4K and k % 256 and k % 128 == 0:
        return f"K = {k}: Q4K is packed with super-blocks of 256 and 64, and this one has 128"
    return None


def pack_array(w: QuantizedArray) -> PackedArray:
    """Returns `w` ``[..., N, K]`` in fragment order; `PackedArray.unpack` is its inverse, bit for bit.

    Raises:
        ValueError: N is no multiple of 16, or K not one of 64 (Q6K: 256); Q4K with super-blocks of 128.
    """
    reason = why_not_packed(type(w), w.shape)
    if reason:
        raise ValueError(reason)
    return _packed(w)


@jax.jit
def _packed(w: Any) -> Any:
    [cls] = [c for c in PACKED.values() if FORMATS[c.format] is type(w)]
    *leading, n, _ = w.shape
    tiles = jax.tree.map(lambda plane: plane.reshape(-1, ROWS, plane.shape[-1]), w)
    out = lax.map(cls._pack_tile, tiles, batch_size=_TILES_AT_ONCE)
    return jax.tree.map(lambda plane: plane.reshape(*leading, n // ROWS, *plane.shape[1:]), out)


@jax.jit
def _unpacked(w: Any) -> Any:
    *leading, n, _ = w.shape
    axes = len(leading) + 1
    tiles = jax.tree.map(lambda plane: plane.reshape(-1, *plane.shape[axes:]), w)
    out = lax.map(type(w)._unpack_tile, tiles, batch_size=_TILES_AT_ONCE)
    return jax.tree.map(lambda plane: plane.reshape(*leading, n, plane.shape[-1]), out)


def _halves(low: jax.Array, high: jax.Array) -> jax.Array:
    """The bits of two float16 in one uint32 each."""
    bits = [lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (low, high)]
    return bits[0] | bits[1] << 16


def _floats(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse of `_halves`."""
    halves = (words.astype(jnp.uint16), (words >> 16).astype(jnp.uint16))
    low, high = (lax.bitcast_convert_type(h, jnp.float16) for h in halves)
    return low, high
