"""Programs for one lane of a warp, written once and run twice: as PTX in a Mosaic GPU kernel, as arrays on a CPU.

Pallas has no word for ``mma.sync``, ``prmt`` or a 16-byte load per lane. A *lane program* is a Python function of an
instruction set: `Ptx` emits what its methods name, for the one lane that runs it; `Emulated` does the same to numpy
arrays ``[4, 32]`` (the warps of a warpgroup and their lanes), one array for each register. So the twin that a CPU runs
in Pallas' GPU interpret mode is the program itself, and a test of it sees every lane.

Values pass between lane programs, loops and branches of a kernel as arrays ``[4, 32, n]``: n registers of each lane.

Fragments of ``mma.m16n8k16`` (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"), lane = 4 g + t:

    A, 16 x 16   a0 = (g, 2t..2t+1)  a1 = (g+8, 2t..2t+1)  a2 = (g, 2t+8..2t+9)  a3 = (g+8, 2t+8..2t+9)
    B, 16 x 8    b0 = (2t..2t+1, g)  b1 = (2t+8..2t+9, g)
    C, 16 x 8    c0, c1 = (g, 2t..2t+1)  c2, c3 = (g+8, 2t..2t+1)
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

WARPS, LANES = 4, 32
Register = Any
Registers = list[Register]
U32, F32 = jnp.uint32, jnp.float32

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run on a CPU, in Pallas' GPU interpret mode: slow, and equal lane by lane."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether kernels are being traced for a CPU."""
    return _interpreted.get()


def interpret_params() -> Any:
    """The ``interpret`` argument of `plgpu.kernel`."""
    if not is_interpreted():
        return None
    # As TMA does, a copy may reach beyond an array; what it finds there is not a number.
    return plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized")


def zeros(n: int) -> jax.Array:
    """n registers of every lane, zero: float32 ``[4, 32, n]``."""
    value = jnp.zeros((WARPS, LANES, n), F32)
    return value if is_interpreted() else plgpu.layout_cast(value, layout(n))


def opaque(bits: int) -> jax.Array:
    """Four registers of every lane that hold `bits`, which the assembler cannot know: uint32 ``[4, 32, 4]``.

    It would otherwise make a constant operand of ``mma.sync`` anew for each use, at four instructions a time.
    """
    [out] = run(lambda i, *_: [i.opaque(bits)], [(4, U32)])
    return out


def run(
    program: Callable[..., Sequence[Registers]],
    results: Sequence[tuple[int, Any]] = (),
    *,
    refs: Sequence[Any] = (),
    arrays: Sequence[jax.Array] = (),
    scalars: Sequence[jax.Array] = (),
    stores: Sequence[int] = (),
) -> list[jax.Array]:
    """Runs ``program(instructions, refs, arrays, scalars)`` in every lane of this warpgroup.

    Args:
        program: gets the instruction set, the refs, each array as a list of registers, each scalar as a register, and
            returns as many lists of registers as `results` has entries.
        results: (registers, dtype) of each array to return; dtypes are uint32 or float32.
        refs: in global or shared memory, whole: addresses are the program's business.
        arrays: ``[4, 32, n]``.
        scalars: int32, the same for all lanes.
        stores: which of the refs the program writes to.

    Returns:
        Arrays ``[4, 32, n]``.
    """
    if is_interpreted():
        return _emulate(program, results, refs, arrays, scalars, stores)

    kinds = (
        [plgpu.RefType()] * len(refs),
        [layout(a.shape[-1]) for a in arrays],
        [plgpu.Layout.WG_SPLAT] * len(scalars),
    )
    shapes = [array_type(n, dtype) for n, dtype in results]

    @plgpu.inline_mgpu(arg_types=kinds, return_type=shapes or None)
    def inlined(_, refs, arrays, scalars):
        inputs = [unpack(array.registers.item()) for array in arrays]
        singles = [scalar.registers.item() for scalar in scalars]
        return [array_of(registers) for registers in program(Ptx(), refs, inputs, singles)] or None

    flat = inlined(list(refs), list(arrays), list(scalars))
    return list(flat) if flat is not None else []


def in_turn(body: Callable[[], None], warpgroups: int) -> None:
    """Runs `body` in each warpgroup of axis "warpgroup"; on a CPU, where `run` writes whole refs, one by one."""
    if not is_interpreted():
        body()
        return

    def take_turns(over: Any) -> None:
        for turn in range(warpgroups):
            pl.when(lax.axis_index("warpgroup") == turn)(body)
            plgpu.barrier_arrive(over)
            plgpu.barrier_wait(over)

    barrier = plgpu.Barrier(num_arrivals=warpgroups)
    pl.run_scoped(take_turns, barrier, collective_axes="warpgroup")


