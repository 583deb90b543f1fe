"""``residual_norm`` in one small kernel, a CTA of one warpgroup for each row, which keeps the row in registers.

    h, y_i, weights ──16-byte loads──▶ registers ──▶ sum y_i**2 ─▶ z ──▶ sum z**2 ─▶ h ──▶ sum h**2 ─▶ norms
                                                      └── lanes: shuffles; warps: 16 bytes of shared memory ──┘

Every lane has four elements of each 512: all loads are on their way before the first sum. Sums are added in a fixed
order. Registers: D / 128 for h and for each branch. Bytes moved: each array once. Bound: the latency of one load and
three barriers; what it saves is the three or four kernels that XLA needs. No card has run it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes
from pallas_kernels.lanes import Register, Registers
from pallas_kernels.residual_norm import Pending

MAX_ROWS = 16
_THREADS = lanes.WARPS * lanes.LANES
_VECTOR = 4
_MOST_REGISTERS = 160  # of a lane, for h and the branches


def why_not(stream: Pending, norms: tuple[jax.Array | None, ...], dtype: Any) -> str | None:
    """Wants at most 16 rows, D a multiple of 8 that fits the registers, weights in bfloat16 or float32."""
    rows, hidden = math.prod(stream.h.shape[:-1]), stream.h.shape[-1]
    if not 0 < rows <= MAX_ROWS:
        return f"the stream has {rows} rows: expected 1 to {MAX_ROWS}"
    if hidden % (2 * _VECTOR):
        return f"D is {hidden}: expected a multiple of {2 * _VECTOR}"
    held = (1 + len(stream.branches)) * _VECTOR * _vectors(hidden)
    if held > _MOST_REGISTERS:
        return (
            f"D is {hidden}: with {len(stream.branches)} branches a row does not fit the registers"
        )
    for weight in (*(w for _, w in stream.branches), stream.outer, *norms):
        if weight is not None and weight.dtype not in (jnp.bfloat16, jnp.float32):
            return f"a weight has dtype {weight.dtype}: expected bfloat16 or float32"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype is {jnp.dtype(dtype).name}: expected bfloat16 or float32"
    return None


def default_config(stream: Pending, norms: tuple[jax.Array | None, ...], dtype: Any) -> None:
    """Has none."""
    del stream, norms, dtype


def residual_norm(
    stream: Pending, norms: tuple[jax.Array | None, ...], *, dtype: Any, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `pallas_kernels.residual_norm.residual_norm`."""
    hidden = stream.h.shape[-1]
    rows = math.prod(stream.h.shape[:-1])
    ys = [y.reshape(rows, hidden) for y, _ in stream.branches]
    given = [stream.outer, stream.scalar, *norms]
    arrays = [
        stream.h.reshape(rows, hidden),
        *ys,
        *(weight for _, weight in stream.branches),
        *(array for array in given if array is not None),
    ]
    kernel = _Kernel(
        rows,
        hidden,
        len(ys),
        stream.outer is not None,
        stream.scalar is not None,
        tuple(w is not None for w in norms),
        jnp.dtype(dtype),
        eps,
    )
    h, *out = kernel.call(arrays)
    shape = stream.h.shape
    return h.reshape(shape), tuple(x.reshape(shape) for x in out)


