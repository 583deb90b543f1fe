"""The calls by which kernels are judged: every op with every named case, number of rows and weight format.

`OPS` is the register: one line for each op, whose cases and implementations come from its own package.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench.aot import WEIGHT_FORMATS, abstract_weight
from pallas_kernels import expert_matmul, quantized_matmul
from pallas_kernels.arrays import FORMATS
from pallas_kernels.expert_matmul import IMPLEMENTATIONS as EXPERT_IMPLEMENTATIONS
from pallas_kernels.expert_matmul import cases as expert_cases
from pallas_kernels.packed import PACKED, why_not_packed
from pallas_kernels.quantized_matmul import IMPLEMENTATIONS as MATMUL_IMPLEMENTATIONS
from pallas_kernels.quantized_matmul import cases as matmul_cases


class Shapes(NamedTuple):
    """Of one call: ``x [M, K]``, ``w [..., N, K]`` and, where w has experts, whether ids ``[M]`` choose them."""

    x: tuple[int, int]
    w: tuple[int, ...]
    chooses: bool = False


class Op(NamedTuple):
    """An op's function and implementations, and the shapes of a group of its cases, ``SMALL`` or ``REAL``, by name."""

    function: Callable[..., jax.Array]
    implementations: Mapping[str, ModuleType]
    shapes: Callable[[str], Iterable[tuple[str, Shapes]]]


def _matmul_shapes(group: str) -> Iterator[tuple[str, Shapes]]:
    for name, c in getattr(matmul_cases, group).items():
        for rows in matmul_cases.ROWS:
            yield name, Shapes((rows, c.k), (c.n, c.k))


def _expert_shapes(group: str) -> Iterator[tuple[str, Shapes]]:
    for name, c in getattr(expert_cases, group).items():
        for tokens in expert_cases.TOKENS:
            yield name, Shapes((tokens * c.per_token, c.k), (c.e, c.n, c.k), chooses=True)


OPS: dict[str, Op] = {
    "quantized_matmul": Op(quantized_matmul, MATMUL_IMPLEMENTATIONS, _matmul_shapes),
    "expert_matmul": Op(expert_matmul, EXPERT_IMPLEMENTATIONS, _expert_shapes),
}


class Call(NamedTuple):
    """An op's implementation on one shape with weights in one format."""

    op: str
    case: str
    implementation: str
    format: str
    shapes: Shapes
    packed: bool  # whether the implementation wants the weights in fragment order

    @property
    def name(self) -> str:
        """Case and rows of x."""
        return f"{self.case} M={self.shapes.x[0]}"

    @property
    def module(self) -> ModuleType:
        """The implementation."""
        return OPS[self.op].implementations[self.implementation]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Abstract x (bfloat16), w and, where there are experts, ids."""
        return _arguments(self.shapes, _weight(self.format, self.shapes.w, packed=self.packed))

    def run(self, *arguments: Any) -> jax.Array:
        """The op by this implementation."""
        return OPS[self.op].function(*arguments, implementation=self.implementation)

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
        """Weights of the matrices that the call uses: of experts, the most that its rows can choose."""
        *experts, n, k = self.shapes.w
        return min(self.shapes.x[0], math.prod(experts)) * n * k

    @property
    def bytes_moved(self) -> int:
        """Planes of those weights as they are stored, x and y, each once."""
        return self._bytes(packed=self.packed)

    @property
    def bytes_min(self) -> int:
        """The same with the weights as `pallas_kernels.arrays` stores them."""
        return self._bytes(packed=False)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.shapes.x[0] * math.prod(self.shapes.w[-2:])

    def _bytes(self, *, packed: bool) -> int:
        w = _weight(self.format, self.shapes.w, packed=packed)
        stored = sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(w))
        m, k = self.shapes.x
        read = stored * self.weights_read // math.prod(self.shapes.w)
        return read + 2 * m * k + 4 * m * self.shapes.w[-2]


def is_hand_kernel(implementation: str) -> bool:
    """Whether an implementation of that name is a kernel of ours for GPUs."""
    return implementation.startswith("mosaic")


def calls(
    *,
    group: str = "REAL",
    ops: Sequence[str] = tuple(OPS),
    formats: Sequence[str] = WEIGHT_FORMATS,
    implementations: Callable[[str], bool] = lambda name: name != "reference",
) -> Iterator[Call]:
    """Every call that its implementation serves, one shape and format after the other.

    An implementation gets the weights in row order if it takes them so, else in fragment order.
    """
    for op in ops:
        for case, shapes in OPS[op].shapes(group):
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
    def call(self) -> Call:
        """What it times."""
        found = calls(
            group=self.group,
            ops=[self.op],
            formats=[self.format],
            implementations=lambda name: name == self.implementation,
        )
        return next(c for c in found if (c.case, c.shapes.x[0]) == (self.case, self.rows))

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
    x = jax.ShapeDtypeStruct(shapes.x, jnp.bfloat16)
    ids = jax.ShapeDtypeStruct(shapes.x[:1], jnp.int32)
    return (x, w, ids) if shapes.chooses else (x, w)
