"""Quantized arrays: frozen pytrees of planes with the shape of the matrix they stand for.

Rows are cut into blocks of 32 (or 16) elements along the last axis K, blocks into super-blocks of S elements,
S being the largest of 256, 128, 64 and 32 that divides K. Any leading axes are allowed, and every axis but the last
can be indexed, scanned and vmapped, because shapes are derived from the planes and never stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
SUPER_BLOCKS = (256, 128, 64, 32)


def super_block_size(k: int) -> int:
    """Returns S, the largest of 256, 128, 64, 32 that divides ``k``.

    Raises:
        ValueError: ``k`` is not a positive multiple of 32.
    """
    if k <= 0 or k % BLOCK:
        raise ValueError(f"K = {k}: the last axis of a quantized array must be a multiple of 32")
    return next(s for s in SUPER_BLOCKS if k % s == 0)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Returns the unsigned fields of ``words``: uint32 ``[..., J]`` -> int32 ``[..., J * 32 / bits]``.

    Field i of a word is its bits ``i * bits`` to ``(i + 1) * bits - 1``; ``bits`` is 2, 4 or 8.
    """
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)
    fields = (words[..., None] >> shifts) & jnp.uint32(2**bits - 1)
    return fields.astype(jnp.int32).reshape(*words.shape[:-1], -1)


