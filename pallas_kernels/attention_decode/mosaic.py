"""``attention_decode`` in one kernel: bound by reading the keys and values that are seen once.

    q, k, v of the product ──▶ norms, RoPE ──▶ q in shared memory; k, v of new positions into the cache
    a block of 64 slots of a KV head's cache:
    k ──16-byte loads, 16 slots a warp──▶ B fragments ──▶ mma.sync with q ─▶ mask ─▶ scores in shared memory ─┐
    v ──16-byte loads, a quarter of the columns a warp──▶ A fragments ──▶ mma.sync ◀─ soft-max of all warps ──┘
    sums of a run of blocks ──▶ the result, or L2 ──the last CTA of up to 8 to come, level by level──▶ the result

A CTA has a run of blocks of a pair (`schedule`): as many as its row's length asks for, and no CTA visits a block that
is not in use. It writes the new keys and values that lie in its run before it reads them, so that no other CTA waits
for it. All query rows that read a KV head, up to 16, are rows of one tensor-core product; more of them are tiles that
read the keys and values again, from L2. Partial results are added up in a fixed order, by whoever comes last: results
do not depend on timing. The counts of arrivals are a part of the schedule's table; each is zero again when the kernel
ends, so that layers share the table.

Shared memory: 16 (C + 32) x 2 bytes of q and 9 KB of scores. Registers: C / 4 for keys or values on their way, C / 16
(C / 8 for more than 8 rows) for sums; two CTAs an SM. Bytes moved: keys and values in use, once; rows x C x 4 bytes for
each run of a pair that has several, written and read in L2. Bound: memory. No card has run it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes
from pallas_kernels.attention_decode import heads_of
from pallas_kernels.attention_decode.blocks import NO_SCORE, SCORE_WORDS, TakeBlock
from pallas_kernels.attention_decode.combine import ROWS_AT_A_TIME, Arrive, Combine, Write
from pallas_kernels.attention_decode.prepare import Prepare
from pallas_kernels.attention_decode.schedule import ARRIVALS, BLOCK, FAN, Grid, schedule
from pallas_kernels.attention_decode.shape import Shape

MAX_QUERIES = 8
_HEAD_DIMS = (128, 256, 512)
_FOR_HEADS = ("qkv", "q_norm", "k_norm", "cos", "sin", "positions", "pages")
_INPUTS = (*_FOR_HEADS, "table", "keys", "values")
_PREPARED = (*_FOR_HEADS, "keys", "values", "q_smem")


@dataclasses.dataclass(frozen=True)
class Config:
    """`ctas`: of the grid, as many as fill the GPU: two for each SM of an H100 or H200."""

    ctas: int = 264


def why_not(
    qkv: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    heads: int,
    pages: jax.Array | None = None,
) -> str | None:
    """Wants float32 products, a bfloat16 cache, C of 128, 256 or 512, and at most 8 queries a row."""
    keys, _ = cache
    if keys.dtype != jnp.bfloat16:
        return f"the cache has dtype {keys.dtype}: tensor cores take bfloat16"
    for name, array in (("qkv", qkv), ("cosines", rope[0]), ("sines", rope[1])):
        if array.dtype != jnp.float32:
            return f"{name} has dtype {array.dtype}: expected float32"
    if keys.shape[3] not in _HEAD_DIMS:
        return f"the head size is {keys.shape[3]}: expected 128, 256 or 512"
    if not 1 <= qkv.shape[1] <= MAX_QUERIES:
        return f"a row has {qkv.shape[1]} queries: expected 1 to {MAX_QUERIES}"
    if pages is not None and keys.shape[1] % BLOCK:
        return f"a page has {keys.shape[1]} slots: expected a multiple of {BLOCK}"
    return None


def mmas_per_fragment(
    qkv: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    norms: tuple[jax.Array, jax.Array | None],
    rope: tuple[jax.Array, jax.Array],
    positions: jax.Array,
) -> float:
    """Tensor-core instructions for each 16 x 16 elements of the cache, in a call that brings queries alone.

    Two for keys, which are the operand of 8 columns; for values one or, of more than 8 rows, two.
    """
    _, _, kv_heads, head_dim = cache[0].shape
    rows = qkv.shape[1] * qkv.shape[2] // (head_dim * kv_heads)
    return 1.5 if rows <= 8 else 2.0


def default_config(
    qkv: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    heads: int,
    pages: jax.Array | None = None,
) -> Config:
    """The same for every call."""
    return Config()


def attention_decode(
    qkv: jax.Array,
    norms: tuple[jax.Array, jax.Array | None],
    rope: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    *,
    heads: int,
    window: int | None,
    pages: jax.Array | None = None,
    eps: float,
    config: Config | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """See `pallas_kernels.attention_decode.attention_decode`."""
    config = config or default_config(qkv, rope, cache, positions, heads)
    kv_heads, head_dim = cache[0].shape[2:]
    batch, page = len(positions), cache[0].shape[1]
    slots = page if pages is None else page * pages.shape[1]
    _, key_heads, value_heads = heads_of(qkv, cache, heads)
    q_norm = norms[0]
    k_norm = norms[1] if norms[1] is not None else q_norm
    if q_norm.dtype != k_norm.dtype or q_norm.dtype not in (jnp.bfloat16, jnp.float32):
        q_norm, k_norm = q_norm.astype(jnp.float32), k_norm.astype(jnp.float32)
    shape = Shape(
        batch=batch,
        queries=qkv.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        key_heads=key_heads,
        value_heads=value_heads,
        head_dim=head_dim,
        slots=slots,
        window=window,
        eps=eps,
        bf16_norms=q_norm.dtype == jnp.bfloat16,
        page=None if pages is None else page,
    )
    grid = Grid(batch, kv_heads * shape.tiles, shape.tiles, slots, config.ctas)
    positions = positions.astype(jnp.int32)
    where = positions if pages is None else pages.astype(jnp.int32)
    arrays = (qkv, q_norm, k_norm, *rope, positions, where, schedule(positions, grid))
    if not key_heads:
        return _Kernel(shape, grid).call(*arrays, *cache), cache
    # Refs are updated in place, where XLA may; values are given to the kernel as they are read.
    keys, values = (jax.new_ref(x) for x in cache)
    out = _Kernel(shape, grid).call(*arrays, keys, values)
    return out, (jax.freeze(keys), jax.freeze(values))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    shape: Shape
    grid: Grid

    def call(self, *arrays: Any) -> jax.Array:
        """``[B, T, H C]`` from what `_INPUTS` names."""
        shape, grid = self.shape, self.grid
        parts = (grid.ctas, shape.tile_rows)
        out, _, _ = plgpu.kernel(
            self._body,
            out_type=(
                jax.ShapeDtypeStruct(
                    (shape.batch, shape.queries, shape.heads * shape.head_dim), jnp.bfloat16
                ),
                jax.ShapeDtypeStruct((*parts, shape.head_dim), jnp.float32),
                jax.ShapeDtypeStruct((grid.levels, *parts, 2), jnp.float32),
            ),
            grid=(grid.ctas,),
            grid_names=("cta",),
            num_threads=1,
            thread_name="warpgroup",
            scratch_types=(
                plgpu.SMEM((shape.tile_rows, shape.q_words), jnp.uint32),
                plgpu.SMEM((2, 8 * shape.halves, SCORE_WORDS), jnp.float32),
                plgpu.SMEM((1,), jnp.int32),
            ),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=lanes.interpret_params(),
            kernel_name="attention_decode",
        )(*arrays)
        return out

    def _body(self, *refs: Any) -> None:
        *inputs, out, partial, states, q_smem, scores_smem, flag_smem = refs
        named = dict(zip(_INPUTS, inputs, strict=True)) | {"q_smem": q_smem}
        table = named["table"]
        cta = lax.axis_index("cta")

        @pl.when(table[cta, 0] >= 0)
        def _() -> None:
            batch, head, tile, first, end, index, runs, last = (
                table[cta, n] for n in range(ARRIVALS)
            )
            has_own = self.shape.key_heads > 0
            lanes.run(
                Prepare(self.shape, _PREPARED),
                refs=[named[name] for name in _PREPARED],
                scalars=[batch, head, tile, first, end],
                stores=[7, 8, 9] if has_own else [9],
            )

            def one_block(block: Any, carry: Any) -> Any:
                used = [named[name] for name in ("keys", "values", "positions", "pages")]
                return lanes.run(
                    TakeBlock(self.shape),
                    [(self.shape.sums, jnp.float32), (2 * self.shape.halves, jnp.float32)],
                    refs=[*used, q_smem, scores_smem],
                    arrays=carry,
                    scalars=[block, batch, head, tile, last],
                    stores=[5],
                )

            carry = [lanes.zeros(self.shape.sums), _nothing_seen(self.shape.halves)]
            carry = lax.fori_loop(first, end, one_block, carry)
            results = [out, partial, states]
            where = [batch, head, tile]
            lanes.run(
                Write(self.shape),
                refs=results,
                arrays=carry,
                scalars=[cta, *where, runs],
                stores=[0, 1, 2],
            )
            meet = functools.partial(self._meet, table, flag_smem, results, where)
            if self.grid.levels and self.grid.most_runs > 1:
                pl.when(runs > 1)(lambda: meet(0, cta - index, index, runs))

    def _meet(
        self,
        table: Any,
        flag_smem: Any,
        results: list[Any],
        where: list[Any],
        level: int,
        pair: Any,
        index: Any,
        runs: Any,
    ) -> None:
        """Of groups of `FAN` results the last to come adds them up, and goes on to those of the next level."""
        stride = FAN**level
        begin = lax.div(index, jnp.int32(FAN * stride)) * (FAN * stride)
        members = jnp.minimum(lax.div(runs - begin + (stride - 1), jnp.int32(stride)), FAN)
        first = pair + begin
        lanes.run(
            Arrive(self.grid),
            refs=[table, flag_smem],
            scalars=[first, jnp.int32(level), members],
            stores=[0, 1],
        )

        @pl.when(flag_smem[0] == 1)
        def _() -> None:
            is_result = (runs <= FAN * stride).astype(jnp.int32)

            def some_rows(turn: Any, carry: None) -> None:
                lanes.run(
                    Combine(self.shape, self.grid),
                    refs=results,
                    scalars=[
                        turn,
                        first,
                        jnp.int32(stride),
                        members,
                        jnp.int32(level),
                        is_result,
                        *where,
                    ],
                    stores=[0, 1, 2],
                )

            lax.fori_loop(0, -(-self.shape.tile_rows // ROWS_AT_A_TIME), some_rows, None)
            if level + 1 < self.grid.levels:
                pl.when(is_result == 0)(
                    lambda: self._meet(
                        table, flag_smem, results, where, level + 1, pair, begin, runs
                    )
                )


def _nothing_seen(halves: int) -> jax.Array:
    """Highest score and sum of weights of each half's rows."""
    [start] = lanes.run(
        lambda i, *_: [[i.number(NO_SCORE), i.number(0.0)] * halves], [(2 * halves, jnp.float32)]
    )
    return start
