"""The KV cache: keys and values of each layer that has its own, written in place under donation.

Layout. Layer i holds ``keys`` and ``values``, each ``[B, S, K, C]``. Global layers have ``S = capacity`` and slot s
holds position s. Sliding layers have ``S = min(window, capacity)`` and are rings: position p lives in slot ``p % S``.
KV-shared layers hold nothing; they read the layer `Gemma4Config.kv_source` names. Keys are stored after their norm and
RoPE, values after theirs, both in the type of the activations.

Reasons:

- An array a layer, not one for all: XLA copies slices of a stack of layers; a layer's own array it updates in place.
- Keys and values in two arrays: XLA would copy the slice of one before multiplying with it.
- Slots before heads: a new token is one piece of ``K C`` elements of each array. A head of a slot is 256 to 1024
  contiguous bytes, whole sectors of memory, so that a kernel which reads one head of many slots wastes nothing.
- Keys after RoPE: each is rotated once and read many times. Order within a ring does not matter to a soft-max.
- Positions of slots are not stored: they follow from a row's length (`slot_positions`).

A paged cache (`gemma_jax.paged_cache`) has global layers of ``[P, page, K, C]`` instead, pages that its rows share:
slot s of row b is ``[pages[b, s // page], s % page]``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from gemma_jax.config import Gemma4Config


class KeysAndValues(NamedTuple):
    """Keys and values of some positions in one layer, each ``[B, S, K, C]``."""

    keys: jax.Array
    values: jax.Array


class Context(NamedTuple):
    """What the queries of one layer can attend to: ``kv``, and the ``positions [B, S]`` its slots hold.

    A slot whose position is negative holds nothing. With ``pages [B, n]``, ``kv`` is a pool of pages.
    """

    kv: KeysAndValues
    positions: jax.Array
    pages: jax.Array | None = None


@struct.dataclass
class KVCache:
    """State of every layer's K/V for a batch of rows.

    Attributes:
      layers: the `KeysAndValues` of each layer that is not KV-shared, in layer order.
      lengths: int32 ``[B]``, how many positions of each row have been written; the next token's position.
      capacity: static, how many positions a row can hold.
      pages: int32 ``[B, capacity / page]``, which pages of the global layers hold a row, in order; None if they are
        contiguous.
    """

    layers: tuple[KeysAndValues, ...]
    lengths: jax.Array
    capacity: int = struct.field(pytree_node=False)
    pages: jax.Array | None = None


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
    shapes = [(batch, *kv_shape(config, i, capacity)) for i in range(config.first_kv_shared_layer)]
    layers = tuple(KeysAndValues(jnp.zeros(s, dtype), jnp.zeros(s, dtype)) for s in shapes)
    return KVCache(layers, jnp.zeros((batch,), jnp.int32), capacity)


def kv_shape(config: Gemma4Config, layer: int, capacity: int) -> tuple[int, int, int]:
    """``(S, K, C)`` of the keys, and of the values, that `layer` keeps per row."""
    slots = capacity if config.is_global(layer) else min(config.sliding_window, capacity)
    return slots, config.kv_heads_of(layer), config.head_dim_of(layer)


def cache_bytes(config: Gemma4Config, batch: int, capacity: int, itemsize: int = 2) -> int:
    """Bytes that `init_cache` would allocate for elements of `itemsize` bytes."""
    sizes = (kv_shape(config, i, capacity) for i in range(config.first_kv_shared_layer))
    return 2 * batch * itemsize * sum(s * heads * c for s, heads, c in sizes)


def slot_positions(slots: int, lengths: jax.Array) -> jax.Array:
    """The position each slot of a layer holds after `lengths` tokens: int32 ``[B, slots]``, negative where none.

    Slot s holds the largest position below the length that is s modulo `slots`; for a global layer, where nothing
    wraps, that is s itself.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def extend(
    kv: KeysAndValues,
    new: KeysAndValues,
    positions: jax.Array,
    lengths: jax.Array,
    *,
    is_ring: bool,
    pages: jax.Array | None = None,
) -> tuple[KeysAndValues, Context]:
    """Writes a chunk of tokens into one layer and says what the chunk's queries can attend to.

    Args:
      kv: the layer before the chunk, ``[B, S, K, C]`` each. Positions past a global layer's capacity are dropped, or,
        if one token of one row is written, take the place of position 0.
      new: keys and values of the chunk, ``[B, T, K, C]`` each.
      positions: int32 ``[B, T]``, each row's positions in order from ``lengths[b]``, then -1 for padding.
      lengths: int32 ``[B]``, positions held before the chunk.
      is_ring: whether the layer is a sliding one. A ring forgets what a chunk of several tokens overwrites while the
        chunk's first queries still need it, so they are given the old ring and the chunk side by side.
      pages: the rows' pages, if the layer is a global one of a paged cache.

    Returns:
      The layer after the chunk, and the context of the chunk's queries.
    """
    if pages is not None:
        stored = (_write_pages(o, n, positions, pages) for o, n in zip(kv, new, strict=True))
        updated = KeysAndValues(*stored)
        return updated, extended_context(updated, positions, lengths, pages)
    batch, slots = kv.keys.shape[:2]
    written = positions >= 0
    end = _end(positions, lengths)
    kept = written & (positions >= end[:, None] - slots)
    slot = jnp.where(kept, positions % slots, slots)  # `slots` is out of range: dropped
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        if positions.shape == (1, 1):
            # The slot of the row's next position, whether it is written or not: nothing reads it before it is. To drop
            # a write XLA reads what is there first and writes it back, which takes a kernel of its own.
            return lax.dynamic_update_slice(
                old, new.astype(old.dtype), (0, lengths[0] % slots, 0, 0)
            )
        return old.at[rows, slot].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    def beside(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old, new.astype(old.dtype)], axis=1)

    updated = KeysAndValues(write(kv.keys, new.keys), write(kv.values, new.values))
    if is_ring and positions.shape[1] > 1:
        before = slot_positions(slots, lengths)
        both = KeysAndValues(beside(kv.keys, new.keys), beside(kv.values, new.values))
        return updated, Context(both, jnp.concatenate([before, positions], axis=1))
    return updated, extended_context(updated, positions, lengths)


