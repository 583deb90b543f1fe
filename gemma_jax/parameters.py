"""Declares a module's parameters, which may have been given as quantized arrays."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.arrays import QuantizedArray
from pallas_kernels.packed import PackedArray, Weight


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


def vector_param(module: nn.Module, name: str, size: int) -> jax.Array:
    """A parameter that is never quantized: a norm or a scale, 1 where nothing was learnt."""
    vector = weight_param(module, name, (size,), nn.initializers.ones)
    assert not isinstance(vector, QuantizedArray | PackedArray)
    return vector
