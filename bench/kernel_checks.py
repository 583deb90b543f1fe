"""Whether a kernel's results are right: each within what rounding explains of the op's reference in float32.

Every op here begins with products that are linear in x and in w. They may be off by ``8 u |x w|_2 + 16 sqrt(K) 2**-24
|x w|_1`` over their K terms x w: roundings of each weight to bfloat16, u = 2**-8, and two orders of summing, both as
independent errors (Hoeffding: more has a probability below 2 exp(-32)). What an op makes of its products says what of
that is left in its results: `linear`, `gated`, `gelu_times_factor`, `largest`.

Only up to `ROWS_CHECKED` rows of x are checked, and the results are written over what no op returns: an element that a
kernel forgets is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import expert_matmul, quantized_matmul
from pallas_kernels.dispatch import dense

ROWS_CHECKED = 16
_BF16_ROUNDING = 2.0**-9
_FLOAT32_ROUNDING = (
    2.0**-20
)  # of what goes into GELU and comes out: a power of two, a reciprocal and a few products


class Rule(NamedTuple):
    """What an op's results are held to.

    products: of the op's arguments, float32 ``[..., N]``, by a reference.
    errors: of the results, the true products and what products may be off by: each result's error as a share of what
        is allowed.
    """

    products: Callable[..., jax.Array]
    errors: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def check(rule: Rule, run: Callable[..., jax.Array], x: Any, w: Any, *rest: Any) -> float:
    """Largest error of ``run(x, w, *rest)`` as a share of what rounding explains; `rest` has a row for each of x.

    Raises:
      ValueError: it is larger than all of that, or not a number.
    """
    shape = jax.eval_shape(run, x, w, *rest)
    numbers = jnp.issubdtype(shape.dtype, jnp.floating)
    poison = jnp.full(shape.shape, jnp.nan if numbers else -1, shape.dtype)
    over_poison = jax.jit(lambda _, *args: run(*args), donate_argnums=0, keep_unused=True)
    y = over_poison(poison, x, w, *rest)
    if not bool(jnp.all(jnp.isfinite(y) if numbers else y >= 0)):
        raise ValueError("results are not numbers, or were not written")
    some = np.unique(np.linspace(0, len(x) - 1, ROWS_CHECKED).astype(int))
    values = jax.jit(lambda w: dense(w, jnp.float32))(w)
    products, off = _products(rule, x[some].astype(jnp.float32), values, [r[some] for r in rest])
    worst = float(jnp.max(rule.errors(y[some], products, off)))
    if not worst <= 1:
        raise ValueError(f"an element is off by {worst:.3g} times what rounding explains")
    return worst


def _products(rule: Rule, x: Any, w: Any, rest: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """The products, and what they may be off by; of `rest` integers choose experts and numbers multiply."""
    reference = jax.jit(rule.products)

    def of_each(f: Callable[[Any], Any]) -> jax.Array:
        return reference(f(x), f(w), *(f(r) if r.dtype == jnp.float32 else r for r in rest))

    terms = x.size // len(x)
    by_weights = 8 * 2.0**-8 * jnp.sqrt(of_each(jnp.square))
    by_sums = 16 * math.sqrt(terms) * 2.0**-24 * of_each(jnp.abs)
    return reference(x, w, *rest), by_weights + by_sums


# --- results ----------------------------------------------------------------------------------------------------------


def linear(y: jax.Array, products: jax.Array, off: jax.Array) -> jax.Array:
    """Of results that are the products."""
    return abs(y - products) / off


def gated(h: jax.Array, products: jax.Array, off: jax.Array) -> jax.Array:
    """Of bfloat16 ``gelu(gate) * up``: GELU is nowhere steeper than 1.13."""
    (gate, up), (off_gate, off_up) = jnp.split(products, 2, axis=-1), jnp.split(off, 2, axis=-1)
    gelu = jax.nn.gelu(gate, approximate=True)
    allowed = 1.13 * off_gate * (abs(up) + off_up) + abs(gelu) * off_up
    rounding = _BF16_ROUNDING + _FLOAT32_ROUNDING
    allowed += rounding * (abs(gelu * up) + allowed) + _FLOAT32_ROUNDING * abs(up)
    return abs(h.astype(jnp.float32) - gelu * up) / allowed


def gelu_times_factor(y: jax.Array, products: jax.Array, off: jax.Array) -> jax.Array:
    """Of bfloat16 ``gelu(product) * factor``, from `products_and_factors`; a factor is not off."""
    product, factor = jnp.split(products, 2, axis=-1)
    want = jax.nn.gelu(product, approximate=True) * factor
    allowed = 1.13 * jnp.split(off, 2, axis=-1)[0] * abs(factor)
    rounding = _BF16_ROUNDING + _FLOAT32_ROUNDING
    allowed += rounding * (abs(want) + allowed) + _FLOAT32_ROUNDING * abs(factor)
    return abs(y.astype(jnp.float32) - want) / allowed


def largest(index: jax.Array, products: jax.Array, off: jax.Array) -> jax.Array:
    """Of the place of the largest product: another may take it if both being off puts it first."""
    best = jnp.argmax(products, axis=-1)

    def at(places: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, places[..., None], axis=-1, mode="clip")[..., 0]

    behind = at(best, products) - at(index, products)
    errors = behind / (at(best, off) + at(index, off))
    return jnp.where(index < products.shape[-1], errors, jnp.inf)


# --- products ---------------------------------------------------------------------------------------------------------


def matrix_products(x: jax.Array, w: jax.Array, scale: float | jax.Array = 1) -> jax.Array:
    """``scale * (x @ w.T)``."""
    return quantized_matmul(x, w, implementation="reference") * scale


def products_and_factors(x: jax.Array, w: jax.Array, factor: jax.Array) -> jax.Array:
    """``[M, 2 N]``: ``x @ w.T``, then factor."""
    return jnp.concatenate([matrix_products(x, w), factor], axis=-1)


def expert_products(x: jax.Array, w: jax.Array, ids: jax.Array, scale: jax.Array) -> jax.Array:
    """``[T, J, N]``: ``scale[t] * w[ids[t, j]] @ x[t]``."""
    rows = jnp.repeat(x, ids.shape[1], axis=0)
    y = expert_matmul(rows, w, ids.reshape(-1), implementation="reference")
    return y.reshape(*ids.shape, -1) * scale[:, None, None]
