"""The calls by which kernels are judged: every op with every named case, number of rows and weight format.

`OPS` is the register of products: of each op the shapes of a call and what its results are held to; cases and
implementations come from its own package. `bench.attention_calls` and `bench.prefill_calls` have those of attention.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench import attention_calls, kernel_checks, prefill_calls
from bench.aot import WEIGHT_FORMATS, abstract_weight
from bench.attention_calls import AttentionCall
from bench.kernel_checks import Rule
from pallas_kernels.arrays import FORMATS
from pallas_kernels.packed import PACKED, why_not_packed


class Shapes(NamedTuple):
    """Of one call's arguments in their order; an op without ids or scale has None there.

    x: bfloat16 ``[M, ..., K]``.
    w: ``[..., N, K]``.
    ids: int32 ``[M, ...]``, the experts that x meets.
    scale: float32 ``[M, ...]``, what products, or GELU of them, are multiplied by.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    ids: tuple[int, ...] | None = None
    scale: tuple[int, ...] | None = None

    @property
    def pairs(self) -> int:
        """Products of a vector and a matrix: rows of x, or as many as choose an expert."""
        return self.x[0] if self.ids is None else math.prod(self.ids)

    @property
    def rest(self) -> list[jax.ShapeDtypeStruct]:
        """Abstract ids and scale, where there are any."""
        types = ((self.ids, jnp.int32), (self.scale, jnp.float32))
        return [jax.ShapeDtypeStruct(s, dtype) for s, dtype in types if s is not None]


class Op(NamedTuple):
    """An op's function and implementations, its cases, what results are held to, and the shapes of a case's call."""

    function: Callable[..., jax.Array]
    implementations: Mapping[str, ModuleType]
    cases: ModuleType
    rule: Rule
    shapes: Callable[[Any, int], Shapes]

    def group(self, name: str) -> Iterator[tuple[str, Shapes]]:
        """Cases of a group, ``SMALL`` or ``REAL``, with every number of rows or tokens."""
        rows = getattr(self.cases, "ROWS", None) or self.cases.TOKENS
        for (case, c), m in itertools.product(getattr(self.cases, name).items(), rows):
            yield case, self.shapes(c, m)


def _op(
    name: str,
    shapes: Callable[[Any, int], Shapes],
    products: Callable[..., jax.Array] | None = None,
    errors: Callable[..., jax.Array] = kernel_checks.linear,
) -> Op:
    """The op of that name; without `products` its results are products."""
    package = importlib.import_module(f"pallas_kernels.{name}")
    cases = importlib.import_module(f"pallas_kernels.{name}.cases")
    function = getattr(package, name)
    products = products or functools.partial(function, implementation="reference")
    return Op(function, package.IMPLEMENTATIONS, cases, Rule(products, errors), shapes)


OPS: dict[str, Op] = {
    "quantized_matmul": _op("quantized_matmul", lambda c, m: Shapes((m, c.k), (c.n, c.k))),
    "gated_matmul": _op(
        "gated_matmul",
        lambda c, m: Shapes((m, c.k), (2 * c.f, c.k), scale=(m, 1)),
        kernel_checks.matrix_products,
        kernel_checks.gated,
    ),
    "gelu_matmul": _op(
        "gelu_matmul",
        lambda c, m: Shapes((m, c.k), (c.n, c.k), scale=(m, c.n)),
        kernel_checks.products_and_factors,
        kernel_checks.gelu_times_factor,
    ),
    "argmax_matmul": _op(
        "argmax_matmul",
        lambda c, m: Shapes((m, c.k), (c.n, c.k)),
        kernel_checks.matrix_products,
        kernel_checks.largest,
    ),
    "expert_matmul": _op(
        "expert_matmul",
        lambda c, t: Shapes((t * c.per_token, c.k), (c.e, c.n, c.k), ids=(t * c.per_token,)),
    ),
    "expert_gate_up": _op(
        "expert_gate_up",
        lambda c, t: Shapes((t, c.k), (c.e, 2 * c.f, c.k), ids=(t, c.per_token), scale=(t,)),
        kernel_checks.expert_products,
        kernel_checks.gated,
    ),
    "expert_down": _op(
        "expert_down",
        lambda c, t: Shapes(
            (t, c.per_token, c.f), (c.e, c.n, c.f), (t, c.per_token), (t, c.per_token)
        ),
    ),
}


NAMES = (*OPS, attention_calls.OP, prefill_calls.OP)