def layout(n: int) -> Any:
    """Of arrays ``[4, 32, n]``."""
    tiling = fa.Tiling(((WARPS, LANES, n),))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def array_type(n: int, dtype: Any) -> Any:
    """An array ``[4, 32, n]`` as inline code returns it."""
    return plgpu.ShapeDtypeStruct((WARPS, LANES, n), dtype, layout=layout(n))


def array_of(registers: Registers) -> fa.FragmentedArray:
    """The array that holds a lane's registers, in inline code."""
    words = np.array(_pack(registers), dtype=object)
    tiled = layout(len(registers)).to_mgpu()
    return fa.FragmentedArray(
        _registers=words.reshape(tiled.registers_shape((WARPS, LANES, len(registers)))),
        _layout=tiled,
        _is_signed=None if registers[0].type == ir.F32Type.get() else False,
    )


def unpack(value: ir.Value) -> Registers:
    """The registers that a vector stands for, in inline code."""
    [n] = ir.VectorType(value.type).shape
    return [
        vector.extract(value, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(n)
    ]


def _pack(registers: Registers) -> ir.Value:
    out = llvm.mlir_undef(ir.VectorType.get((len(registers),), registers[0].type))
    for i, register in enumerate(registers):
        out = llvm.insertelement(out, register, position=_constant(i))
    return out


def _constant(value: int) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return mgpu_utils.c(value - (value >> 31 << 32), i32)


class Ptx:
    """Emits PTX for the lane that runs it. Registers are MLIR values of type i32 or f32."""

    def __init__(self) -> None:
        self.i32 = ir.IntegerType.get_signless(32)
        self.f32 = ir.F32Type.get()

    def _asm(self, result: Any, text: str, constraints: str, *operands: Any, effects=False) -> Any:
        return llvm.inline_asm(result, list(operands), text, constraints, has_side_effects=effects)

    def u32(self, value: int) -> Register:
        return _constant(value)

    def number(self, value: float) -> Register:
        return mgpu_utils.c(value, self.f32)

    def opaque(self, bits: int) -> Registers:
        # No GPU has 2**24 SMs: these are 0, which the assembler does not know.
        sm = self._asm(self.i32, "mov.u32 $0, %smid;", "=r")
        return [arith.ori(arith.shrui(sm, _constant(24 + n)), _constant(bits)) for n in range(4)]

    def lane(self) -> Register:
        return arith.remui(mgpu_utils.thread_idx(), _constant(LANES))

    def warp(self) -> Register:
        thread = arith.remui(mgpu_utils.thread_idx(), _constant(WARPS * LANES))
        return arith.divui(thread, _constant(LANES))

    def iadd(self, a: Register, b: Register) -> Register:
        return arith.addi(a, b)

    def imul(self, a: Register, b: Register) -> Register:
        return arith.muli(a, b)

    def idiv(self, a: Register, b: Register) -> Register:
        return arith.divui(a, b)

    def irem(self, a: Register, b: Register) -> Register:
        return arith.remui(a, b)

    def imin(self, a: Register, b: Register) -> Register:
        return arith.minui(a, b)

    def less(self, a: Register, b: Register) -> Register:
        return arith.cmpi(arith.CmpIPredicate.ult, a, b)

    def either(self, a: Register, b: Register) -> Register:
        return arith.ori(a, b)

    def any_lane(self, a: Register) -> Register:
        text = "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
        out = self._asm(self.i32, text, "=r,r", arith.extui(self.i32, a), effects=True)
        return arith.cmpi(arith.CmpIPredicate.ne, out, _constant(0))

    def shuffle_xor(self, a: Register, distance: int) -> Register:
        text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
        return self._asm(self.f32, text, "=f,f", a, effects=True)

    def both(self, a: Register, b: Register) -> Register:
        return arith.andi(a, b)

    def less_float(self, a: Register, b: Register) -> Register:
        return arith.cmpf(arith.CmpFPredicate.OLT, a, b)

    def select(self, where: Register, a: Register, b: Register) -> Register:
        return arith.select(where, a, b)

    def and_(self, a: Register, mask: int) -> Register:
        return arith.andi(a, _constant(mask))

    def or_(self, a: Register, b: Register) -> Register:
        return arith.ori(a, b)

    def shift_right(self, a: Register, bits: int) -> Register:
        return arith.shrui(a, _constant(bits)) if bits else a

    def shift_left(self, a: Register, bits: int) -> Register:
        return arith.shli(a, _constant(bits)) if bits else a

    def and_or(self, a: Register, mask: int, bits: int) -> Register:
        text = f"lop3.b32 $0, $1, {mask:#x}, {bits:#x}, 0xEA;"
        return self._asm(self.i32, text, "=r,r", a)

    def and_or_register(self, a: Register, mask: int, b: Register) -> Register:
        return self._asm(self.i32, f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", "=r,r,r", a, b)

    def xor(self, a: Register, bits: int) -> Register:
        return arith.xori(a, _constant(bits))

    def bytes_of(self, a: Register, selector: int, bits: int = 0) -> Register:
        return self._asm(self.i32, f"prmt.b32 $0, $1, {bits:#x}, {selector:#x};", "=r,r", a)

    def bytes_of_two(self, a: Register, b: Register, selector: int) -> Register:
        return self._asm(self.i32, f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r", a, b)

    def bf16x2_of_floats(self, low: Register, high: Register) -> Register:
        return self._asm(self.i32, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", low, high)

    def subtract_bf16x2(self, a: Register, b: Register) -> Register:
        return self._asm(self.i32, "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", a, b)

    def float_of_half(self, a: Register, place: int) -> Register:
        words = ("h, dropped", "dropped, h")[place]
        text = f"{{ .reg .b16 h, dropped; mov.b32 {{{words}}}, $1; cvt.f32.f16 $0, h; }}"
        return self._asm(self.f32, text, "=f,r", a)

    def float_of_byte(self, a: Register, place: int, *, signed: bool = False) -> Register:
        kind = "s" if signed else "u"
        text = f"{{ .reg .b32 b; bfe.{kind}32 b, $1, {8 * place}, 8; cvt.rn.f32.{kind}8 $0, b; }}"
        return self._asm(self.f32, text, "=f,r", a)

    def float_of_bits(self, a: Register) -> Register:
        return arith.bitcast(self.f32, a)

    def bits_of_float(self, a: Register) -> Register:
        return arith.bitcast(self.i32, a)

    def fadd(self, a: Register, b: Register) -> Register:
        return self._asm(self.f32, "add.rn.f32 $0, $1, $2;", "=f,f,f", a, b)

    def fmax(self, a: Register, b: Register) -> Register:
        return self._asm(self.f32, "max.f32 $0, $1, $2;", "=f,f,f", a, b)

    def fmul(self, a: Register, b: Register) -> Register:
        return self._asm(self.f32, "mul.rn.f32 $0, $1, $2;", "=f,f,f", a, b)

    def fneg(self, a: Register) -> Register:
        return arith.negf(a)

    def fma(self, a: Register, b: Register, c: Register) -> Register:
        return self._asm(self.f32, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)

    def exp2(self, a: Register) -> Register:
        return self._asm(self.f32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", a)

    def reciprocal(self, a: Register) -> Register:
        return self._asm(self.f32, "rcp.approx.ftz.f32 $0, $1;", "=f,f", a)

    def mma(self, a: Registers, b: Registers, c: Registers) -> Registers:
        four = llvm.StructType.get_literal([self.f32] * 4)
        text = (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        out = self._asm(four, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *a, *b, *c)
        return [llvm.extractvalue(self.f32, out, [i]) for i in range(4)]

    def load(
        self,
        ref: Any,
        word: Register,
        n: int,
        *,
        offset: int = 0,
        where: Register | None = None,
        otherwise: int | None = 0,
        streamed: bool = False,
    ) -> Registers:
        """n 32-bit words (1, 2 or 4, aligned) from ``word + offset`` of `ref` on.

        Where `where` is false nothing is read, and the words are `otherwise`; None says that anything will do. Streamed
        words bypass L1 and draw the rest of their 256 bytes into L2.
        """
        space, pointer, width = self._pointer(ref, word)
        hints = ".L1::no_allocate.L2::256B" if streamed else ""
        outs = ", ".join(f"${i}" for i in range(n))
        vector_suffix = "" if n == 1 else f".v{n}"
        target = outs if n == 1 else f"{{{outs}}}"
        text = f"ld.{space}{hints}{vector_suffix}.b32 {target}, [${n}+{4 * offset}];"
        operands = [pointer]
        constraints = ",".join(["=r"] * n + [width])
        if where is not None:
            preset = (
                [f"mov.b32 ${i}, {otherwise:#x};" for i in range(n)]
                if otherwise is not None
                else []
            )
            text = f"{{ .reg .pred p; setp.ne.b32 p, ${n + 1}, 0; {' '.join(preset)} @p {text} }}"
            constraints = ",".join(["=&r"] * n + [width, "r"])
            operands.append(arith.extui(self.i32, where))
        # Loads keep their place: without effects, or with .nc, the assembler would move them to where the words are
        # used.
        if n == 1:
            return [self._asm(self.i32, text, constraints, *operands, effects=True)]
        struct = llvm.StructType.get_literal([self.i32] * n)
        out = self._asm(struct, text, constraints, *operands, effects=True)
        return [llvm.extractvalue(self.i32, out, [i]) for i in range(n)]

    def store(
        self,
        ref: Any,
        word: Register,
        values: Registers,
        *,
        offset: int = 0,
        where: Register | None = None,
    ) -> None:
        """Writes float32 or 32-bit integers to word ``word + offset`` of `ref` and those after it, where `where`."""
        space, pointer, width = self._pointer(ref, word)
        n = len(values)
        kind = "f" if values[0].type == self.f32 else "r"
        names = ", ".join(f"${i + 1}" for i in range(n))
        text = f"st.{space}{'' if n == 1 else f'.v{n}'}.b32 [$0+{4 * offset}], {names if n == 1 else f'{{{names}}}'};"
        operands = [pointer, *values]
        constraints = [width, *[kind] * n]
        if where is not None:
            text = f"{{ .reg .pred p; setp.ne.b32 p, ${n + 1}, 0; @p {text} }}"
            operands.append(arith.extui(self.i32, where))
            constraints.append("r")
        self._asm(None, text, ",".join(constraints), *operands, effects=True)

    def _pointer(self, ref: Any, word: Register) -> tuple[str, ir.Value, str]:
        shared = mgpu_utils.is_smem_ref(ref)
        i64 = ir.IntegerType.get_signless(64)
        if shared:
            base = llvm.ptrtoint(self.i32, mgpu_utils.memref_ptr(ref))
            return "shared", arith.addi(base, arith.muli(word, _constant(4))), "r"
        base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
        offset = arith.muli(arith.extui(i64, word), mgpu_utils.c(4, i64))
        return "global", arith.addi(base, offset), "l"


def _emulate(
    program: Callable[..., Sequence[Registers]],
    results: Sequence[tuple[int, Any]],
    refs: Sequence[Any],
    arrays: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    stores: Sequence[int],
) -> list[jax.Array]:
    """`run` on a CPU. In numpy: compiled, a program's thousands of small operations would take seconds."""

    def on_host(contents: Any, arrays: Any, scalars: Any) -> Any:
        memories = [Memory(np.array(content)) for content in contents]
        inputs = [
            [np.array(a[..., i]) for i in range(a.shape[-1])] for a in map(np.asarray, arrays)
        ]
        singles = [np.full((WARPS, LANES), s, np.int32).view(np.uint32) for s in scalars]
        with np.errstate(all="ignore"):
            out = program(Emulated(), memories, inputs, singles)
        assert [len(registers) for registers in out] == [n for n, _ in results]
        values = [
            np.stack(registers, axis=-1).astype(dtype)
            for registers, (_, dtype) in zip(out, results, strict=True)
        ]
        return values, [memories[i].content() for i in stores]

    contents = [ref[...] for ref in refs]
    shapes = (
        [jax.ShapeDtypeStruct((WARPS, LANES, n), dtype) for n, dtype in results],
        [jax.ShapeDtypeStruct(contents[i].shape, contents[i].dtype) for i in stores],
    )
    values, written = jax.pure_callback(on_host, shapes, contents, list(arrays), list(scalars))
    for i, content in zip(stores, written, strict=True):
        refs[i][...] = content
    return values


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

    def lane(self) -> Register:
        return np.broadcast_to(np.arange(LANES, dtype=np.uint32), (WARPS, LANES))

    def warp(self) -> Register:
        return np.broadcast_to(np.arange(WARPS, dtype=np.uint32)[:, None], (WARPS, LANES))

    def iadd(self, a: Register, b: Register) -> Register:
        return a + b

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

    def either(self, a: Register, b: Register) -> Register:
        return a | b

    def any_lane(self, a: Register) -> Register:
        return np.broadcast_to(np.any(a, axis=1, keepdims=True), (WARPS, LANES))

    def shuffle_xor(self, a: Register, distance: int) -> Register:
        return a[:, np.arange(LANES) ^ distance]

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
        out = np.zeros_like(a)
        for place in range(4):
            which = (selector >> (4 * place)) & 15
            assert which < 8, "sign replication is not modelled"
            byte = ((a, b)[which // 4] >> np.uint32(8 * (which % 4))) & np.uint32(255)
            out |= byte << np.uint32(8 * place)
        return out

    def bf16x2_of_floats(self, low: Register, high: Register) -> Register:
        return _word_of_bf16(np.stack([low, high], axis=-1))

    def subtract_bf16x2(self, a: Register, b: Register) -> Register:
        return _word_of_bf16(_bf16_of_word(a) - _bf16_of_word(b))

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

    def mma(self, a: Registers, b: Registers, c: Registers) -> Registers:
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
