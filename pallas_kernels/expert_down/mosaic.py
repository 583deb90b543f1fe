"""``expert_down`` by a hand-written Mosaic GPU kernel: packed or bfloat16 weights, bfloat16 h.

Up to 64 rows of h one kernel does it all, that of `pallas_kernels.decode_matmul`: to it K is what a token's experts
have one after the other.

    chunks of a row tile:   | expert_ids[t, 0], h[t, 0] | expert_ids[t, 1], h[t, 1] | …, J experts
    a unit's product, float32 ──▶ * weights[t, j] ──▶ + the warp's sums ──▶ added over warps in order ──▶ y[t]

A weight multiplies what its expert adds to a float32 sum: nothing is rounded but float32 products. Bytes moved: the
weights of each token's experts, in place, once; h from L2. With more rows the experts of many tokens are shared: the
products are those of ``expert_matmul``, 4 bytes written and read of each, and XLA adds them up. No card has run it: it
serves who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import decode_matmul, expert_blocks
from pallas_kernels.decode_matmul import Product, multiply
from pallas_kernels.expert_blocks import MAX_SINGLE
from pallas_kernels.expert_matmul import mosaic as expert_matmul
from pallas_kernels.expert_matmul.mosaic import Config
from pallas_kernels.fragments import Units, units
from pallas_kernels.packed import ROWS, Weight


def why_not(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> str | None:
    """Wants bfloat16 h, and packed or bfloat16 weights of experts."""
    del weights
    return expert_blocks.why_not(h, w, expert_ids)


def default_config(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> Config:
    """As many units as registers allow, and the number of tiles with the fewest turns; or that of ``expert_matmul``."""
    del weights
    if expert_ids.size > MAX_SINGLE:
        return expert_matmul.default_config(h, w, expert_ids)
    _, n, width = w.shape
    tokens, per_token = expert_ids.shape
    return expert_blocks.fewest_turns(
        w, rows=1, tiles=tokens * n // ROWS, chunks=per_token * width // units(w).chunk
    )


def mmas_per_fragment(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> float:
    """Tensor-core instructions of the chosen kernel for each 16 x 16 weights."""
    del weights
    return expert_matmul.mmas_per_fragment(h, w, expert_ids)


def intermediate_bytes(h: jax.Array, w: Weight, expert_ids: jax.Array, weights: jax.Array) -> int:
    """Of the experts' products, written and read where they are not added up in the kernel, and what those take."""
    del weights
    if expert_ids.size <= MAX_SINGLE:
        return 0
    of_h = expert_matmul.intermediate_bytes(h, w, expert_ids)
    return of_h + 2 * 4 * expert_ids.size * w.shape[1]


def expert_down(
    h: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    weights: jax.Array,
    config: Config | None = None,
) -> jax.Array:
    """float32 ``[T, N]``: ``sum_j weights[t, j] * w[expert_ids[t, j]] @ h[t, j]``, ids in 0..E-1."""
    config = config or default_config(h, w, expert_ids, weights)
    rows, ids = h.reshape(-1, h.shape[-1]), expert_ids.reshape(-1)
    if len(ids) > MAX_SINGLE:
        y = expert_matmul.expert_matmul(rows, w, ids, config)
        return jnp.sum(y.reshape(*weights.shape, w.shape[1]) * weights[..., None], axis=1)
    assert isinstance(config, decode_matmul.Config)
    product = _product(w, units(w), expert_ids, weights)
    return multiply(rows, units(w), product, config)


def _product(w: Weight, unit: Units, expert_ids: jax.Array, weights: jax.Array) -> Product:
    _, n, width = w.shape
    tokens, per_token = expert_ids.shape
    row_tiles, chunks = n // ROWS, width // unit.chunk  # of one expert

    def row_of(i: Any, tile: Any, chunk: Any) -> Any:
        """The row of h: (token, which of its experts), the last of each for what is beyond."""
        token = i.imin(i.idiv(tile, i.u32(row_tiles)), i.u32(tokens - 1))
        choice = i.imin(i.idiv(chunk, i.u32(chunks)), i.u32(per_token - 1))
        return i.iadd(i.imul(token, i.u32(per_token)), choice)

    def unit_at(i: Any, tables: Any, tile: Any, chunk: Any) -> Any:
        [expert] = i.load(tables[0], row_of(i, tile, chunk), 1)
        tile = i.iadd(i.imul(expert, i.u32(row_tiles)), i.irem(tile, i.u32(row_tiles)))
        return i.iadd(i.imul(tile, i.u32(chunks)), i.irem(chunk, i.u32(chunks)))

    def x_at(i: Any, _: Any, tile: Any, chunk: Any, _row: Any) -> Any:
        row = i.imul(row_of(i, tile, chunk), i.u32(width // 2))
        return i.iadd(row, i.imul(i.irem(chunk, i.u32(chunks)), i.u32(unit.chunk // 2)))

    def factor_at(i: Any, tables: Any, tile: Any, chunk: Any) -> Any:
        [bits] = i.load(tables[1], row_of(i, tile, chunk), 1)
        return i.float_of_bits(bits)

    def write(
        i: Any, _: Any, y: Any, tile: Any, row: Any, _row: Any, inside: Any, totals: Any
    ) -> None:
        # A token's row tiles follow those of the token before, as its row of y does.
        i.store(y, i.iadd(i.imul(tile, i.u32(ROWS)), row), totals[0], where=inside)

    return Product(
        name="expert_down",
        rows=1,
        tiles=tokens * row_tiles,
        chunks=per_token * chunks,
        unit_at=unit_at,
        x_at=x_at,
        write=write,
        shape=(tokens, n),
        tables=(expert_ids.reshape(-1), weights.reshape(-1)),
        factor_at=factor_at,
    )
