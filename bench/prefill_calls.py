"""The calls by which attention of prompts is judged: a chunk of tokens of every kind of layer, behind a prefix.

As `gemma_jax.cache.extend` gives them: a sliding layer's keys are its window before the chunk and the chunk, a global
layer's all up to the chunk's end. `depth` is how many positions the prefix has of which there are keys.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bench.attention_calls import FORMAT, AttentionCall, error_of
from pallas_kernels.attention import IMPLEMENTATIONS, attention
from pallas_kernels.attention.cases import CASES, Case

OP = "attention"
TOKENS = (512, 2048)
DEPTHS = (0, 8192)  # of global layers; before sliding ones lies their window
_SMALL = {"small_64": Case(4, 2, 64, 40), "small_512": Case(4, 1, 512, None)}
_SMALL_TOKENS, _SMALL_DEPTH = 24, 40


@dataclasses.dataclass(frozen=True)
class PrefillCall(AttentionCall):
    """A chunk of `rows` tokens of one row, by one implementation."""

    op: ClassVar[str] = OP

    @property
    def module(self) -> Any:
        """The implementation."""
        return IMPLEMENTATIONS[self.implementation]

    @property
    def shape(self) -> Any:
        """The layer."""
        return (CASES | _SMALL)[self.layer]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Abstract q, k, v and their positions."""
        c, slots = self.shape, self.depth + self.rows
        q = jax.ShapeDtypeStruct((1, self.rows, c.heads, c.head_dim), jnp.bfloat16)
        kv = jax.ShapeDtypeStruct((1, slots, c.kv_heads, c.head_dim), jnp.bfloat16)
        return q, kv, kv, *(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (self.rows, slots))

    def run(self, *arguments: Any, implementation: str | None = None) -> jax.Array:
        """The result, by this or another implementation."""
        chosen = implementation or self.implementation
        return attention(*arguments, window=self.shape.window, implementation=chosen)

    @property
    def weights_read(self) -> int:
        """Elements of keys and values."""
        return 2 * (self.depth + self.rows) * self.shape.kv_heads * self.shape.head_dim

    @property
    def bytes_moved(self) -> int:
        """The arguments and the result, which is as large as q, each once."""
        arrays = (*self.arguments, self.arguments[0])
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products, for the pairs of a query and a key that it sees."""
        window = self.shape.window or self.depth + self.rows
        pairs = sum(min(self.depth + t + 1, window) for t in range(self.rows))
        return 4 * pairs * self.shape.heads * self.shape.head_dim

    def random_arguments(self, key: jax.Array) -> tuple[Any, ...]:
        """Numbers for `run`: the chunk's positions follow those of the prefix. Scores of order one."""
        shapes = self.arguments[:3]
        keys = jax.random.split(key, 3)
        q, k, v = (
            jax.random.normal(n, a.shape, a.dtype) for n, a in zip(keys, shapes, strict=True)
        )
        positions = jnp.arange(self.depth + self.rows, dtype=jnp.int32)[None]
        q = q * jnp.bfloat16(self.shape.head_dim**-0.5)
        return q, k, v, positions[:, self.depth :], positions

    def check(self, run: Callable[..., jax.Array], *arguments: Any) -> float:
        """Largest error as a share of what rounding explains: 4 roundings at 2**-9 of the largest value.

        Raises:
          ValueError: it is larger than all of that, or not a number.
        """
        want = jax.jit(functools.partial(self.run, implementation="reference"))(*arguments)
        largest = jnp.max(jnp.abs(arguments[2].astype(jnp.float32)))
        error = error_of(jax.jit(run)(*arguments), want, largest) / (4 * 2.0**-9)
        if not error <= 1:
            raise ValueError(f"elements are off by {error} times what rounding explains")
        return error


def prefill_calls(
    group: str, formats: Sequence[str], implementations: Callable[[str], bool]
) -> Iterator[PrefillCall]:
    """Every call that its implementation serves: of `bench.kernel_calls.calls`, whose arguments these are."""
    layers, tokens = (_SMALL, (_SMALL_TOKENS,)) if group == "SMALL" else (CASES, TOKENS)
    for layer, rows, name in itertools.product(layers, tokens, IMPLEMENTATIONS):
        window = layers[layer].window
        depths = (window,) if window else (_SMALL_DEPTH,) if group == "SMALL" else DEPTHS
        for depth in depths if FORMAT in formats and implementations(name) else ():
            call = PrefillCall(layer, name, rows, depth)
            if call.module.why_not(*call.arguments) is None:
                yield call
