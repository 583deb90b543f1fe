"""Which implementation of an op serves a call: the one resolution that every op shares.

An op's package holds an ordered table ``{name: module}``. Each module exports the op itself, ``why_not(*args)``, which
returns the reason it cannot serve a call or None, and ``default_config(*args)``. Both see abstract values only, so the
choice is made while tracing and costs nothing afterwards.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import QuantizedArray
from pallas_kernels.packed import PackedArray, Weight

# Every name that some op's table has: of a caller's order of preference an op takes those it knows.
NAMES = ("xla", "mosaic", "reference")
# One name, several in order of preference, or None for an op's own order.
Implementation = str | tuple[str, ...] | None


class Table(Mapping[str, ModuleType]):
    """An op's implementations, in order of preference: name -> module ``<op>.<name>``, imported when it is looked at.

    What XLA serves by itself need not wait for the import of a compiler for GPUs.
    """

    def __init__(self, op: str, *names: str) -> None:
        self._op, self._names = op, names

    def __getitem__(self, name: str) -> ModuleType:
        if name not in self._names:
            raise KeyError(name)
        return importlib.import_module(f"{self._op}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def choose(
    op: str, table: Mapping[str, ModuleType], implementation: Implementation, *args: Any
) -> ModuleType:
    """Returns the module of ``table`` that serves ``op(*args)``.

    Args:
        op: the op's name, for errors.
        table: implementations in order of preference.
        implementation: a name of the table, which must serve the call; a tuple of names, of which the first that can
            does, those that the table lacks left out; None takes the first of the table without an objection.
        *args: the op's array arguments, concrete or abstract.

    Raises:
        ValueError: a name is unknown, or the named module (or every module) objects; the reasons are given.
    """
    if isinstance(implementation, str):
        if implementation not in table:
            raise ValueError(
                f"{op}: implementation = {implementation!r}: expected None or one (or several) of "
                f"{', '.join(table)}"
            )
        reason = table[implementation].why_not(*args)
        if reason is not None:
            raise ValueError(f"{op}: implementation {implementation!r} cannot serve this: {reason}")
        return table[implementation]
    for name in implementation or ():
        if name not in NAMES:
            raise ValueError(
                f"{op}: implementation = {implementation!r}: {name!r} is none of {', '.join(NAMES)}"
            )
    names = list(table) if implementation is None else [n for n in implementation if n in table]
    reasons = []
    for name in names:
        reason = table[name].why_not(*args)
        if reason is None:
            return table[name]
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"{op}: no implementation serves this call ({'; '.join(reasons) or 'none was named'})"
    )


def check_weight(op: str, w: Weight, ndim: int) -> None:
    """Raises ValueError unless ``w`` is a sound quantized or floating array of ``ndim`` axes."""
    if isinstance(w, QuantizedArray | PackedArray):
        w.validate()
    elif not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"{op}: w has dtype {w.dtype}: expected floating point or a quantized array"
        )
    if w.ndim != ndim:
        raise ValueError(f"{op}: w has shape {w.shape}: expected {ndim} axes")


def check_floating(op: str, name: str, x: jax.Array) -> None:
    """Raises ValueError unless ``x`` is floating point."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op}: {name} has dtype {x.dtype}: expected floating point")


def dense(w: Weight, dtype: Any) -> jax.Array:
    """Returns the values of ``w`` as an array of ``dtype``."""
    return w.astype(dtype) if isinstance(w, jax.Array) else w.dequantize(dtype)


def unpacked(w: Weight) -> QuantizedArray | jax.Array:
    """Returns `w`, or what was packed: for implementations that know row order only."""
    return w.unpack() if isinstance(w, PackedArray) else w
