"""The bytes and operations that no implementation of a decode step or of prefill can do without."""

from __future__ import annotations

import math

import jax

from gemma_jax.config import Gemma4Config
from gemma_jax.model import Params, param_shapes
from pallas_kernels.arrays import QuantizedArray


def decode_bytes_min(
    config: Gemma4Config, params: Params, batch: int, *, depth: int, itemsize: int = 2
) -> int:
    """Bytes that one decode step of `batch` rows must read: each matrix once, each row's keys and values once a layer.

    Every row has `depth` positions in the cache, whose elements have `itemsize` bytes.
    Of experts, those that `batch` rows choose if no two choose the same; of tables that are only looked up, nothing.
    """
    total = 0
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )
    for path, leaf in leaves:
        names = [key.key for key in path]
        nbytes = (
            leaf.nbytes
            if isinstance(leaf, QuantizedArray)
            else math.prod(leaf.shape) * leaf.dtype.itemsize
        )
        if names == ["ple", "embedding"]:
            continue
        if len(leaf.shape) == 3:
            chosen = min(batch * config.num_experts_per_token, config.num_experts)
            nbytes = nbytes * chosen // config.num_experts
        total += nbytes
    for i in range(config.num_layers):
        positions = depth if config.is_global(i) else min(depth, config.sliding_window)
        total += batch * positions * 2 * config.kv_heads_of(i) * config.head_dim_of(i) * itemsize
    return total


def prefill_flops_min(config: Gemma4Config, tokens: int) -> int:
    """Multiply-adds, twice, of the matrices over `tokens` positions, the KV-shared layers and the head over one."""
    total = 0
    for path, leaf in param_shapes(config).items():
        if len(leaf.shape) < 2 or path == "ple/embedding":
            continue
        weights = math.prod(leaf.shape)
        if len(leaf.shape) == 3:
            weights = weights * config.num_experts_per_token // config.num_experts
        layer = path.split("/")[0]
        shared = layer.startswith("layers_") and config.is_kv_shared(
            int(layer.removeprefix("layers_"))
        )
        total += 2 * weights * (1 if shared or layer == "embed" else tokens)
    return total
