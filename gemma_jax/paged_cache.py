"""A KV cache for rows that come and go: pages for global layers, a ring per slot for sliding ones.

What a row keeps of a global layer grows with it, so it lies in pages that are given out as it grows and may be shared
by rows that begin alike (Kwon et al., arXiv:2309.06180). What it keeps of a sliding layer is a ring of fixed size,
which every slot owns. A ring forgets, so rows that begin alike can only share one that was set aside in time, a
snapshot.

Here is what lies on the device; which page belongs to whom the host knows (`gemma_jax.page_pool`).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gemma_jax.cache import KeysAndValues, KVCache, kv_shape
from gemma_jax.config import Gemma4Config

_SHARE_OF_FREE = 0.9  # of a GPU's free memory: the rest is for the temporaries of programs
_SHARE_OF_RAM = 0.25
_SHARE_OF_SNAPSHOTS = 0.25  # of the memory for KV, at most


class Plan(NamedTuple):
    """How the memory for KV is spent: `pages` of `page_size` positions, and `snapshots` of rings."""

    pages: int
    page_size: int
    snapshots: int


def available_bytes(device: jax.Device) -> int:
    """What a KV cache may take of the memory of `device`: 90 % of what is free, on a CPU a quarter of the RAM."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(_SHARE_OF_FREE * (stats["bytes_limit"] - stats["bytes_in_use"]))
    return int(_SHARE_OF_RAM * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def plan(
    config: Gemma4Config,
    slots: int,
    context: int,
    page_size: int,
    itemsize: int,
    kv_bytes: int,
    snapshots: int | None = None,
) -> Plan:
    """Spends `kv_bytes`: first on the slots' rings, up to a quarter on snapshots, the rest on pages.

    There are at most twice as many pages as all slots need at once: the second half is for prefixes of rows that ended.

    Raises:
      ValueError: `kv_bytes` does not hold the rings and the pages of one row of `context` positions.
    """
    ring, page = ring_bytes(config, context, itemsize), page_bytes(config, page_size, itemsize)
    of_a_row = -(-context // page_size)
    left = kv_bytes - slots * ring
    least = of_a_row * page
    if left < least:
        raise ValueError(
            f"kv_bytes is {kv_bytes}: {slots} slots of {context} positions need at least {slots * ring + least}"
        )
    if snapshots is None:
        affordable = min(int(_SHARE_OF_SNAPSHOTS * kv_bytes), left - least) // max(ring, 1)
        snapshots = min(affordable, 16 * slots)
    left -= snapshots * ring
    if left < least:
        raise ValueError(f"snapshots is {snapshots}: kv_bytes = {kv_bytes} leaves no room for them")
    return Plan(min(left // max(page, 1), 2 * slots * of_a_row), page_size, snapshots)


def page_bytes(config: Gemma4Config, page_size: int, itemsize: int) -> int:
    """Bytes of one page in all global layers."""
    return _bytes(config, page_size, itemsize, is_global=True)


def ring_bytes(config: Gemma4Config, context: int, itemsize: int) -> int:
    """Bytes of one slot's rings in all sliding layers."""
    return _bytes(config, context, itemsize, is_global=False)


def init_paged_cache(
    config: Gemma4Config,
    slots: int,
    context: int,
    plan: Plan,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> KVCache:
    """An empty cache whose rows hold up to `context` positions, a multiple of the page size."""
    layers = []
    for i in range(config.first_kv_shared_layer):
        held, heads, head_dim = kv_shape(config, i, context)
        outer = (plan.pages, plan.page_size) if config.is_global(i) else (slots, held)
        shape = (*outer, heads, head_dim)
        layers.append(KeysAndValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    lengths = jnp.zeros((slots,), jnp.int32)
    pages = jnp.zeros((slots, context // plan.page_size), jnp.int32)
    return KVCache(tuple(layers), lengths, context, pages)


def row_of(config: Gemma4Config, cache: KVCache, slot: jax.Array) -> KVCache:
    """The cache of one row: its ring, its length, its pages, and the pool that it shares with the others."""

    def own(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, slot, 1, axis=0)

    layers = tuple(
        kv if config.is_global(i) else KeysAndValues(own(kv.keys), own(kv.values))
        for i, kv in enumerate(cache.layers)
    )
    assert cache.pages is not None
    return KVCache(layers, own(cache.lengths), cache.capacity, own(cache.pages))


def with_row(config: Gemma4Config, cache: KVCache, slot: jax.Array, row: KVCache) -> KVCache:
    """`cache` after what became of one of its rows."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(whole, part, slot, axis=0)

    layers = tuple(
        new if config.is_global(i) else KeysAndValues(*map(put, old, new))
        for i, (old, new) in enumerate(zip(cache.layers, row.layers, strict=True))
    )
    return cache.replace(layers=layers, lengths=put(cache.lengths, row.lengths))


Rings = tuple[KeysAndValues, ...]


def init_snapshots(config: Gemma4Config, cache: KVCache, count: int) -> Rings:
    """Room for `count` copies of the rings of a row, ``[count, S, K, C]`` for each sliding layer."""
    return tuple(
        KeysAndValues(*(jnp.zeros((count, *x.shape[1:]), x.dtype) for x in kv))
        for kv in _rings(config, cache)
    )


def copy_rings(source: Rings, index: jax.Array, target: Rings, to: jax.Array) -> Rings:
    """`target` with row `index` of `source` as its row `to`."""
    return jax.tree.map(
        lambda old, new: lax.dynamic_update_slice_in_dim(
            old, lax.dynamic_slice_in_dim(new, index, 1, axis=0), to, axis=0
        ),
        target,
        source,
    )


def save_rings(
    config: Gemma4Config, cache: KVCache, slot: jax.Array, snapshots: Rings, to: jax.Array
) -> Rings:
    """Sets the rings of `slot` aside as snapshot `to`."""
    return copy_rings(_rings(config, cache), slot, snapshots, to)


def restore_rings(
    config: Gemma4Config, cache: KVCache, slot: jax.Array, snapshots: Rings, index: jax.Array
) -> KVCache:
    """Gives `slot` the rings of snapshot `index`."""
    rings = iter(copy_rings(snapshots, index, _rings(config, cache), slot))
    layers = (kv if config.is_global(i) else next(rings) for i, kv in enumerate(cache.layers))
    return cache.replace(layers=tuple(layers))


def _rings(config: Gemma4Config, cache: KVCache) -> Rings:
    return tuple(kv for i, kv in enumerate(cache.layers) if not config.is_global(i))


def _bytes(config: Gemma4Config, positions: int, itemsize: int, *, is_global: bool) -> int:
    layers = (i for i in range(config.first_kv_shared_layer) if config.is_global(i) == is_global)
    sizes = (kv_shape(config, i, positions) for i in layers)
    return 2 * itemsize * sum(held * heads * head_dim for held, heads, head_dim in sizes)
