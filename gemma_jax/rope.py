"""Rotary position embeddings: the plain kind of sliding layers and the "proportional" kind of global layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_table(
    positions: jax.Array, head_dim: int, theta: float, rotary_factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of ``position * theta ** (-2 j / C)`` for the C / 2 frequencies of a head.

    Only the first ``int(rotary_factor * C // 2)`` frequencies rotate, the others are zero: the "proportional" RoPE of
    Gemma 4's global layers, whose exponents are still divided by the whole head size.

    Args:
      positions: int32 ``[B, T]``.
      head_dim: C, even.
      theta: base of the geometric series of frequencies.
      rotary_factor: share of the frequencies that rotate.

    Returns:
      Two float32 arrays ``[B, T, C / 2]``.
    """
    half = head_dim // 2
    j = jnp.arange(half, dtype=jnp.float32)
    rotating = j < int(rotary_factor * head_dim // 2)
    frequencies = jnp.where(rotating, theta ** (-2.0 * j / head_dim), 0.0)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)
