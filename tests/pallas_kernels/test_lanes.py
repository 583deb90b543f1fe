"""The emulated instructions against their definitions, lane by lane: what the PTX ISA says of each."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import lanes
from pallas_kernels.lanes import LANES, WARPS, Emulated

DEVICE = Emulated()
SHAPE = (WARPS, LANES)


def _words(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, SHAPE, dtype=np.uint32)


def _bf16_pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    halves = [
        np.asarray(h, ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for h in (low, high)
    ]
    return halves[0] | halves[1] << 16


def test_mma_multiplies_the_matrices_whose_elements_the_isa_puts_into_each_lane() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((WARPS, 16, 16)).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((WARPS, 16, 8)).astype(ml_dtypes.bfloat16)
    c = rng.standard_normal((WARPS, 16, 8)).astype(np.float32)
    registers_a = np.zeros((4, *SHAPE), np.uint32)
    registers_b = np.zeros((2, *SHAPE), np.uint32)
    registers_c = np.zeros((4, *SHAPE), np.float32)
    for lane in range(LANES):
        group, t = lane // 4, lane % 4  # groupID and threadID_in_group
        for i in range(8):
            row = group if i % 4 < 2 else group + 8
            column = t * 2 + i % 2 + (0 if i < 4 else 8)
            half = a[:, row, column].view(np.uint16).astype(np.uint32)
            registers_a[i // 2, :, lane] |= half << (16 * (i % 2))
        for i in range(4):
            row, column = t * 2 + i % 2 + (0 if i < 2 else 8), group
            half = b[:, row, column].view(np.uint16).astype(np.uint32)
            registers_b[i // 2, :, lane] |= half << (16 * (i % 2))
        for i in range(4):
            registers_c[i, :, lane] = c[:, group if i < 2 else group + 8, t * 2 + i % 2]
    got = DEVICE.mma(*(list(r) for r in (registers_a, registers_b, registers_c)))
    want = np.einsum("wmk,wkn->wmn", a.astype(np.float64), b.astype(np.float64)) + c
    for lane in range(LANES):
        for i in range(4):
            row, column = lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + i % 2
            np.testing.assert_allclose(got[i][:, lane], want[:, row, column], rtol=0, atol=1e-4)


def test_integers_wrap() -> None:
    """``sub.s32``: a difference below zero is a large unsigned integer."""
    got = DEVICE.isub(np.full(SHAPE, 3, np.uint32), np.full(SHAPE, 5, np.uint32))
    assert np.array_equal(got, np.full(SHAPE, 2**32 - 2, np.uint32))


def test_prmt_picks_bytes_of_its_operand_and_zeros() -> None:
    word = _words(2)
    got = np.asarray(DEVICE.bytes_of(word, 0x4342))
    assert np.array_equal(got, (word >> 16 & 0xFF) | (word >> 24) << 16)
    got = np.asarray(DEVICE.bytes_of(word, 0x0123))
    assert np.array_equal(got, word.byteswap())


def test_lop3_masks_then_sets() -> None:
    word, other = _words(3), _words(4)
    assert np.array_equal(DEVICE.and_or(word, 0xF000F, 0x43004300), word & 0xF000F | 0x43004300)
    got = DEVICE.and_or_register(word, 0x300030, other)
    assert np.array_equal(got, word & 0x300030 | other)


@pytest.mark.parametrize("place", range(4))
def test_bytes_convert_with_and_without_sign(place: int) -> None:
    word = _words(5)
    byte = (word >> (8 * place) & 0xFF).astype(np.uint8)
    assert np.array_equal(DEVICE.float_of_byte(word, place), byte.astype(np.float32))
    signed = DEVICE.float_of_byte(word, place, signed=True)
    assert np.array_equal(signed, byte.view(np.int8).astype(np.float32))


def test_halves_convert_by_place() -> None:
    halves = np.random.default_rng(6).standard_normal((2, *SHAPE)).astype(np.float16)
    bits = halves.view(np.uint16).astype(np.uint32)
    word = bits[0] | bits[1] << 16
    for place in range(2):
        assert np.array_equal(DEVICE.float_of_half(word, place), halves[place].astype(np.float32))


def test_bf16_pairs_subtract_by_half() -> None:
    rng = np.random.default_rng(7)
    a, b = (rng.integers(0, 256, (2, *SHAPE)).astype(np.float32) for _ in range(2))
    got = DEVICE.subtract_bf16x2(_bf16_pair(*a), _bf16_pair(*b))
    assert np.array_equal(np.asarray(got), _bf16_pair(*(a - b)))


def test_bf16_pairs_multiply_and_add_with_one_rounding() -> None:
    a, b, c = (np.random.default_rng(13 + n).standard_normal((2, *SHAPE)) for n in range(3))
    rounded = [np.asarray(v, ml_dtypes.bfloat16).astype(np.float32) for v in (a, b, c)]
    got = DEVICE.fma_bf16x2(*(_bf16_pair(*v) for v in (a, b, c)))
    assert np.array_equal(got, _bf16_pair(*(rounded[0] * rounded[1] + rounded[2])))


def test_mma_of_eight_columns_is_that_of_sixteen_with_zeros() -> None:
    """PTX ISA, "Matrix fragments for mma.m16n8k8": a0, a1 and b0 lie as those of m16n8k16."""
    a0, a1, b0 = (
        _bf16_pair(*np.random.default_rng(n).standard_normal((2, *SHAPE))) for n in range(3)
    )
    zero, c = np.zeros(SHAPE, np.uint32), [np.ones(SHAPE, np.float32)] * 4
    got = DEVICE.mma([a0, a1], [b0], c)
    assert np.array_equal(got, DEVICE.mma([a0, a1, zero, zero], [b0, zero], c))


def test_loads_read_words_of_any_type_and_leave_out_lanes() -> None:
    content = np.random.default_rng(8).standard_normal((4, 64)).astype(ml_dtypes.bfloat16)
    want = content.reshape(-1).view(np.uint32)
    memory, lane = lanes.Memory(content), DEVICE.lane()
    pair = DEVICE.load(memory, lane + lane, 2, offset=4, where=lane < 16)
    for i, got in enumerate(pair):
        index = np.where(np.arange(LANES) < 16, 2 * np.arange(LANES) + 4 + i, 0)
        expected = np.where(np.arange(LANES) < 16, want[index], 0)
        assert np.array_equal(got, np.broadcast_to(expected, SHAPE))


def test_loads_that_a_gpu_would_refuse_are_errors() -> None:
    memory, lane = lanes.Memory(np.zeros(64, np.float32)), DEVICE.lane()
    with pytest.raises(AssertionError, match="misaligned"):
        DEVICE.load(memory, lane, 2)
    with pytest.raises(AssertionError, match="beyond the end"):
        DEVICE.load(memory, lane + lane, 2, offset=2)


def test_kernels_are_traced_for_a_cpu_only_inside_the_context() -> None:
    with lanes.interpreted():
        assert lanes.is_interpreted()
    assert not lanes.is_interpreted()


def test_both_instruction_sets_have_the_same_instructions() -> None:
    names = [
        {name for name in vars(machine) if not name.startswith("_")}
        for machine in (lanes.Ptx, lanes.Emulated)
    ]
    assert names[0] == names[1]


def test_lanes_of_a_row_exchange_by_distance_and_vote_by_warp() -> None:
    values = np.random.default_rng(9).standard_normal(SHAPE).astype(np.float32)
    for lane in range(LANES):
        assert np.array_equal(DEVICE.shuffle_xor(values, 2)[:, lane], values[:, lane ^ 2])
    source = np.random.default_rng(12).integers(0, LANES, SHAPE).astype(np.uint32)
    for warp in range(WARPS):
        assert np.array_equal(DEVICE.shuffle(values, source)[warp], values[warp, source[warp]])
    flags = np.zeros(SHAPE, bool)
    flags[2, 17] = True
    assert np.array_equal(DEVICE.any_lane(flags)[:, 0], [False, False, True, False])


def test_prmt_of_two_words_takes_bytes_of_both() -> None:
    a, b = _words(10), _words(11)
    assert np.array_equal(DEVICE.bytes_of_two(a, b, 0x5410), a & 0xFFFF | b << 16)
    assert np.array_equal(DEVICE.bytes_of_two(a, b, 0x7632), a >> 16 | b & 0xFFFF0000)
    by_lane = np.where(DEVICE.lane() % 2 == 0, 0x5410, 0x7632).astype(np.uint32)
    even = DEVICE.lane() % 2 == 0
    want = np.where(even, a & 0xFFFF | b << 16, a >> 16 | b & 0xFFFF0000)
    assert np.array_equal(DEVICE.bytes_at(a, b, by_lane), want)


def test_counts_go_up_where_wanted_and_return_what_was_there() -> None:
    memory = lanes.Memory(np.array([5, 7], np.int32))
    where = np.zeros(SHAPE, bool)
    where[0, 3] = where[2, 1] = True
    before = DEVICE.fetch_add(memory, DEVICE.u32(1), 1, where)
    assert sorted(before[where]) == [7, 8]
    assert not np.any(before[~where])
    assert np.array_equal(memory.content(), [5, 9])


def test_reciprocal_roots_and_zeros_that_wait() -> None:
    values = np.random.default_rng(13).uniform(0.01, 100, SHAPE).astype(np.float32)
    roots = DEVICE.reciprocal_root(values)
    np.testing.assert_allclose(roots, 1 / np.sqrt(values.astype(np.float64)), rtol=2.0**-22)
    assert not np.any(DEVICE.zero_after(values))
