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
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.lanes.emulated import Emulated, Memory
from pallas_kernels.lanes.ptx import Ptx, constant
from pallas_kernels.lanes.registers import LANES, WARPS, Register, Registers

__all__ = [
    "LANES",
    "WARPS",
    "Emulated",
    "Memory",
    "Ptx",
    "Register",
    "Registers",
    "array_of",
    "array_type",
    "constant_array",
    "in_turn",
    "interpret_params",
    "interpreted",
    "is_interpreted",
    "layout",
    "run",
    "unpack",
    "zeros",
]

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


def constant_array(make: Callable[[Any], Registers]) -> jax.Array:
    """Four registers of every lane, as ``make(instructions)`` gives them: uint32 ``[4, 32, 4]``."""
    [out] = run(lambda i, *_: [make(i)], [(4, U32)])
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
    words = np.array(pack(registers), dtype=object)
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


def pack(registers: Registers) -> ir.Value:
    """The vector of a lane's registers, in inline code."""
    out = llvm.mlir_undef(ir.VectorType.get((len(registers),), registers[0].type))
    for i, register in enumerate(registers):
        out = llvm.insertelement(out, register, position=constant(i))
    return out


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
