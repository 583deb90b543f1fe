"""Compiles for a GPU that is not there, and says what the compiled program will do.

``python -m bench.aot --target h200`` compiles every op, format and case for one target and prints a line for each:
kernels launched, bytes of arguments, results and temporaries. Without ``--target`` it does so for every target, each
in a process of its own, because JAX's kernel caches do not know which target a kernel was compiled for.

Needs the CUDA plugin of JAX's own version (``jax[cuda13-local]``), no NVIDIA library and no GPU. What it yields is
deterministic, with one caveat: nothing is autotuned without the device, so XLA's own matrix products are compiled with
whatever tiling comes first.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from bench import hlo
from pallas_kernels import embedding_lookup, expert_matmul, quantized_matmul
from pallas_kernels.arrays import FORMATS
from pallas_kernels.embedding_lookup import cases as embedding_cases
from pallas_kernels.expert_matmul import cases as expert_cases
from pallas_kernels.quantized_matmul import cases as matmul_cases
from pallas_kernels.target import compiling_for

TARGETS_FOLDER = Path(__file__).parent / "gpu_targets"
TARGETS = ("h200", "h100", "b200", "gb10")
WEIGHT_FORMATS = (*FORMATS, "bf16")

_target_of_this_process: str | None = None


class Program(NamedTuple):
    """What one compiled program does: sizes in bytes, time to compile in seconds."""

    kernels: int
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    seconds: float
    hlo: str


class Call(NamedTuple):
    """One op on abstract arguments; ``weights_read`` is the number of weights that it cannot do without."""

    name: str
    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...]
    weights_read: int


@functools.cache
def sharding(target: str) -> jax.sharding.NamedSharding:
    """Returns the replicated sharding on one device of ``target`` for abstract arguments.

    Raises:
        ValueError: unknown target.
        RuntimeError: another target was used in this process, or the CUDA plugin is missing.
    """
    global _target_of_this_process
    if target not in TARGETS:
        raise ValueError(f"target = {target!r}: expected one of {', '.join(TARGETS)}")
    if _target_of_this_process not in (None, target):
        raise RuntimeError(
            f"compiled for {_target_of_this_process} already: one process per target"
        )
    _target_of_this_process = target
    description = (TARGETS_FOLDER / f"{target}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description, topology="1x1x1"
        )
    except Exception as error:
        raise RuntimeError(
            "JAX cannot describe a CUDA device: it needs the plugin of its own version, for example "
            f"jax[cuda13-local]=={jax.__version__}, and the platform set to cpu where there is no GPU "
            "(JAX_PLATFORMS=cpu)"
        ) from error
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_for(
    target: str,
    function: Callable[..., Any],
    *arguments: Any,
    donate_argnums: tuple[int, ...] = (),
    compiler_options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles ``function`` for ``target``; arguments are pytrees of anything with shape and dtype.

    Raises:
        ValueError: unknown target.
        RuntimeError: another target was used in this process, or the CUDA plugin is missing.
    """
    placed = sharding(target)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), arguments
    )
    with compiling_for(compute_capability(target)):
        lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*abstract)
    return lowered.compile(compiler_options=compiler_options)


def compute_capability(target: str) -> str:
    """Of `target`, for example "9.0"."""
    description = (TARGETS_FOLDER / f"{target}.txtpb").read_text()
    found = re.search(r"cuda_compute_capability \{([^}]*)\}", description)
    assert found, target
    numbers = dict(re.findall(r"(major|minor): (\d+)", found[1]))
    return f"{numbers['major']}.{numbers.get('minor', '0')}"


def examine(target: str, function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles as :func:`compile_for` does and returns what the program does."""
    start = time.perf_counter()
    compiled = compile_for(target, function, *arguments)
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    return Program(
        kernels=sum(1 for _ in hlo.kernels(*hlo.parse(text))),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        seconds=seconds,
        hlo=text,
    )


def abstract_weight(shape: tuple[int, ...], format: str) -> Any:
    """Returns a weight of ``shape`` in one of ``WEIGHT_FORMATS`` as ``jax.ShapeDtypeStruct`` planes."""
    if format == "bf16":
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return FORMATS[format].abstract(shape)


def calls(format: str, *, small: bool = True, real: bool = True) -> Iterator[Call]:
    """Yields every op on every named case with weights in ``format`` and bf16 activations."""
    groups = [g for g, wanted in (("SMALL", small), ("REAL", real)) if wanted]
    for group in groups:
        for name, m in getattr(matmul_cases, group).items():
            for rows in matmul_cases.ROWS:
                x = jax.ShapeDtypeStruct((rows, m.k), jnp.bfloat16)
                w = abstract_weight((m.n, m.k), format)
                yield Call(f"quantized_matmul {name} M={rows}", quantized_matmul, (x, w), m.n * m.k)
        for name, t in getattr(embedding_cases, group).items():
            for rows in embedding_cases.ROWS:
                ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
                w = abstract_weight((t.v, t.k), format)
                label = f"embedding_lookup {name} M={rows}"
                yield Call(label, embedding_lookup, (w, ids), rows * t.k)
        for name, c in getattr(expert_cases, group).items():
            for rows in (c.per_token * tokens for tokens in expert_cases.TOKENS):
                x = jax.ShapeDtypeStruct((rows, c.k), jnp.bfloat16)
                ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
                w = abstract_weight((c.e, c.n, c.k), format)
                weights = min(rows, c.e) * c.n * c.k
                yield Call(f"expert_matmul {name} M={rows}", expert_matmul, (x, w, ids), weights)


def report(target: str, weight_format: str, call: Call) -> dict[str, Any]:
    """Compiles one call and returns what there is to say about it, ready for JSON.

    Raises:
        jax.errors.JaxRuntimeError: the call does not compile.
    """
    program = examine(target, call.function, *call.arguments)
    return {
        "target": target,
        "format": weight_format,
        "call": call.name,
        "weights_read": call.weights_read,
        **{name: value for name, value in program._asdict().items() if name != "hlo"},
    }


def main(argv: list[str] | None = None) -> int:
    """Prints a line per op, format and case; returns 1 if anything failed to compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, help="default: all, one process each")
    parser.add_argument("--only", default="", help="regular expression that the calls must match")
    parser.add_argument("--json", action="store_true", help="print JSON objects, sizes in bytes")
    options = parser.parse_args(argv)
    if options.target is None:
        command = [sys.executable, "-m", "bench.aot", "--only", options.only]
        command += ["--json"] if options.json else []
        runs = [subprocess.run([*command, "--target", t], check=False) for t in TARGETS]
        return max(run.returncode for run in runs)
    # Otherwise the CUDA plugin looks for a driver and NVIDIA's libraries, and gives up without them.
    jax.config.update("jax_platforms", "cpu")
    failures = 0
    for weight_format in WEIGHT_FORMATS:
        for call in calls(weight_format):
            if not re.search(options.only, call.name):
                continue
            label = f"{options.target:5} {weight_format:6} {call.name:44}"
            try:
                line = report(options.target, weight_format, call)
            except jax.errors.JaxRuntimeError as error:
                failures += 1
                print(f"{label} FAILED: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                continue
            megabytes = {k: v / 1e6 for k, v in line.items() if k.endswith("_bytes")}
            text = (
                f"{label} {line['kernels']:3} kernels, arguments {megabytes['argument_bytes']:8.2f} MB, "
                f"temporaries {megabytes['temp_bytes']:8.3f} MB, compiled in {line['seconds']:.1f} s"
            )
            print(json.dumps(line) if options.json else text, flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
