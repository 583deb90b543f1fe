"""Random weights in the shapes and formats that conversion would give, made on the device, a parameter at a time.

The planes of a quantized matrix are random bits, whatever numbers they stand for; its scales are chosen so that these
numbers have the standard deviation that keeps activations at about their size. So nothing larger than the parameter
itself is ever allocated, and speed, which does not depend on the values, is that of real weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from bench import aot
from convert.policy import format_of
from gemma_jax.config import Gemma4Config
from gemma_jax.model import Params, param_shapes
from pallas_kernels.arrays import BLOCK, FORMATS, Q4K

# What the float16 planes are for values of standard deviation 1, all other planes being uniform over their range.
# With E[q**2] = (n**2 - 1) / 12 + mean**2 of n equally likely integers:
#   Q4K    var(sc * q - 7.5 * m) = 1333.5 * 77.5 + 7.5**2 * 1333.5 - 2 * 31.5**2 * 7.5**2, mean 0
#   EQ8_0  var(q) = (256**2 - 1) / 12
#   Q6K    var(sc * (q - 32)) = 5461.5 * 341.5
_Q4K_STD = math.sqrt(1333.5 * (77.5 + 7.5**2) - 2 * 31.5**2 * 7.5**2)
_UNIT_SCALES: dict[str, dict[str, float]] = {
    "q4k": {"d": 1 / _Q4K_STD, "dmin": 7.5 / _Q4K_STD},
    "eq8_0": {"scale": math.sqrt(12 / (256**2 - 1))},
    "q6k": {"d": 1 / math.sqrt(5461.5 * 341.5)},
}
# Scales of blocks and elements of norms lie this far around their mean, so that exchanging two of them shows.
_SPREAD = 0.25


def random_params(config: Gemma4Config, weight_format: str, seed: int = 0) -> Params:
    """Parameters as `abstract_params` describes them, on the default device.

    Matrices ``[..., N, K]`` have elements of mean 0 and standard deviation about ``1 / sqrt(K)``; norms and scales are
    uniform in 0.75 .. 1.25. The same seed gives the same parameters on every device.

    Args:
      config: the architecture.
      weight_format: one of `convert.policy.FORMATS`.
      seed: of the random numbers.

    Raises:
      ValueError: unknown format, or rows that its blocks do not divide.
    """
    abstract = abstract_params(config, weight_format)
    leaves, tree = jax.tree.flatten(abstract, is_leaf=_is_quantized)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = []
    for key, leaf in zip(keys, leaves, strict=True):
        kind = next((name for name, cls in FORMATS.items() if isinstance(leaf, cls)), None)
        if kind is None:
            weight = _dense(key, leaf.shape) if len(leaf.shape) > 1 else _vector(key, leaf.shape)
        else:
            weight = _quantized(key, leaf.shape, kind)
        # One at a time: what the next one needs meanwhile must not come on top.
        made.append(jax.block_until_ready(weight))
    return jax.tree.unflatten(tree, made)


def random_weight(key: jax.Array, shape: tuple[int, ...], weight_format: str) -> Any:
    """One such matrix ``[..., N, K]`` in a format of `aot.WEIGHT_FORMATS`."""
    return _dense(key, shape) if weight_format == "bf16" else _quantized(key, shape, weight_format)


def abstract_params(config: Gemma4Config, weight_format: str) -> Params:
    """Parameters as `gemma-jax convert --format` would write them for a bfloat16 checkpoint, as shapes alone."""
    leaves = {}
    for path, leaf in param_shapes(config).items():
        name = format_of(path, leaf.shape, weight_format)
        stored = name if name in FORMATS else "bf16"
        leaves[tuple(path.split("/"))] = aot.abstract_weight(leaf.shape, stored)
    return unflatten_dict(leaves)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, tuple(FORMATS.values()))


@functools.partial(jax.jit, static_argnums=(1,))
def _vector(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (1 + _SPREAD * _symmetric(key, shape)).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(1,))
def _dense(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (math.sqrt(3 / shape[-1]) * _symmetric(key, shape)).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(key: jax.Array, shape: tuple[int, ...], kind: str) -> Any:
    planes = {}
    for i, (name, plane) in enumerate(vars(FORMATS[kind].abstract(shape)).items()):
        plane_key = jax.random.fold_in(key, i)
        if unit := _UNIT_SCALES[kind].get(name):
            factor = 1 + _SPREAD * _symmetric(plane_key, plane.shape)
            planes[name] = (unit / math.sqrt(shape[-1]) * factor).astype(plane.dtype)
        else:
            unsigned = jnp.dtype(f"uint{8 * plane.dtype.itemsize}")
            bits = jax.random.bits(plane_key, plane.shape, unsigned)
            planes[name] = jax.lax.bitcast_convert_type(bits, plane.dtype)
    array = FORMATS[kind](**planes)
    if isinstance(array, Q4K) and shape[-1] // BLOCK % 2:
        # The unused nibble of a row is 0 in a converted checkpoint.
        return array.replace(
            scales_high=array.scales_high.at[..., -1].set(array.scales_high[..., -1] & 15)
        )
    return array


def _symmetric(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32 of `shape`, uniform in -1 .. 1, from 16 bits each."""
    bits = jax.random.bits(key, shape, jnp.uint16)
    return (bits.astype(jnp.float32) - 32767.5) / 32767.5
