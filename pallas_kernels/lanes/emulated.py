"""The instructions of lane programs in numpy, for the 128 lanes of a warpgroup at once.

Register by register: a value of each is an array ``[4, 32]``. Loads that a GPU would refuse are errors here.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from pallas_kernels.lanes.registers import LANES, WARPS, Register, Registers


class Memory:
    """What a ref holds, as 32-bit words."""

    def __init__(self, content: np.ndarray) -> None:
        self._shape, self._dtype = content.shape, content.dtype
        self.words = np.ascontiguousarray(content).reshape(-1).view(np.uint32)

    def content(self) -> np.ndarray:
        """The words in the shape and type of the ref."""
        return self.words.view(self._dtype).reshape(self._shape)


class Emulated:
    """The same instructions on arrays ``[4, 32]``: what every lane of a warpgroup holds in a register."""

    def u32(self, value: int) -> Register:
        return np.full((WARPS, LANES), value & 0xFFFFFFFF, np.uint32)

    def number(self, value: float) -> Register:
        return np.full((WARPS, LANES), value, np.float32)

    def opaque(self, bits: int) -> Registers:
        return [self.u32(bits)] * 4

    def zero_after(self, value: Register) -> Register:
        return np.zeros_like(value, np.uint32)

    def lane(self) -> Register:
        return np.broadcast_to(np.arange(LANES, dtype=np.uint32), (WARPS, LANES))

    def warp(self) -> Register:
        return np.broadcast_to(np.arange(WARPS, dtype=np.uint32)[:, None], (WARPS, LANES))

    def iadd(self, a: Register, b: Register) -> Register:
        return a + b

    def isub(self, a: Register, b: Register) -> Register:
        return a - b

    def imul(self, a: Register, b: Register) -> Register:
        return a * b

    def idiv(self, a: Register, b: Register) -> Register:
        return a // b

    def irem(self, a: Register, b: Register) -> Register:
        return a % b

    def imin(self, a: Register, b: Register) -> Register:
        return np.minimum(a, b)

    def less(self, a: Register, b: Register) -> Register:
        return a < b

    def equal(self, a: Register, b: Register) -> Register:
        return a == b

    def either(self, a: Register, b: Register) -> Register:
        return a | b

    def any_lane(self, a: Register) -> Register:
        return np.broadcast_to(np.any(a, axis=1, keepdims=True), (WARPS, LANES))

    def shuffle_xor(self, a: Register, distance: int) -> Register:
        return a[:, np.arange(LANES) ^ distance]

    def shuffle(self, a: Register, lane: Register) -> Register:
        return np.take_along_axis(a, np.broadcast_to(lane, a.shape).astype(np.int64), axis=1)

    def both(self, a: Register, b: Register) -> Register:
        return a & b

    def less_float(self, a: Register, b: Register) -> Register:
        return a < b

    def select(self, where: Register, a: Register, b: Register) -> Register:
        return np.where(where, a, b)

    def and_(self, a: Register, mask: int) -> Register:
        return a & np.uint32(mask)

    def or_(self, a: Register, b: Register) -> Register:
        return a | b

    def shift_right(self, a: Register, bits: int) -> Register:
        return a >> np.uint32(bits)

    def shift_left(self, a: Register, bits: int) -> Register:
        return a << np.uint32(bits)

    def and_or(self, a: Register, mask: int, bits: int) -> Register:
        return (a & np.uint32(mask)) | np.uint32(bits)

    def and_or_register(self, a: Register, mask: int, b: Register) -> Register:
        return (a & np.uint32(mask)) | b

    def xor(self, a: Register, bits: int) -> Register:
        return a ^ np.uint32(bits)

    def bytes_of(self, a: Register, selector: int, bits: int = 0) -> Register:
        out = np.zeros_like(a)
        for place in range(4):
            which = (selector >> (4 * place)) & 15
            assert which < 8, "sign replication is not modelled"
            source = a if which < 4 else self.u32(bits)
            byte = (source >> np.uint32(8 * (which % 4))) & np.uint32(255)
            out |= byte << np.uint32(8 * place)
        return out

    def bytes_of_two(self, a: Register, b: Register, selector: int) -> Register:
        return self.bytes_at(a, b, self.u32(selector))

    def bytes_at(self, a: Register, b: Register, selector: Register) -> Register:
        out = np.zeros_like(a)
        for place in range(4):
            which = (selector >> np.uint32(4 * place)) & np.uint32(15)
            assert np.all(which < 8), "sign replication is not modelled"
            word = np.where(which < 4, a, b)
            out |= (word >> 8 * (which % 4) & np.uint32(255)) << np.uint32(8 * place)
        return out

    def bf16x2_of_floats(self, low: Register, high: Register) -> Register:
        return _word_of_bf16(np.stack([low, high], axis=-1))

    def subtract_bf16x2(self, a: Register, b: Register) -> Register:
        return _word_of_bf16(_bf16_of_word(a) - _bf16_of_word(b))

    def fma_bf16x2(self, a: Register, b: Register, c: Register) -> Register:
        return _word_of_bf16(_bf16_of_word(a) * _bf16_of_word(b) + _bf16_of_word(c))

    def float_of_half(self, a: Register, place: int) -> Register:
        half = (a >> np.uint32(16 * place)).astype(np.uint16)
        return half.view(np.float16).astype(np.float32)

    def float_of_byte(self, a: Register, place: int, *, signed: bool = False) -> Register:
        byte = (a >> np.uint32(8 * place)).astype(np.uint8)
        return (byte.view(np.int8) if signed else byte).astype(np.float32)

    def float_of_bits(self, a: Register) -> Register:
        return a.view(np.float32)

    def bits_of_float(self, a: Register) -> Register:
        return a.view(np.uint32)

    def fadd(self, a: Register, b: Register) -> Register:
        return a + b

    def fsub(self, a: Register, b: Register) -> Register:
        return a - b

    def fmax(self, a: Register, b: Register) -> Register:
        return np.maximum(a, b)

    def fmul(self, a: Register, b: Register) -> Register:
        return a * b

    def fneg(self, a: Register) -> Register:
        return -a

    def fma(self, a: Register, b: Register, c: Register) -> Register:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def exp2(self, a: Register) -> Register:
        return np.exp2(a)

    def reciprocal(self, a: Register) -> Register:
        return np.float32(1) / a

    def reciprocal_root(self, a: Register) -> Register:
        return np.float32(1) / np.sqrt(a)

    def mma(self, a: Registers, b: Registers, c: Registers) -> Registers:
        if len(b) == 1:  # eight columns of A: those that a2 and a3 hold are zeros
            zero = self.u32(0)
            a, b = [*a, zero, zero], [*b, zero]
        product = _matrix_a(a) @ _matrix_b(b)
        # c0, c1 of row g, then those of row g + 8: [warp, half, g, t, pair]
        by_lane = product.reshape(WARPS, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
        by_lane = by_lane.reshape(WARPS, LANES, 4)
        return [c[i] + by_lane[..., i] for i in range(4)]

    def load(
        self,
        ref: Memory,
        word: Register,
        n: int,
        *,
        offset: int = 0,
        where: Register | None = None,
        otherwise: int | None = 0,
        streamed: bool = False,
    ) -> Registers:
        del streamed
        where = np.ones((WARPS, LANES), bool) if where is None else where
        first = np.broadcast_to(word, (WARPS, LANES)).astype(np.int64) + offset
        assert np.all(first[where] % n == 0), "misaligned"
        assert np.all(first[where] + n <= ref.words.size), "beyond the end"
        filler = np.uint32(0xDEADBEEF if otherwise is None else otherwise)
        first = np.where(where, first, 0)
        return [np.where(where, ref.words[first + i], filler) for i in range(n)]

    def store(
        self,
        ref: Memory,
        word: Register,
        values: Registers,
        *,
        offset: int = 0,
        where: Register | None = None,
    ) -> None:
        where = np.ones((WARPS, LANES), bool) if where is None else where
        first = np.broadcast_to(word, (WARPS, LANES)).astype(np.int64)[where] + offset
        for i, value in enumerate(values):
            ref.words[first + i] = value.view(np.uint32)[where]

    def fetch_add(self, ref: Memory, word: Register, value: int, where: Register) -> Register:
        before = np.zeros((WARPS, LANES), np.uint32)
        words = np.broadcast_to(word, (WARPS, LANES))
        for lane in zip(*np.nonzero(where), strict=True):
            before[lane] = ref.words[words[lane]]
            ref.words[words[lane]] += np.uint32(value)
        return before

    def synchronize(self) -> None:
        """Nothing: here no lane runs ahead."""


def _bf16_of_word(word: Register) -> np.ndarray:
    """float32 ``[..., 2]``: the low and the high half as bfloat16."""
    return np.stack([word << np.uint32(16), word & np.uint32(0xFFFF0000)], -1).view(np.float32)


def _word_of_bf16(pair: np.ndarray) -> Register:
    bits = pair.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    return bits[..., 0] | (bits[..., 1] << np.uint32(16))


def _matrix_a(a: Registers) -> np.ndarray:
    """``[warp, 16, 16]``: rows (half of a0/a1, g), columns (half of a0/a2, t, pair)."""
    words = np.stack([_bf16_of_word(register) for register in a], axis=2)
    words = words.reshape(WARPS, 8, 4, 2, 2, 2)  # warp, g, t, column half, row half, pair
    return words.transpose(0, 4, 1, 3, 2, 5).reshape(WARPS, 16, 16)


def _matrix_b(b: Registers) -> np.ndarray:
    """``[warp, 16, 8]``: rows (b0/b1, t, pair), columns g."""
    words = np.stack([_bf16_of_word(register) for register in b], axis=2)
    words = words.reshape(WARPS, 8, 4, 2, 2)  # warp, g, t, row half, pair
    return words.transpose(0, 3, 2, 4, 1).reshape(WARPS, 16, 8)
