"""The largest of many numbers without sorting them, from which most draws of a token can be made.

A tournament: the largest of every 16 go on, until few are left. The winners' groups then hold all the largest of the
round before, because whatever is among the `count` largest is in a group whose largest is. So of 262144 logits three
times some 2048 are put in order, by counting how many are larger than each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_GROUP = 16


def largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of each row, in descending order.

    Args:
      x: float ``[B, V]`` without NaN.
      count: how many, at least 1; static. More than V are filled up with -inf, under ids from V on.

    Returns:
      values ``[B, count]`` and their ids, int32 ``[B, count]``. Of those that tie with the last any may be left out,
      and equals may be in any order; both are the same each time.
    """
    batch, n = x.shape
    if n <= _GROUP * count:
        return _in_order(x, count)
    x = jnp.pad(x, ((0, 0), (0, -n % _GROUP)), constant_values=-jnp.inf)
    groups = x.reshape(batch, -1, _GROUP)
    _, chosen = largest(groups.max(axis=-1), count)
    members = jnp.take_along_axis(groups, chosen[..., None], axis=1).reshape(batch, -1)
    values, places = _in_order(members, count)
    group = jnp.take_along_axis(chosen, places // _GROUP, axis=1)
    return values, group * _GROUP + places % _GROUP


def _in_order(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`largest` by comparing all with all."""
    n = max(x.shape[1], count)
    x = jnp.pad(x, ((0, 0), (0, n - x.shape[1])), constant_values=-jnp.inf)
    place = jnp.arange(n, dtype=jnp.int32)
    other, own = x[:, None, :], x[:, :, None]
    before = (other > own) | ((other == own) & (place[None, None, :] < place[None, :, None]))
    rank = before.sum(axis=-1, dtype=jnp.int32)
    has_rank = rank[:, None, :] == jnp.arange(count, dtype=jnp.int32)[None, :, None]
    at = jnp.where(has_rank, place, 0).sum(axis=-1, dtype=jnp.int32)
    return jnp.take_along_axis(x, at, axis=1), at
