"""The calls by which attention over a cache is judged: a decode step of every named layer, by rows and depth.

What a call reads is the cache; it stands where products have their weights. A timed call takes the queries alone, as a
layer that shares another's keys and values does: one that wrote into a cache which the loop still needs would be
charged a copy of it. `AttentionCall.check` runs the step of the layer itself too and looks at what it wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.attention_decode import IMPLEMENTATIONS, attention_decode
from pallas_kernels.attention_decode.cases import CASES, Case

OP = "attention_decode"
FORMAT = "bf16"
BATCHES = (1, 8, 32)
DEPTHS = (512, 4096, 16384)  # of global layers; sliding ones hold their window
_SMALL = {"small_128": Case(4, 2, 128, None, 4), "small_512": Case(4, 1, 512, None, 1)}
_SMALL_DEPTH = 100


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A layer's step by one implementation, for `rows` rows of the same depth; see `bench.kernel_calls.Call`."""

    layer: str
    implementation: str
    rows: int
    depth: int

    op: ClassVar[str] = OP
    format: ClassVar[str] = FORMAT
    packed: ClassVar[bool] = False

    @property
    def case(self) -> str:
        """Layer and depth."""
        return f"{self.layer} depth={self.depth}"

    @property
    def name(self) -> str:
        """Case and rows."""
        return f"{self.case} M={self.rows}"

    @property
    def module(self) -> ModuleType:
        """The implementation."""
        return IMPLEMENTATIONS[self.implementation]

    @property
    def shape(self) -> Case:
        """The layer."""
        return (CASES | _SMALL)[self.layer]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Abstract product, cache, norms, RoPE tables and positions."""
        c, rows = self.shape.head_dim, self.rows
        table = jax.ShapeDtypeStruct((rows, 1, c // 2), jnp.float32)
        cache = jax.ShapeDtypeStruct((rows, self.depth, self.shape.kv_heads, c), jnp.bfloat16)
        return (
            jax.ShapeDtypeStruct((rows, 1, self.shape.heads * c), jnp.float32),
            (cache, cache),
            (jax.ShapeDtypeStruct((c,), jnp.float32), None),
            (table, table),
            jax.ShapeDtypeStruct((rows, 1), jnp.int32),
        )

    def step(self, x: Any, cache: Any, *rest: Any, implementation: str | None = None) -> Any:
        """Result and cache, by this or another implementation."""
        norms, rope, positions = rest
        return attention_decode(
            x,
            norms,
            rope,
            cache,
            positions,
            heads=self.shape.heads,
            window=self.shape.window,
            implementation=implementation or self.implementation,
        )

    def run(self, *arguments: Any) -> jax.Array:
        """The result."""
        out: jax.Array = self.step(*arguments)[0]
        return out

    @property
    def configs(self) -> dict[str, Any]:
        """None to try."""
        return {}

    def configured(self, config: str | None) -> Callable[..., jax.Array]:
        """`run`, with the implementation's own config."""
        assert config is None
        return self.run

    @property
    def runs_on_cpu(self) -> bool:
        """Whether it is made of what XLA has everywhere."""
        return not self.implementation.startswith("mosaic")

    @property
    def weights_read(self) -> int:
        """Elements of keys and values."""
        return 2 * self.rows * self.depth * self.shape.kv_heads * self.shape.head_dim

    @property
    def bytes_moved(self) -> int:
        """Keys, values, the other arguments and the result, each once."""
        leaves = jax.tree.leaves((self.arguments, jax.eval_shape(self.run, *self.arguments)))
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)

    @property
    def bytes_min(self) -> int:
        """The same: nothing is stored in another form."""
        return self.bytes_moved

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products."""
        return 4 * self.rows * self.depth * self.shape.heads * self.shape.head_dim

    def random_arguments(self, key: jax.Array) -> tuple[Any, ...]:
        """Numbers for `run`: every slot is in use, the last position is the newest."""
        keys = iter(jax.random.split(key, 8))

        def draw(a: jax.ShapeDtypeStruct) -> jax.Array:
            if a.dtype == jnp.int32:
                return jnp.full(a.shape, self.depth - 1, jnp.int32)
            return jax.random.normal(next(keys), a.shape, a.dtype)

        x, cache, (q_norm, _), _, positions = self.arguments
        angles = jax.random.uniform(next(keys), (self.rows, 1, self.shape.head_dim // 2))
        # Scores of a few units, as trained norms give: a soft-max over one slot would check little.
        norms = (jnp.full(q_norm.shape, self.shape.head_dim**-0.5, jnp.float32), None)
        rope = (jnp.cos(angles), jnp.sin(angles))
        return draw(x), jax.tree.map(draw, cache), norms, rope, draw(positions)

    def check(self, run: Callable[..., jax.Array], *arguments: Any) -> float:
        """Largest error of results, and of the layer's own step, as a share of what rounding explains.

        As in the tests of the op: results may be off by 6 roundings at 2**-9 of the largest value, the cache by 2**-8.

        Raises:
          ValueError: it is larger than all of that, or not a number.
        """
        x, cache, norms, rope, positions = arguments
        largest = jnp.max(jnp.abs(cache[1].astype(jnp.float32)))
        out = jax.jit(run)(*arguments)
        errors = [error_of(out, self._want(*arguments)[0], largest) / (6 * 2.0**-9)]
        if self.shape.own:
            c = self.shape.head_dim
            beside = jax.random.normal(jax.random.key(0), (self.rows, 1, self.shape.own * c))
            qkv = jnp.concatenate([x, beside], axis=-1)
            own = (qkv, cache, (norms[0], jnp.ones((c,), jnp.float32)), rope, positions)
            out, written = jax.jit(self.step)(*own)
            want, want_written = self._want(*own)
            errors.append(error_of(out, want, largest) / (6 * 2.0**-9))
            for got, want in zip(written, want_written, strict=True):
                errors.append(error_of(got, want, jnp.max(jnp.abs(want))) / 2.0**-8)
        if not all(error <= 1 for error in errors):
            raise ValueError(f"elements are off by {errors} times what rounding explains")
        return max(errors)

    def _want(self, *arguments: Any) -> Any:
        return jax.jit(functools.partial(self.step, implementation="reference"))(*arguments)


def attention_calls(
    group: str, formats: Sequence[str], implementations: Callable[[str], bool]
) -> Iterator[AttentionCall]:
    """Every call that its implementation serves: of `bench.kernel_calls.calls`, whose arguments these are."""
    layers = _SMALL if group == "SMALL" else {n: c for n, c in CASES.items() if c.own}
    for layer, rows, name in itertools.product(layers, BATCHES, IMPLEMENTATIONS):
        window = layers[layer].window
        depths = (window,) if window else (_SMALL_DEPTH,) if group == "SMALL" else DEPTHS
        for depth in depths if FORMAT in formats and implementations(name) else ():
            call = AttentionCall(layer, name, rows, depth)
            x, cache, _, rope, positions = call.arguments
            if call.module.why_not(x, rope, cache, positions, call.shape.heads) is None:
                yield call


def error_of(got: jax.Array, want: jax.Array, scale: jax.Array) -> float:
    """Of the element that is furthest off, as a share of `scale`; infinite if one is not a number."""
    off = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
    if not bool(jnp.all(jnp.isfinite(off))):  # which a maximum need not show
        return math.inf
    return float(jnp.max(off) / scale.astype(jnp.float32))
