"""Which implementation of each op would serve a typical call of each weight format on a machine, and why not others."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.machine import Machine
from pallas_kernels.arrays import FORMATS
from pallas_kernels.packed import PACKED, why_not_packed
from pallas_kernels.residual_norm import Pending
from pallas_kernels.target import compiling_for

# Compute capabilities for which the hand kernels are compiled in this project's tests.
COMPILED_FOR = ("9.0", "10.0", "12.1")
_PROMPT = 512
_WEIGHT_FORMATS = (*FORMATS, "bf16")


@dataclasses.dataclass(frozen=True)
class Support:
    """How one op is served for one weight format.

    Attributes:
      op: name of the op.
      call: "decode" (a row of one token) or "prefill" (512 tokens); of attention the kind of layer too.
      format: of the weights, or of the cache.
      default: the implementation that runs unless another is asked for.
      on_request: those that ``implementation=`` can ask for besides.
      why_not: name -> reason for those that cannot serve the call here.
    """

    op: str
    call: str
    format: str
    default: str
    on_request: tuple[str, ...]
    why_not: dict[str, str]


class _Call(NamedTuple):
    op: str
    name: str
    format: str
    arguments: tuple[Any, ...]  # abstract, weights in the order of `pallas_kernels.arrays`
    packed: tuple[Any, ...] | None = None  # the same with packed weights, if there are such
    why_not_packed: str | None = None


def support(machine: Machine) -> list[Support]:
    """A row for every op, kind of call and format, on the shapes of E4B, and of 26B-A4B for experts."""
    reason = why_no_hand_kernels(machine)
    capability = machine.compute_capability
    with compiling_for(capability) if capability else contextlib.nullcontext():
        return [_support(call, reason) for call in _calls()]


def why_no_hand_kernels(machine: Machine) -> str | None:
    """Why no hand-written kernel runs on that machine, or None."""
    if machine.platform != "gpu" or machine.compute_capability is None:
        where = f"on {machine.platform}" if machine.platform else "nowhere"
        return f"JAX runs {where}: hand-written kernels are for NVIDIA GPUs"
    if machine.compute_capability not in COMPILED_FOR:
        return (
            f"the GPU has compute capability {machine.compute_capability}: hand-written kernels are known to compile "
            f"for {', '.join(COMPILED_FOR)}"
        )
    try:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError as error:
        return f"Pallas Mosaic GPU does not import: {error}"
    return None


def _support(call: _Call, no_hand_kernels: str | None) -> Support:
    table = importlib.import_module(f"pallas_kernels.{call.op}").IMPLEMENTATIONS
    default, possible, why_not = None, [], {}
    for name in (name for name in table if name != "reference"):
        if name.startswith("mosaic") and no_hand_kernels:
            why_not[name] = no_hand_kernels
            continue
        forms = (call.arguments, call.packed) if name.startswith("mosaic") else (call.arguments,)
        reasons = [table[name].why_not(*form) for form in forms if form is not None]
        if None not in reasons:
            why_not[name] = call.why_not_packed or reasons[-1]
        elif default is None:
            default = name
        else:
            possible.append(name)
    return Support(call.op, call.name, call.format, default or "none", tuple(possible), why_not)


def _calls() -> Iterator[_Call]:
    for rows, name in ((1, "decode"), (_PROMPT, "prefill")):
        for op in (
            "quantized_matmul",
            "gated_matmul",
            "gelu_matmul",
            "argmax_matmul",
            "embedding_lookup",
        ):
            if rows == 1 or op in ("quantized_matmul", "embedding_lookup"):
                for weight_format in _WEIGHT_FORMATS:
                    yield _with_weight(op, name, weight_format, rows, _case(op, "e4b"))
        for op in ("expert_gate_up", "expert_down", "expert_matmul"):
            for weight_format in _WEIGHT_FORMATS:
                yield _with_weight(op, name, weight_format, rows, _case(op, "26b_a4b"))
    row: Any = _array((1, 1, 2560), jnp.float32)
    norm: Any = _array((2560,))
    stream = Pending(row, ((row, norm),))
    yield _Call("residual_norm", "decode", "bf16", (stream, (norm,), jnp.bfloat16))
    cases = importlib.import_module("pallas_kernels.attention_decode.cases").CASES
    for layer in ("e4b_sliding", "e4b_global"):
        c = cases[layer]
        kind = layer.removeprefix("e4b_")
        slots = c.window or 4096
        cache = _array((1, slots, c.kv_heads, c.head_dim))
        table = _array((1, 1, c.head_dim // 2), jnp.float32)
        qkv = _array((1, 1, (c.heads + c.own) * c.head_dim), jnp.float32)
        decode = (qkv, (table, table), (cache, cache), _array((1, 1), jnp.int32), c.heads)
        yield _Call("attention_decode", f"decode, {kind}", "bf16", decode)
        q = _array((1, _PROMPT, c.heads, c.head_dim))
        positions = [_array((1, n), jnp.int32) for n in (_PROMPT, slots)]
        yield _Call("attention", f"prefill, {kind}", "bf16", (q, cache, cache, *positions))


def _case(op: str, model: str) -> Any:
    """The first named shape of `op` that is of `model`."""
    cases = importlib.import_module(f"pallas_kernels.{op}.cases").REAL
    return next(case for name, case in cases.items() if name.startswith(model))


def _with_weight(op: str, name: str, weight_format: str, rows: int, c: Any) -> _Call:
    ids = _array((rows, getattr(c, "per_token", 1)), jnp.int32)
    scale = _array(ids.shape, jnp.float32)
    pairs = math.prod(ids.shape)
    shape, before, after = {
        "quantized_matmul": lambda: ((c.n, c.k), [_array((rows, c.k))], []),
        "gated_matmul": lambda: ((2 * c.f, c.k), [_array((rows, c.k))], [scale]),
        "gelu_matmul": lambda: (
            (c.n, c.k),
            [_array((rows, c.k))],
            [_array((rows, c.n), jnp.float32)],
        ),
        "argmax_matmul": lambda: ((c.n, c.k), [_array((rows, c.k))], []),
        "embedding_lookup": lambda: ((c.v, c.k), [], [_array((rows,), jnp.int32)]),
        "expert_matmul": lambda: (
            (c.e, c.n, c.k),
            [_array((pairs, c.k))],
            [_array((pairs,), jnp.int32)],
        ),
        "expert_gate_up": lambda: (
            (c.e, 2 * c.f, c.k),
            [_array((rows, c.k))],
            [ids, _array((rows,), jnp.float32)],
        ),
        "expert_down": lambda: ((c.e, c.n, c.f), [_array((*ids.shape, c.f))], [ids, scale]),
    }[op]()
    if weight_format not in FORMATS:
        return _Call(op, name, weight_format, (*before, _array(shape), *after))
    plain = FORMATS[weight_format].abstract(shape)
    reason = why_not_packed(FORMATS[weight_format], shape)
    packed = None if reason else (*before, PACKED[weight_format].abstract(shape), *after)
    return _Call(op, name, weight_format, (*before, plain, *after), packed, reason)


def _array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
