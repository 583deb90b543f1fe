"""``expert_gate_up`` by a hand-written Mosaic GPU kernel: packed or bfloat16 weights, bfloat16 x.

The kernel is that of `pallas_kernels.decode_matmul` over the blocks of `pallas_kernels.expert_blocks`. A CTA's row
tiles come in pairs, 16 rows of gate and the same 16 of up, wherever these are in w, so that who adds up the sums has
both:

    sums of gate tile ──▶ * scale ──▶ gelu ─┐
    sums of up tile ────▶ * scale ──────────┴▶ * ──▶ bfloat16 h, four rows a lane

Bytes moved: as `pallas_kernels.expert_matmul.mosaic`, but 2 bytes of h for every 8 of gate and up. Where that op has
`pallas_kernels.expert_prefill`, its products are written and read once, and the rest is XLA's. No card has run it: it
serves who asks for ``implementation="mosaic"``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import expert_blocks, expert_prefill, prefill_matmul
from pallas_kernels.decode_matmul import gelu
from pallas_kernels.expert_blocks import blocks_of, multiply_blocks
from pallas_kernels.expert_matmul import mosaic as expert_matmul
from pallas_kernels.expert_matmul.mosaic import Config
from pallas_kernels.packed import ROWS, Weight


def why_not(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> str | None:
    """Wants bfloat16 x, packed or bfloat16 weights, and F a multiple of 16."""
    del scale
    if w.shape[1] % (2 * ROWS):
        return f"w has shape {w.shape}: expected [E, 2 F, K] with F a multiple of {ROWS}"
    return expert_blocks.why_not(x, w, expert_ids)


def default_config(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> Config:
    """That of the kernel which is to serve the call; its type says which."""
    del x, scale
    if expert_prefill.why_not(w, expert_ids.size) is None:
        return expert_prefill.default_config(w, expert_ids.size)
    return expert_blocks.default_config(w, expert_ids.size, span=2)


def mmas_per_fragment(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> float:
    """Tensor-core instructions of the chosen kernel for each 16 x 16 weights."""
    del scale
    return expert_matmul.mmas_per_fragment(x, w, expert_ids)


def intermediate_bytes(x: jax.Array, w: Weight, expert_ids: jax.Array, scale: jax.Array) -> int:
    """Of x and of the products, where `expert_prefill` serves."""
    del scale
    of_x = expert_matmul.intermediate_bytes(x, w, expert_ids)
    return of_x + 2 * 4 * expert_ids.size * w.shape[1] if of_x else 0


def expert_gate_up(
    x: jax.Array,
    w: Weight,
    expert_ids: jax.Array,
    scale: jax.Array,
    config: Config | None = None,
) -> jax.Array:
    """``[T, J, F]``: ``gelu(scale[t] * gate) * scale[t] * up``, ids in 0..E-1."""
    per_token = expert_ids.shape[1]
    width = w.shape[1] // 2
    config = config or default_config(x, w, expert_ids, scale)
    if isinstance(config, prefill_matmul.Config):
        y = expert_prefill.expert_matmul(x, w, expert_ids.reshape(-1), config, per_token)
        gate, up = jnp.split(y.reshape(*expert_ids.shape, -1) * scale[:, None, None], 2, axis=-1)
        return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)

    def store(
        i: Any, tables: Any, h: Any, pair: Any, row: Any, inside: Any, totals: list[list[Any]]
    ) -> None:
        [bits] = i.load(tables[0], i.idiv(pair, i.u32(per_token)), 1)
        factor = i.float_of_bits(bits)
        gate, up = ([i.fmul(factor, total) for total in matrix] for matrix in totals)
        out = [i.fmul(gelu(i, g), u) for g, u in zip(gate, up, strict=True)]
        words = [i.bf16x2_of_floats(*out[n : n + 2]) for n in range(0, len(out), 2)]
        word = i.shift_right(i.iadd(i.imul(pair, i.u32(width)), row), 1)
        i.store(h, word, words, where=inside)

    return multiply_blocks(
        x,
        w,
        blocks_of(expert_ids.reshape(-1), w.shape[0]),
        store,
        jax.ShapeDtypeStruct((*expert_ids.shape, width), x.dtype),
        config,
        name="expert_gate_up",
        pairs_per_row=per_token,
        span=2,
        vector=4,
        tables=(scale,),
    )