class Call(NamedTuple):
    """An op's implementation on one shape with weights in one format."""

    op: str
    case: str
    implementation: str
    format: str
    shapes: Shapes
    packed: bool  # whether the implementation wants the weights in fragment order

    @property
    def rows(self) -> int:
        """Of x."""
        return self.shapes.x[0]

    @property
    def name(self) -> str:
        """Case and rows of x."""
        return f"{self.case} M={self.rows}"

    @property
    def module(self) -> ModuleType:
        """The implementation."""
        return OPS[self.op].implementations[self.implementation]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Abstract x, w, ids and scale."""
        return _arguments(self.shapes, _weight(self.format, self.shapes.w, packed=self.packed))

    def run(self, *arguments: Any) -> jax.Array:
        """The op by this implementation."""
        return OPS[self.op].function(*arguments, implementation=self.implementation)

    def check(self, run: Callable[..., jax.Array], *arguments: Any) -> float:
        """`kernel_checks.check` by the op's rule."""
        return kernel_checks.check(OPS[self.op].rule, run, *arguments)

    @property
    def configs(self) -> dict[str, Any]:
        """The configs that the implementation offers to try, by name."""
        offer: Callable[..., list[Any]] | None = getattr(self.module, "configs", None)
        return {
            " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()): config
            for config in (offer(*self.arguments) if offer else ())
        }

    def configured(self, config: str | None) -> Callable[..., jax.Array]:
        """`run`, or the implementation with the config of that name."""
        if config is None:
            return self.run
        return functools.partial(getattr(self.module, self.op), config=self.configs[config])

    @property
    def runs_on_cpu(self) -> bool:
        """Whether it is made of what XLA has everywhere."""
        return not is_hand_kernel(self.implementation)

    @property
    def weights_read(self) -> int:
        """Weights of the matrices that the call uses: of experts, the most that can be chosen."""
        *experts, n, k = self.shapes.w
        return min(self.shapes.pairs, math.prod(experts)) * n * k

    @property
    def bytes_moved(self) -> int:
        """Planes of those weights as they are stored, the other arguments and the result, each once.

        And what the implementation says it writes and reads again on the way, in `intermediate_bytes`.
        """
        between = getattr(self.module, "intermediate_bytes", lambda *_: 0)
        return self._bytes(packed=self.packed) + int(between(*self.arguments))

    @property
    def bytes_min(self) -> int:
        """Without that, and with the weights as `pallas_kernels.arrays` stores them."""
        return self._bytes(packed=False)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products."""
        return 2 * self.shapes.pairs * math.prod(self.shapes.w[-2:])

    def _bytes(self, *, packed: bool) -> int:
        w = _weight(self.format, self.shapes.w, packed=packed)
        x, _, *rest = arguments = _arguments(self.shapes, w)
        y = jax.eval_shape(OPS[self.op].function, *arguments)
        read = _size(w) * self.weights_read // math.prod(self.shapes.w)
        return read + _size((x, rest, y))


def is_hand_kernel(implementation: str) -> bool:
    """Whether an implementation of that name is a kernel of ours for GPUs."""
    return implementation.startswith("mosaic")


def calls(
    *,
    group: str = "REAL",
    ops: Sequence[str] = NAMES,
    formats: Sequence[str] = WEIGHT_FORMATS,
    implementations: Callable[[str], bool] = lambda name: name != "reference",
) -> Iterator[Call | AttentionCall]:
    """Every call that its implementation serves, one shape and format after the other.

    An implementation gets the weights in row order if it takes them so, else in fragment order.
    """
    if attention_calls.OP in ops:
        yield from attention_calls.attention_calls(group, formats, implementations)
    if prefill_calls.OP in ops:
        yield from prefill_calls.prefill_calls(group, formats, implementations)
    for op in (op for op in ops if op in OPS):
        for case, shapes in OPS[op].group(group):
            for weight_format in formats:
                for name, module in OPS[op].implementations.items():
                    if implementations(name):
                        for packed in (False, True):
                            w = _weight(weight_format, shapes.w, packed=packed)
                            if w is not None and not module.why_not(*_arguments(shapes, w)):
                                yield Call(op, case, name, weight_format, shapes, packed)
                                break


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A call to be timed, by its names; `config` is one of `Call.configs`, None the implementation's own choice."""

    op: str
    case: str
    implementation: str
    format: str
    rows: int
    group: str = "REAL"
    config: str | None = None

    @classmethod
    def of(cls, result: dict[str, Any]) -> KernelCase:
        """The case that a result is of."""
        values: dict[str, Any] = {f.name: result.get(f.name) for f in dataclasses.fields(cls)}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The keys of a result that say which case it is of."""
        return dataclasses.asdict(self)

    @property
    def call(self) -> Call | AttentionCall:
        """What it times."""
        found = calls(
            group=self.group,
            ops=[self.op],
            formats=[self.format],
            implementations=lambda name: name == self.implementation,
        )
        return next(c for c in found if (c.case, c.rows) == (self.case, self.rows))

    def __str__(self) -> str:
        by = f"{self.implementation} {self.config}" if self.config else self.implementation
        return f"{self.op} {self.case} M={self.rows} {self.format} {by}"


def _weight(weight_format: str, shape: tuple[int, ...], *, packed: bool) -> Any:
    """An abstract weight, None if that format and shape cannot be stored so."""
    if not packed:
        return abstract_weight(shape, weight_format)
    if weight_format not in FORMATS or why_not_packed(FORMATS[weight_format], shape):
        return None
    return PACKED[weight_format].abstract(shape)


def _arguments(shapes: Shapes, w: Any) -> tuple[Any, ...]:
    return jax.ShapeDtypeStruct(shapes.x, jnp.bfloat16), w, *shapes.rest


def _size(arrays: Any) -> int:
    """Bytes of all of them."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays))
