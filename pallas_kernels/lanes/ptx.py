"""The instructions of lane programs as PTX, for the one lane that runs it."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.lanes.registers import LANES, WARPS, Register, Registers


def constant(value: int) -> ir.Value:
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
        return constant(value)

    def number(self, value: float) -> Register:
        return mgpu_utils.c(value, self.f32)

    def opaque(self, bits: int) -> Registers:
        # No GPU has 2**24 SMs: these are 0, which the assembler does not know.
        sm = self._asm(self.i32, "mov.u32 $0, %smid;", "=r")
        return [arith.ori(arith.shrui(sm, constant(24 + n)), constant(bits)) for n in range(4)]

    def zero_after(self, value: Register) -> Register:
        """0, but the assembler cannot know that before it has the float32 `value`.

        Added to an address it keeps a load behind the products that use up the registers which it is to fill.
        """
        text = "{ .reg .b32 s; mov.u32 s, %smid; shr.b32 s, s, 24; and.b32 $0, s, $1; }"
        return self._asm(self.i32, text, "=r,r", arith.bitcast(self.i32, value))

    def lane(self) -> Register:
        return arith.remui(mgpu_utils.thread_idx(), constant(LANES))

    def warp(self) -> Register:
        thread = arith.remui(mgpu_utils.thread_idx(), constant(WARPS * LANES))
        return arith.divui(thread, constant(LANES))

    def iadd(self, a: Register, b: Register) -> Register:
        return arith.addi(a, b)

    def isub(self, a: Register, b: Register) -> Register:
        return arith.subi(a, b)

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

    def equal(self, a: Register, b: Register) -> Register:
        return arith.cmpi(arith.CmpIPredicate.eq, a, b)

    def either(self, a: Register, b: Register) -> Register:
        return arith.ori(a, b)

    def any_lane(self, a: Register) -> Register:
        text = "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
        out = self._asm(self.i32, text, "=r,r", arith.extui(self.i32, a), effects=True)
        return arith.cmpi(arith.CmpIPredicate.ne, out, constant(0))

    def shuffle_xor(self, a: Register, distance: int) -> Register:
        text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
        return self._asm(self.f32, text, "=f,f", a, effects=True)

    def shuffle(self, a: Register, lane: Register) -> Register:
        text = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        return self._asm(self.f32, text, "=f,f,r", a, lane, effects=True)

    def both(self, a: Register, b: Register) -> Register:
        return arith.andi(a, b)

    def less_float(self, a: Register, b: Register) -> Register:
        return arith.cmpf(arith.CmpFPredicate.OLT, a, b)

    def select(self, where: Register, a: Register, b: Register) -> Register:
        return arith.select(where, a, b)

    def and_(self, a: Register, mask: int) -> Register:
        return arith.andi(a, constant(mask))

    def or_(self, a: Register, b: Register) -> Register:
        return arith.ori(a, b)

    def shift_right(self, a: Register, bits: int) -> Register:
        return arith.shrui(a, constant(bits)) if bits else a

    def shift_left(self, a: Register, bits: int) -> Register:
        return arith.shli(a, constant(bits)) if bits else a

    def and_or(self, a: Register, mask: int, bits: int) -> Register:
        text = f"lop3.b32 $0, $1, {mask:#x}, {bits:#x}, 0xEA;"
        return self._asm(self.i32, text, "=r,r", a)

    def and_or_register(self, a: Register, mask: int, b: Register) -> Register:
        return self._asm(self.i32, f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", "=r,r,r", a, b)

    def xor(self, a: Register, bits: int) -> Register:
        return arith.xori(a, constant(bits))

    def bytes_of(self, a: Register, selector: int, bits: int = 0) -> Register:
        return self._asm(self.i32, f"prmt.b32 $0, $1, {bits:#x}, {selector:#x};", "=r,r", a)

    def bytes_of_two(self, a: Register, b: Register, selector: int) -> Register:
        return self._asm(self.i32, f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r", a, b)

    def bytes_at(self, a: Register, b: Register, selector: Register) -> Register:
        """`bytes_of_two` by a selector that the lane has computed."""
        return self._asm(self.i32, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", a, b, selector)

    def bf16x2_of_floats(self, low: Register, high: Register) -> Register:
        return self._asm(self.i32, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", low, high)

    def subtract_bf16x2(self, a: Register, b: Register) -> Register:
        return self._asm(self.i32, "sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", a, b)

    def fma_bf16x2(self, a: Register, b: Register, c: Register) -> Register:
        return self._asm(self.i32, "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", a, b, c)

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

    def fsub(self, a: Register, b: Register) -> Register:
        return self._asm(self.f32, "sub.rn.f32 $0, $1, $2;", "=f,f,f", a, b)

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

    def reciprocal_root(self, a: Register) -> Register:
        return self._asm(self.f32, "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", a)

    def mma(self, a: Registers, b: Registers, c: Registers) -> Registers:
        """a @ b + c of 16 columns of a, or of eight where `a` is a0 and a1 and `b` is b0."""
        four = llvm.StructType.get_literal([self.f32] * 4)
        first_b, first_c = 4 + len(a), 4 + len(a) + len(b)
        groups = ((0, 4), (4, first_b), (first_b, first_c), (first_c, first_c + 4))
        lists = ("{" + ",".join(f"${n}" for n in range(*group)) + "}" for group in groups)
        text = f"mma.sync.aligned.m16n8k{8 * len(b)}.row.col.f32.bf16.bf16.f32 {', '.join(lists)};"
        constraints = ",".join(["=f"] * 4 + ["r"] * (len(a) + len(b)) + ["f"] * 4)
        out = self._asm(four, text, constraints, *a, *b, *c)
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

        Where `where` is false nothing is read, and the words are `otherwise`; None says that anything will do, but then
        the assembler keeps what the registers held: in a loop they are taken from one turn to the next. Streamed words
        bypass L1 and draw the rest of their 256 bytes into L2.
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

    def fetch_add(self, ref: Any, word: Register, value: int, where: Register) -> Register:
        """Adds to a word of global memory, where `where`, and returns what it was before, else 0.

        What this thread wrote before, and what it knows others of its CTA to have written, every thread of the GPU sees
        that reads the sum; and this one sees what those before it wrote (acquire and release).
        """
        _, pointer, width = self._pointer(ref, word)
        text = (
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
            f"@p atom.acq_rel.gpu.global.add.u32 $0, [$1], {value}; }}"
        )
        operands = [pointer, arith.extui(self.i32, where)]
        return self._asm(self.i32, text, f"=&r,{width},r", *operands, effects=True)

    def synchronize(self) -> None:
        """The warpgroup's threads wait for each other and see what each has written."""
        mgpu_utils.warpgroup_barrier()

    def _pointer(self, ref: Any, word: Register) -> tuple[str, ir.Value, str]:
        shared = mgpu_utils.is_smem_ref(ref)
        i64 = ir.IntegerType.get_signless(64)
        if shared:
            base = llvm.ptrtoint(self.i32, mgpu_utils.memref_ptr(ref))
            return "shared", arith.addi(base, arith.muli(word, constant(4))), "r"
        base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
        offset = arith.muli(arith.extui(i64, word), mgpu_utils.c(4, i64))
        return "global", arith.addi(base, offset), "l"
