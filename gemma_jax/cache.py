"""The KV cache: one array per layer that has K/V of its own, written in place under donation.

Layout. Layer i holds ``kv [B, S, 2K, C]``: K key heads, then K value heads, so that one token's keys and values are
contiguous. Global layers have ``S = capacity`` and slot s holds position s. Sliding layers have ``S = min(window,
capacity)`` and are rings: position p lives in slot ``p % S``. KV-shared layers hold nothing; they read the layer
`Gemma4Config.kv_source` names. Keys are stored after their norm and RoPE, values after theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gemma_jax.config import Gemma4Config


class Context(NamedTuple):
    """What the queries of one layer can attend to: ``kv [B, S, 2K, C]`` and the ``positions [B, S]`` its slots hold.

    A slot whose position is negative holds nothing.
    """

    kv: jax.Array
    positions: jax.Array


@struct.dataclass
class KVCache:
    """State of every layer's K/V for a batch of rows.

    Attributes:
      layers: one ``[B, S, 2K, C]`` array per layer that is not KV-shared, in layer order.
      lengths: int32 ``[B]``, how many positions of each row have been written; the next token's position.
      capacity: static, how many positions a row can hold.
    """

    layers: tuple[jax.Array, ...]
    lengths: jax.Array
    capacity: int = struct.field(pytree_node=False)


def init_cache(
    config: Gemma4Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` positions each.

    Raises:
      ValueError: `capacity` is not in ``1 .. config.max_position_embeddings``.
    """
    if not 1 <= capacity <= config.max_position_embeddings:
        raise ValueError(
            f"capacity is {capacity}; this model takes 1 to {config.max_position_embeddings} positions"
        )
    layers = tuple(
        jnp.zeros((batch, *kv_shape(config, i, capacity)), dtype)
        for i in range(config.first_kv_shared_layer)
    )
    return KVCache(layers, jnp.zeros((batch,), jnp.int32), capacity)


def kv_shape(config: Gemma4Config, layer: int, capacity: int) -> tuple[int, int, int]:
    """``(S, 2K, C)`` of the array that `layer` keeps per row."""
    slots = capacity if config.is_global(layer) else min(config.sliding_window, capacity)
    return slots, 2 * config.kv_heads_of(layer), config.head_dim_of(layer)


def cache_bytes(config: Gemma4Config, batch: int, capacity: int, itemsize: int = 2) -> int:
    """Bytes that `init_cache` would allocate for elements of `itemsize` bytes."""
    sizes = (kv_shape(config, i, capacity) for i in range(config.first_kv_shared_layer))
    return batch * itemsize * sum(s * heads * c for s, heads, c in sizes)


def slot_positions(slots: int, lengths: jax.Array) -> jax.Array:
    """The position each slot of a layer holds after `lengths` tokens: int32 ``[B, slots]``, negative where none.

    Slot s holds the largest position below the length that is s modulo `slots`; for a global layer, where nothing
    wraps, that is s itself.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def extend(
    kv: jax.Array, new: jax.Array, positions: jax.Array, lengths: jax.Array, *, is_ring: bool
) -> tuple[jax.Array, Context]:
    """Writes a chunk of tokens into one layer and says what the chunk's queries can attend to.

    Args:
      kv: ``[B, S, 2K, C]``, the layer before the chunk.
      new: ``[B, T, 2K, C]``, keys and values of the chunk.
      positions: int32 ``[B, T]``, each row's positions in order from ``lengths[b]``, then -1 for padding.
      lengths: int32 ``[B]``, positions held before the chunk.
      is_ring: whether the layer is a sliding one. A ring forgets what a chunk of several tokens overwrites while the
        chunk's first queries still need it, so they are given the old ring and the chunk side by side.

    Returns:
      The layer after the chunk, and the context of the chunk's queries.
    """
    batch, slots = kv.shape[:2]
    written = positions >= 0
    end = lengths + jnp.sum(written, axis=1, dtype=jnp.int32)
    kept = written & (positions >= end[:, None] - slots)
    slot = jnp.where(kept, positions % slots, slots)  # `slots` is out of range: dropped
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    new = new.astype(kv.dtype)
    updated = kv.at[rows, slot].set(new, mode="drop", unique_indices=True)
    if is_ring and new.shape[1] > 1:
        before = slot_positions(slots, lengths)
        return updated, Context(
            jnp.concatenate([kv, new], axis=1), jnp.concatenate([before, positions], axis=1)
        )
    return updated, Context(updated, slot_positions(slots, end))


def stored_context(kv: jax.Array, lengths: jax.Array) -> Context:
    """The context of each row's last token, read from the cache alone."""
    return Context(kv, slot_positions(kv.shape[1], lengths))
