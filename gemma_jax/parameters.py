"""Declares a module's parameters, which may have been given as quantized arrays."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.arrays import QuantizedArray
from pallas_kernels.packed import PackedArray, Weight, pack_array, why_not_packed


def weight_param(module: nn.Module, name: str, shape: tuple[int, ...], init: Any) -> Weight:
    """A parameter of `module`, which may have been given as a quantized array of that logical shape."""
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value: Weight = module.get_variable("params", name)
    if tuple(value.shape) != shape:
        path = "/".join((*module.path, name))
        raise ValueError(
            f"parameter {path} has shape {tuple(value.shape)}; the config says {shape}"
        )
    return value


# Tables that are only looked up: nothing multiplies them.
_NEVER_PACKED = (("ple", "embedding"),)


def pack_params(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters with every matrix that has a packed form in it, which is what Mosaic kernels read.

    One matrix at a time, and `params` is emptied meanwhile, so that a device never holds two copies of the weights.

    Args:
      params: a tree of parameters; its dictionaries are taken apart.

    Returns:
      A new tree: `pallas_kernels.PackedArray` for quantized matrices ``[..., N, K]`` whose rows come in tiles of 16 and
      whose K is a multiple of 64 (Q6K: 256); layers' scalars in float32, which kernels read; everything else as it was.
    """
    return _packed(params, ())


def _packed(node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, dict):
        return {name: _packed(node.pop(name), (*path, name)) for name in list(node)}
    if path[-1] == "layer_scalar":
        return node.astype(jnp.float32)
    if not isinstance(node, QuantizedArray) or path in _NEVER_PACKED:
        return node
    if why_not_packed(type(node), node.shape) is not None:
        return node
    return jax.block_until_ready(pack_array(node))


def vector_param(module: nn.Module, name: str, size: int) -> jax.Array:
    """A parameter that is never quantized: a norm or a scale, 1 where nothing was learnt."""
    vector = weight_param(module, name, (size,), nn.initializers.ones)
    assert not isinstance(vector, QuantizedArray | PackedArray)
    return vector