def _vectors(hidden: int) -> int:
    """Of a lane, for each row."""
    return -(-hidden // (_THREADS * _VECTOR))


class _Kernel:
    def __init__(
        self,
        rows: int,
        hidden: int,
        branches: int,
        has_outer: bool,
        has_scalar: bool,
        norms: tuple[bool, ...],
        dtype: Any,
        eps: float,
    ) -> None:
        self.rows, self.hidden, self.branches = rows, hidden, branches
        self.has_outer, self.has_scalar = has_outer, has_scalar
        self.norms, self.dtype, self.eps = norms, dtype, eps

    @property
    def held(self) -> int:
        """Registers of a lane for a vector of length D."""
        return _VECTOR * _vectors(self.hidden)

    def call(self, arrays: list[jax.Array]) -> list[jax.Array]:
        shape = (self.rows, self.hidden)
        outputs = [jax.ShapeDtypeStruct(shape, jnp.float32)]
        outputs += [jax.ShapeDtypeStruct(shape, self.dtype)] * len(self.norms)
        self._dtypes = [array.dtype for array in arrays]
        return plgpu.kernel(
            self._body,
            out_type=tuple(outputs),
            grid=(self.rows,),
            grid_names=("row",),
            num_threads=1,
            thread_name="warpgroup",
            scratch_types=(
                # The two branches' sums, that of what is added, that of the result.
                plgpu.SMEM((4, lanes.WARPS), jnp.float32),
                plgpu.Barrier(num_arrivals=1),
            ),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=lanes.interpret_params(),
            kernel_name="residual_norm",
        )(*arrays)

    def _body(self, *refs: Any) -> None:
        count = len(self._dtypes)
        inputs, outputs = refs[:count], refs[count:-2]
        sums, exchanged = refs[-2:]
        row = jax.lax.axis_index("row")

        def run(program: Any, held: int, arrays: list[Any], stores: list[int]) -> list[Any]:
            results = [(self.held, jnp.float32)] * held
            all_refs = [*inputs, *outputs, sums]
            return lanes.run(
                program, results, refs=all_refs, arrays=arrays, scalars=[row], stores=stores
            )

        def exchange() -> None:
            plgpu.barrier_arrive(exchanged)
            plgpu.barrier_wait(exchanged)

        at_sums = count + len(outputs)
        held = run(self._load, 1 + self.branches, [], [at_sums] if self.branches else [])
        if self.branches:
            exchange()
            held = run(self._add_branches, 2, held, [at_sums] if self.has_outer else [])
            if self.has_outer:
                exchange()
        held = run(self._result, 1, held, [at_sums])
        exchange()
        run(self._norms, 0, held, list(range(count, at_sums)))

    # --- lane programs ---

    def _load(self, i: Any, refs: Any, _: Any, scalars: Any) -> list[Registers]:
        """h and the branches; of these each warp's sum of squares."""
        first = i.imul(scalars[0], i.u32(self.hidden))
        vectors = [self._vector(i, refs[n], jnp.float32, first) for n in range(1 + self.branches)]
        for n, y in enumerate(vectors[1:]):
            self._store_sum(i, refs[-1], n, y)
        return vectors

    def _add_branches(self, i: Any, refs: Any, arrays: Any, _: Any) -> list[Registers]:
        """h, and what is added to it, before its norm if it has one."""
        h, *ys = arrays
        z = [i.number(0.0)] * self.held
        for n, y in enumerate(ys):
            weight = self._weight(i, refs, 1 + self.branches + n)
            factor = self._factor(i, refs[-1], n)
            z = [
                i.fma(i.fmul(value, factor), w, total)
                for value, w, total in zip(y, weight, z, strict=True)
            ]
        if self.has_outer:
            self._store_sum(i, refs[-1], 2, z)
        return [h, z]

    def _result(self, i: Any, refs: Any, arrays: Any, _: Any) -> list[Registers]:
        """The stream with everything done to it, and each warp's sum of its squares."""
        h, at = arrays[0], 1 + 2 * self.branches
        if self.branches:
            z = arrays[1]
            if self.has_outer:
                factor = self._factor(i, refs[-1], 2)
                weight = self._weight(i, refs, at)
                z = [i.fmul(i.fmul(v, factor), w) for v, w in zip(z, weight, strict=True)]
            h = [i.fadd(a, b) for a, b in zip(h, z, strict=True)]
        if self.has_scalar:
            [bits] = i.load(refs[at + self.has_outer], i.u32(0), 1)
            h = [i.fmul(value, i.float_of_bits(bits)) for value in h]
        self._store_sum(i, refs[-1], 3, h)
        return [h]

    def _norms(self, i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Registers]:
        """Writes the stream and its norms."""
        [h] = arrays
        first = i.imul(scalars[0], i.u32(self.hidden))
        factor = self._factor(i, refs[-1], 3)
        count = len(self._dtypes)
        at = 1 + 2 * self.branches + self.has_outer + self.has_scalar
        self._store(i, refs[count], jnp.dtype(jnp.float32), first, h)
        normed = [i.fmul(value, factor) for value in h]
        for n, has_weight in enumerate(self.norms):
            x = h
            if has_weight:
                x = [i.fmul(v, w) for v, w in zip(normed, self._weight(i, refs, at), strict=True)]
                at += 1
            self._store(i, refs[count + 1 + n], self.dtype, first, x)
        return []

    # --- a share of a vector of length D, in the registers of a lane ---

    def _places(self, i: Any) -> list[tuple[Register, Register]]:
        """(first element, whether there is one) of each four elements."""
        thread = i.iadd(i.shift_left(i.warp(), 5), i.lane())
        out = []
        for n in range(_vectors(self.hidden)):
            element = i.shift_left(i.iadd(thread, i.u32(n * _THREADS)), 2)
            out.append((element, i.less(element, i.u32(self.hidden))))
        return out

    def _weight(self, i: Any, refs: Any, n: int) -> Registers:
        return self._vector(i, refs[n], self._dtypes[n], i.u32(0))

    def _vector(self, i: Any, ref: Any, dtype: Any, first: Register) -> Registers:
        """float32, zero beyond the end."""
        out: Registers = []
        for element, exists in self._places(i):
            at = i.iadd(first, element)
            if dtype == jnp.float32:
                words = i.load(ref, at, _VECTOR, where=exists)
                out += [i.float_of_bits(word) for word in words]
                continue
            for word in i.load(ref, i.shift_right(at, 1), _VECTOR // 2, where=exists):
                halves = (i.shift_left(word, 16), i.and_(word, 0xFFFF0000))
                out += [i.float_of_bits(half) for half in halves]
        return out

    def _store(self, i: Any, ref: Any, dtype: Any, first: Register, values: Registers) -> None:
        for n, (element, exists) in enumerate(self._places(i)):
            four = values[_VECTOR * n : _VECTOR * (n + 1)]
            at = i.iadd(first, element)
            if dtype == jnp.float32:
                i.store(ref, at, [i.bits_of_float(value) for value in four], where=exists)
            else:
                words = [i.bf16x2_of_floats(*four[k : k + 2]) for k in (0, 2)]
                i.store(ref, i.shift_right(at, 1), words, where=exists)

    def _store_sum(self, i: Any, sums: Any, slot: int, values: Registers) -> None:
        """Each warp's sum of squares to ``sums[slot, warp]``."""
        total = i.number(0.0)
        for value in values:
            total = i.fma(value, value, total)
        for distance in (1, 2, 4, 8, 16):
            total = i.fadd(total, i.shuffle_xor(total, distance))
        word = i.iadd(i.warp(), i.u32(slot * lanes.WARPS))
        i.store(sums, word, [i.bits_of_float(total)], where=i.equal(i.lane(), i.u32(0)))

    def _factor(self, i: Any, sums: Any, slot: int) -> Register:
        """``1 / sqrt(mean + eps)`` of the vector whose warps' sums of squares are in `slot`."""
        words = i.load(sums, i.u32(slot * lanes.WARPS), lanes.WARPS)
        a, b, c, d = (i.float_of_bits(word) for word in words)
        total = i.fadd(i.fadd(a, b), i.fadd(c, d))
        return i.reciprocal_root(i.fma(total, i.number(1.0 / self.hidden), i.number(self.eps)))