def pack(fields: jax.Array, bits: int) -> jax.Array:
    """Inverse of :func:`unpack`: integers ``[..., K]`` (taken modulo 2**bits) -> uint32 words."""
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)
    # By way of int32: a negative float has no defined conversion to uint32.
    fields = fields.astype(jnp.int32).astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    grouped = fields.reshape(*fields.shape[:-1], -1, 32 // bits)
    return jnp.sum(grouped << shifts, axis=-1, dtype=jnp.uint32)


class PlaneArray:
    """An array of numbers made of planes, which are the dataclass fields of the subclass."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``[..., N, K]``."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The type of the values, float32 (the planes have types of their own)."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes together."""
        return sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """``8 * nbytes / number of elements``, from the planes themselves."""
        return 8 * self.nbytes / math.prod(self.shape)

    def validate(self) -> Self:
        """Returns ``self`` if shapes and types of the planes agree.

        Raises:
            ValueError: a plane differs from what the logical shape asks for; both are named.
        """
        expected = type(self).abstract(self.shape)
        for name, want in vars(expected).items():
            have = getattr(self, name)
            if have.shape != want.shape or have.dtype != want.dtype:
                raise ValueError(
                    f"{type(self).__name__}.{name} is {have.dtype}{list(have.shape)}, but shape "
                    f"{list(self.shape)} asks for {want.dtype}{list(want.shape)}"
                )
        return self

    @classmethod
    def abstract(cls, shape: tuple[int, ...]) -> Self:
        """The planes of an array of logical ``shape`` as ``jax.ShapeDtypeStruct``.

        Raises:
            ValueError: the format has no array of that shape.
        """
        raise NotImplementedError


class _BlockArray(PlaneArray):
    """What the formats share that keep rows one after the other."""

    # (name of the plane the logical shape is read from, elements per entry of that plane)
    _shape_plane: ClassVar[tuple[str, int]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``[..., N, K]``."""
        name, per_entry = self._shape_plane
        *leading, entries = getattr(self, name).shape
        return (*leading, entries * per_entry)

    def __getitem__(self, index: Any) -> Self:
        """Indexes every plane; ``index`` may address any axis but the last, without ``...``."""
        entries = index if isinstance(index, tuple) else (index,)
        consumed = sum(i is not None for i in entries)
        if any(i is Ellipsis for i in entries) or consumed >= self.ndim:
            raise ValueError(
                f"index {index!r} of a quantized array of shape {self.shape}: only the first "
                f"{self.ndim - 1} axes can be indexed, and not with '...'"
            )
        return jax.tree.map(lambda plane: plane[index], self)


def _spec(leading: Sequence[int], entries: int, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((*leading, entries), dtype)


@flax.struct.dataclass
class Q4K(_BlockArray):
    """4-bit codes with a 6-bit scale and a 6-bit minimum per 32 elements (GGML's Q4_K).

    value = d * sc * q - dmin * m,   q in 0..15, sc and m in 0..63

    Element k = 8 j + i of a row is nibble i of word j, counted from the lowest bits. Block b keeps the low four bits of
    sc and m in the low and high half of ``scales_low[b]``, and their high two bits in bits 0-1 and 2-3 of nibble b % 2
    of ``scales_high[b // 2]``. Bits per weight: 4 + 12/32 + 32/S, so 4.5 where 256 divides K (an odd number of blocks
    costs one unused nibble per row).

    Attributes:
        codes: uint32 ``[..., N, K/8]``.
        scales_low: uint8 ``[..., N, K/32]``.
        scales_high: uint8 ``[..., N, ceil(K/64)]``.
        d: float16 ``[..., N, K/S]``, the scale of the block scales.
        dmin: float16 ``[..., N, K/S]``, the scale of the block minima.
    """

    codes: jax.Array
    scales_low: jax.Array
    scales_high: jax.Array
    d: jax.Array
    dmin: jax.Array

    _shape_plane: ClassVar = ("codes", 8)

    @classmethod
    def abstract(cls, shape: tuple[int, ...]) -> Self:
        *leading, k = shape
        s = super_block_size(k)
        return cls(
            codes=_spec(leading, k // 8, jnp.uint32),
            scales_low=_spec(leading, k // BLOCK, jnp.uint8),
            scales_high=_spec(leading, -(-k // (2 * BLOCK)), jnp.uint8),
            d=_spec(leading, k // s, jnp.float16),
            dmin=_spec(leading, k // s, jnp.float16),
        )

    @classmethod
    def from_fields(
        cls, q: jax.Array, sc: jax.Array, m: jax.Array, d: jax.Array, dmin: jax.Array
    ) -> Self:
        """Packs integers q ``[..., K]``, sc and m ``[..., K/32]`` with float16 d, dmin ``[..., K/S]``."""
        sc, m = sc.astype(jnp.uint8), m.astype(jnp.uint8)
        low = (sc & 15) | ((m & 15) << 4)
        high = (sc >> 4) | ((m >> 4) << 2)
        if high.shape[-1] % 2:
            high = jnp.pad(high, [(0, 0)] * (high.ndim - 1) + [(0, 1)])
        pairs = high.reshape(*high.shape[:-1], -1, 2)
        return cls(
            codes=pack(q, 4),
            scales_low=low,
            scales_high=pairs[..., 0] | (pairs[..., 1] << 4),
            d=d.astype(jnp.float16),
            dmin=dmin.astype(jnp.float16),
        )

    def integer_scales(self) -> tuple[jax.Array, jax.Array]:
        """Returns the 6-bit (sc, m) as int32 ``[..., N, K/32]``.

        In 32 bits, in which XLA reckons operations cheap: what it reckons dear it writes to memory once.
        """
        low = self.scales_low.astype(jnp.int32)
        return (low & 15) | (self._high_bits(0) << 4), (low >> 4) | (self._high_bits(2) << 4)

    def _high_bits(self, first: int) -> jax.Array:
        """Bits `first` and `first` + 1 of each block's nibble: int32 ``[..., N, K/32]``."""
        # Twice the same shift: what sc and m shared, XLA would write to memory.
        shifts = jnp.array([first, first + 4])
        bits = (self.scales_high[..., None].astype(jnp.int32) >> shifts) & 3
        return bits.reshape(*bits.shape[:-2], -1)[..., : self.scales_low.shape[-1]]

    def block_scales(self) -> tuple[jax.Array, jax.Array]:
        """Returns (d * sc, dmin * m), float32 ``[..., N, K/32]``: value = scale * q - minimum."""
        sc, m = self.integer_scales()
        return _scaled(sc, self.d), _scaled(m, self.dmin)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the values ``[..., N, K]``, computed in float32, as ``dtype``."""
        scale, minimum = self.block_scales()
        q = unpack(self.codes, 4).reshape(*scale.shape, BLOCK).astype(jnp.float32)
        values = q * scale[..., None] - minimum[..., None]
        return values.astype(dtype).reshape(self.shape)


@flax.struct.dataclass
class EQ8_0(_BlockArray):  # noqa: N801 - the format's name, after GGML's Q8_0
    """8-bit codes with a float16 scale per 32 elements: GGML's Q8_0, its scale chosen by error.

    value = scale * q,   q in -127..127 (-128 is accepted)

    Byte i of word j, counted from the lowest bits, is element 4 j + i in two's complement. Bits per weight: 8.5.

    Attributes:
        codes: int32 ``[..., N, K/4]``.
        scale: float16 ``[..., N, K/32]``.
    """

    codes: jax.Array
    scale: jax.Array

    _shape_plane: ClassVar = ("codes", 4)

    @classmethod
    def abstract(cls, shape: tuple[int, ...]) -> Self:
        *leading, k = shape
        super_block_size(k)
        return cls(
            codes=_spec(leading, k // 4, jnp.int32), scale=_spec(leading, k // BLOCK, jnp.float16)
        )

    @classmethod
    def from_fields(cls, q: jax.Array, scale: jax.Array) -> Self:
        """Packs integers q ``[..., K]`` with scales ``[..., K/32]``."""
        words = jax.lax.bitcast_convert_type(pack(q, 8), jnp.int32)
        return cls(codes=words, scale=scale.astype(jnp.float16))

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the values ``[..., N, K]``, computed in float32, as ``dtype``."""
        scale = self.scale.astype(jnp.float32)
        # Shifts, not a bitcast to int8: they fuse.
        q = (self.codes[..., None] << jnp.arange(24, -8, -8)) >> 24
        q = q.reshape(*scale.shape, BLOCK).astype(jnp.float32)
        return (q * scale[..., None]).astype(dtype).reshape(self.shape)


@flax.struct.dataclass
class Q6K(_BlockArray):
    """6-bit codes with an 8-bit scale per 16 elements (GGML's Q6_K).

    value = d * sc * (q - 32),   q in 0..63, sc in -128..127

    The low four bits of q are nibble i of word j of ``low`` for element 8 j + i, the high two bits are bits 2 i and
    2 i + 1 of word j of ``high`` for element 16 j + i. Bits per weight: 6 + 8/16 + 16/S, so 6.5625 where 256 divides K.

    Attributes:
        low: uint32 ``[..., N, K/8]``.
        high: uint32 ``[..., N, K/16]``.
        scales: int8 ``[..., N, K/16]``.
        d: float16 ``[..., N, K/S]``.
    """

    low: jax.Array
    high: jax.Array
    scales: jax.Array
    d: jax.Array

    _shape_plane: ClassVar = ("low", 8)
    GROUP: ClassVar = 16

    @classmethod
    def abstract(cls, shape: tuple[int, ...]) -> Self:
        *leading, k = shape
        s = super_block_size(k)
        return cls(
            low=_spec(leading, k // 8, jnp.uint32),
            high=_spec(leading, k // 16, jnp.uint32),
            scales=_spec(leading, k // 16, jnp.int8),
            d=_spec(leading, k // s, jnp.float16),
        )

    @classmethod
    def from_fields(cls, q: jax.Array, sc: jax.Array, d: jax.Array) -> Self:
        """Packs q in 0..63 ``[..., K]`` and sc ``[..., K/16]`` with float16 d ``[..., K/S]``."""
        q = q.astype(jnp.int32)
        return cls(
            low=pack(q, 4),
            high=pack(q >> 4, 2),
            scales=sc.astype(jnp.int8),
            d=d.astype(jnp.float16),
        )

    def block_scales(self) -> jax.Array:
        """Returns d * sc, float32 ``[..., N, K/16]``: value = scale * (q - 32)."""
        return _scaled(self.scales, self.d)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the values ``[..., N, K]``, computed in float32, as ``dtype``."""
        scale = self.block_scales()
        q = (unpack(self.low, 4) | (unpack(self.high, 2) << 4)) - 32
        q = q.reshape(*scale.shape, self.GROUP).astype(jnp.float32)
        return (q * scale[..., None]).astype(dtype).reshape(self.shape)


def _scaled(integers: jax.Array, d: jax.Array) -> jax.Array:
    """Multiplies the blocks' integers ``[..., B]`` by their super-blocks' d ``[..., K/S]``."""
    per_super = integers.reshape(*d.shape, -1).astype(jnp.float32)
    return (per_super * d[..., None].astype(jnp.float32)).reshape(integers.shape)


QuantizedArray = Q4K | EQ8_0 | Q6K
FORMATS: dict[str, type[Q4K | EQ8_0 | Q6K]] = {"q4k": Q4K, "eq8_0": EQ8_0, "q6k": Q6K}
