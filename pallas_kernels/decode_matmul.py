"""The kernel for up to 16 rows of x that ops share: products on tensor cores, bound by reading the weights.

    global memory ──16-byte loads, a turn ahead──▶ registers ──lop3──▶ A fragment ─┐
    x, in L1 after the first touch ─────16-byte loads──────────────▶ B fragment ─┴▶ mma.sync ─▶ float32 sums
    sums of the warps that share a row tile ──shared memory──▶ added in order ──▶ the op's `Product.write`

A *unit* is a row tile (16 rows of w) by a chunk (256 or 64 columns): 2.3 KB in Q4K. The grid is persistent: a CTA of
`Config.warpgroups` x 4 warps takes `Config.tiles` row tiles at a time, and its warps take turns in the chunks of a
tile, so K is split over warps / tiles of them. Each warp reads its own units, holds those of a turn in registers while
the next, also those of the next tile, are on their way, and meets the others once a tile. Sums are added in a fixed
order: results do not depend on timing.

Bytes moved: w once; x once per SM, from L2. Shared memory: 128 bytes per warp and row of x. Registers: what 16 warps an
SM leave, 128; of Q6K what 12 leave, 168. Bound: the weights' bytes at the card's copy bandwidth. No card has run it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes
from pallas_kernels.fragments import Units
from pallas_kernels.lanes import Register
from pallas_kernels.packed import ROWS


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is spread over the GPU.

    tiles: row tiles that a CTA works on at a time; divides its warps.
    warpgroups: a CTA has four times as many warps; what fits the registers of an SM is `Units.warpgroups`.
    ctas: of the grid, at most; one for each SM of an H100 or H200.
    units: that a warp has on their way at a time; more than one where units are small.
    """

    tiles: int = 1
    warpgroups: int = 4
    ctas: int = 132
    units: int = 1

    def __post_init__(self) -> None:
        if self.warpgroups > 8 or 4 * self.warpgroups % self.tiles:
            raise ValueError(
                f"tiles = {self.tiles}, warpgroups = {self.warpgroups}: expected at most 8 warpgroups, and tiles that "
                "divide their warps"
            )

    @classmethod
    def fewest_turns(
        cls, unit: Units, tiles: int, chunks: int, *, span: int = 1, units: int = 1
    ) -> Self:
        """As many warpgroups as registers allow, and the tiles, a multiple of `span`, with the fewest `turns`."""
        warps = 4 * unit.warpgroups
        counts = (n for n in range(span, warps + 1, span) if warps % n == 0)
        configs = (cls(n, unit.warpgroups, units=units) for n in counts)
        return min(configs, key=lambda c: c.turns(tiles, chunks))

    def turns(self, tiles: int, chunks: int) -> int:
        """How often the busiest warp waits for memory in a product of so many row tiles and chunks."""
        groups = -(-tiles // self.tiles)
        parts = 4 * self.warpgroups // self.tiles
        return -(-groups // self.ctas) * -(-chunks // (parts * self.units))


@dataclasses.dataclass(frozen=True)
class Product:
    """What an op computes, to the kernel: which units there are, which x each meets, and what becomes of the sums.

    A product has `tiles` row tiles of 16 sums for each row of x, and each is summed over `chunks` units. The functions
    are lane programs: they get the instructions, the refs of `tables`, and a row tile and chunk that may both lie
    beyond the last, where nothing is read of w.

    name: of the kernel.
    rows: of x that a unit is multiplied by, 1 to 16.
    unit_at: ``(i, tables, tile, chunk)``: the index of the unit in its planes.
    x_at: ``(i, tables, tile, chunk, row)``: the 32-bit word at which its columns begin in row `row` of x.
    write: ``(i, tables, y, tile, row, x_row, inside, totals)`` stores, where `inside`, ``totals[s][v]``: the product of
        row `row + v` of row tile `tile + s` with row `x_row` of x.
    shape, dtype: of y.
    tables: further arrays.
    factor_at: ``(i, tables, tile, chunk)``: float32 by which the unit's product is multiplied; None for 1.
    tiles_in_use: from the refs of `tables` the number of row tiles there are, int32, if that is known on the device
        only; `tiles` is then the most there can be.
    span, vector: how many row tiles and rows `write` wants at a time; `span` divides `Config.tiles`.
    """

    name: str
    rows: int
    tiles: int
    chunks: int
    unit_at: Callable[..., Register]
    x_at: Callable[..., Register]
    write: Callable[..., None]
    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    tables: tuple[jax.Array, ...] = ()
    factor_at: Callable[..., Register] | None = None
    tiles_in_use: Callable[..., jax.Array] | None = None
    span: int = 1
    vector: int = 1


def multiply(x: jax.Array, unit: Units, product: Product, config: Config) -> jax.Array:
    """y, of `product`, from bfloat16 x and the weights of `unit`."""
    return _kernel(unit, product, config)(x, *unit.planes, *product.tables)


def mmas_per_fragment(unit: Units, rows: int) -> float:
    """Tensor-core instructions for each 16 x 16 weights, of all tiles of columns."""
    return -(-rows // 8) * unit.mmas


def gelu(i: Any, x: Any) -> Any:
    """The tanh form as ``x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x**3)))``.

    The instruction for tanh has 11 bits; those for powers of two and reciprocals have 22.
    """
    factor = -2 * math.sqrt(2 / math.pi) * math.log2(math.e)
    square = i.fmul(x, x)
    power = i.fmul(x, i.fma(square, i.number(0.044715 * factor), i.number(factor)))
    return i.fmul(x, i.reciprocal(i.fadd(i.exp2(power), i.number(1.0))))


def _flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def _kernel(unit: Units, product: Product, config: Config) -> Any:
    m, chunks = product.rows, product.chunks
    parts = 4 * config.warpgroups // config.tiles  # of K
    rounds = -(-chunks // (parts * config.units))
    column_tiles = -(-m // 8)
    columns = (0,) if m == 1 else (0, 1)
    ctas = min(config.ctas, -(-product.tiles // config.tiles))
    tables_from = len(unit.planes)

    def places(
        i: Any, tiles: Any, warpgroup: Any, group: Any, turn: Any
    ) -> list[tuple[Any, Any, Any]]:
        """Of each unit of this warp's turn: its row tile in the group, its chunk, and whether there is such a unit."""
        warp = i.iadd(i.shift_left(warpgroup, 2), i.warp())
        tile = i.iadd(i.imul(group, i.u32(config.tiles)), i.irem(warp, i.u32(config.tiles)))
        part = i.iadd(i.imul(turn, i.u32(parts)), i.idiv(warp, i.u32(config.tiles)))
        out = []
        for place in range(config.units):
            chunk = i.iadd(i.imul(part, i.u32(config.units)), i.u32(place))
            exists = i.both(i.less(tile, tiles), i.less(chunk, i.u32(chunks)))
            out.append((tile, chunk, exists))
        return out

    def load(i: Any, refs: Any, _: Any, scalars: Any) -> list[Any]:
        planes, tables = refs[:tables_from], refs[tables_from:]
        out = []
        for tile, chunk, exists in places(i, *scalars):
            index = product.unit_at(i, tables, tile, chunk)
            out += _flat(piece(i, planes, index, exists) for _, piece in unit.pieces)
        return [out]

    def take_turn(i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Any]:
        """Adds the products of the units in `registers`, each replaced by one of the next turn as it is used up."""
        x_gmem, planes, tables = refs[0], refs[1 : 1 + tables_from], refs[1 + tables_from :]
        sums, registers, *constants = arrays
        tiles, warpgroup, group, turn, next_group, next_turn = scalars
        by_tile = [sums[4 * tile : 4 * tile + 4] for tile in range(column_tiles)]
        following: list[Any] = []
        for place, ((tile, chunk, _), (next_tile, next_chunk, exists)) in enumerate(
            zip(
                places(i, tiles, warpgroup, group, turn),
                places(i, tiles, warpgroup, next_group, next_turn),
                strict=True,
            )
        ):
            first = place * unit.registers
            pieces = unit.split(registers[first : first + unit.registers])
            x = _x(i, x_gmem, tables, tile, chunk)
            index = product.unit_at(i, tables, next_tile, next_chunk)
            loaded: list[Any] = [None] * len(pieces)

            def done(
                piece: int, loaded: Any = loaded, index: Any = index, exists: Any = exists
            ) -> None:
                loaded[piece] = unit.pieces[piece][1](i, planes, index, exists)

            if product.factor_at is None:
                by_tile = unit.multiply(i, pieces, done, constants, x, by_tile, columns)
            else:
                factor = product.factor_at(i, tables, tile, chunk)
                zeros = [[i.number(0.0)] * 4 for _ in by_tile]
                plain = unit.multiply(i, pieces, done, constants, x, zeros, columns)
                for n, p in itertools.product(range(column_tiles), range(4)):
                    if p % 2 in columns:
                        by_tile[n][p] = i.fma(factor, plain[n][p], by_tile[n][p])
            following += _flat(loaded)
        return [_flat(by_tile), following]

    def _x(i: Any, x_gmem: Any, tables: Any, tile: Any, chunk: Any) -> Any:
        """`fragments.LoadX` of a unit. Columns of the product beyond the rows of x repeat the last."""
        g, t = i.shift_right(i.lane(), 2), i.and_(i.lane(), 3)
        rows = [i.imin(i.iadd(g, i.u32(8 * n)), i.u32(m - 1)) for n in range(column_tiles)]
        starts = [product.x_at(i, tables, tile, chunk, row) for row in rows]

        def x(n: int, first: int, words: int) -> Any:
            word = i.iadd(starts[n], i.imul(t, i.u32(words)))
            return i.load(x_gmem, word, words, offset=first // 2)

        return x

    def thread_in(i: Any, group: Any) -> Any:
        """This thread of its warpgroup, plus a 0 that hangs on the group.

        What is made of it the compilers cannot make ahead of all groups, to be kept in registers that the turns need.
        """
        thread = i.iadd(i.shift_left(i.warp(), 5), i.lane())
        return i.iadd(thread, i.shift_right(group, 31))

    def exchange(i: Any, refs: Any, arrays: Any, scalars: Any) -> list[Any]:
        """Writes this warp's sums to its piece ``[m, 16]`` of shared memory."""
        thread = thread_in(i, *scalars)
        warp, lane = i.shift_right(thread, 5), i.and_(thread, 31)
        g, t = i.shift_right(lane, 2), i.and_(lane, 3)
        for tile in range(column_tiles):
            for half in range(2):
                for column in columns:
                    row = i.iadd(i.iadd(i.shift_left(t, 1), i.u32(column)), i.u32(8 * tile))
                    word = i.iadd(i.imul(i.iadd(i.imul(warp, i.u32(m)), row), i.u32(ROWS)), g)
                    value = arrays[0][4 * tile + 2 * half + column]
                    inside = i.less(row, i.u32(m))
                    i.store(refs[0], i.iadd(word, i.u32(8 * half)), [value], where=inside)
        return []

    def finish(i: Any, refs: Any, _: Any, scalars: Any) -> list[Any]:
        """Adds up the warps' sums, what one call of `product.write` wants a lane at a time."""
        sums_smem, y_gmem, *tables = refs
        group, tiles_in_use = scalars
        span, vector = product.span, product.vector
        rows, tiles = ROWS // vector, config.tiles // span
        outputs = m * tiles * rows
        thread = thread_in(i, group)
        for first in range(0, outputs, 128):
            output = i.iadd(thread, i.u32(first))
            row = i.imul(i.irem(output, i.u32(rows)), i.u32(vector))
            tile = i.imul(i.irem(i.idiv(output, i.u32(rows)), i.u32(tiles)), i.u32(span))
            x_row = i.idiv(output, i.u32(rows * tiles))
            inside = i.less(output, i.u32(outputs))

            totals = [[i.number(0.0)] * vector for _ in range(span)]
            for s, part in itertools.product(range(span), range(parts)):
                warp = i.iadd(tile, i.u32(part * config.tiles + s))
                word = i.iadd(i.imul(i.iadd(i.imul(warp, i.u32(m)), x_row), i.u32(ROWS)), row)
                sums = i.load(sums_smem, word, vector, where=inside)
                totals[s] = [
                    i.fadd(total, i.float_of_bits(bits))
                    for total, bits in zip(totals[s], sums, strict=True)
                ]
            tile = i.iadd(i.imul(group, i.u32(config.tiles)), tile)
            inside = i.both(inside, i.less(tile, tiles_in_use))
            product.write(i, tables, y_gmem, tile, row, x_row, inside, totals)
        return []

    def body(x_gmem: Any, *refs: Any) -> None:
        *sources, y_gmem, sums_smem, exchanged = refs  # planes, then tables
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        tables = sources[tables_from:]
        tiles = product.tiles_in_use(tables) if product.tiles_in_use else jnp.int32(product.tiles)
        constants = [lanes.constant_array(make) for make in unit.constants]
        held = (config.units * unit.registers, jnp.uint32)

        def one_group(index: Any, registers: Any) -> Any:
            group = cta + index * ctas

            def one_turn(turn: Any, carry: Any) -> Any:
                is_last = turn == rounds - 1
                after = (jnp.where(is_last, group + ctas, group), jnp.where(is_last, 0, turn + 1))
                return lanes.run(
                    take_turn,
                    [(4 * column_tiles, jnp.float32), held],
                    refs=[x_gmem, *sources],
                    arrays=[*carry, *constants],
                    scalars=[tiles, warpgroup, group, turn, *after],
                )

            carry = [lanes.zeros(4 * column_tiles), registers]
            sums, following = lax.fori_loop(0, rounds, one_turn, carry)

            # Two buffers: whoever writes this one again has passed the next group's barrier, and so have its readers.
            buffer = sums_smem.at[lax.rem(index, jnp.int32(2))]
            piece = buffer.at[warpgroup]
            lanes.run(exchange, refs=[piece], arrays=[sums], scalars=[group], stores=[0])
            plgpu.barrier_arrive(exchanged)
            plgpu.barrier_wait(exchanged)
            is_writer = warpgroup == lax.rem(index, jnp.int32(config.warpgroups))

            @pl.when(is_writer)
            def _() -> None:
                refs = [buffer, y_gmem, *tables]
                lanes.run(finish, refs=refs, scalars=[group, tiles], stores=[1])

            return following

        groups = lax.div(tiles + (config.tiles - 1), jnp.int32(config.tiles))
        mine = lax.div(groups - cta + ctas - 1, jnp.int32(ctas))
        start = [tiles, warpgroup, cta, jnp.int32(0)]
        [registers] = lanes.run(load, [held], refs=sources, scalars=start)
        lax.fori_loop(0, mine, one_group, registers)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(product.shape, product.dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((2, config.warpgroups, 4, m, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=lanes.interpret_params(),
        kernel_name=product.name,
    )