def extended_context(
    kv: KeysAndValues, positions: jax.Array, lengths: jax.Array, pages: jax.Array | None = None
) -> Context:
    """The context of a chunk's queries where the cache alone, the chunk in it, holds all that they attend to.

    Args:
      kv: the layer after the chunk.
      positions, lengths, pages: as `extend` takes them.
    """
    return stored_context(kv, _end(positions, lengths), pages)


def stored_context(
    kv: KeysAndValues, lengths: jax.Array, pages: jax.Array | None = None
) -> Context:
    """The context of each row's last token, read from the cache alone; `pages` as for `extend`."""
    slots = kv.keys.shape[1] * (1 if pages is None else pages.shape[1])
    return Context(kv, slot_positions(slots, lengths), pages)


def _write_pages(
    pool: jax.Array, new: jax.Array, positions: jax.Array, pages: jax.Array
) -> jax.Array:
    """`pool` ``[P, page, K, C]`` with `new` ``[B, T, K, C]`` at the slots of `positions`; padding is dropped."""
    size = pool.shape[1]
    page = jnp.take_along_axis(pages, jnp.maximum(positions, 0) // size, axis=1)
    slot = jnp.where(positions >= 0, page * size + positions % size, pool.shape[0] * size)
    flat = pool.reshape(-1, *pool.shape[2:])
    flat = flat.at[slot].set(new.astype(pool.dtype), mode="drop", unique_indices=True)
    return flat.reshape(pool.shape)


def _end(positions: jax.Array, lengths: jax.Array) -> jax.Array:
    """Lengths after a chunk."""
    return lengths + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
