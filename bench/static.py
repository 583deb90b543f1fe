"""What decode and prefill will do on GPUs that are not here, read from the compiled programs.

    python -m bench.static --json FILE [--model e4b …] [--format q4k …] [--target h200 …] [--batch 1 …]

Compiles the greedy decode loop and one prefill chunk of the published architectures in their true shapes, with abstract
weights (no memory needed), and counts kernels, bytes, instructions, temporaries and copies of the cache. Deterministic,
with two caveats: nothing is autotuned without the device, so XLA's own matrix products have the first tiling, and a
prefill's loops over key blocks, whose trip counts are known at run time only, are counted once.

FILE is written after every entry and completed where it ended, if the commit and the versions are the same.

`predicted_us` is a model of bytes, instructions and launches, `bench.prediction_model`; no card has checked it. Of hand
kernels (implementation "mosaic", packed weights) it has bytes and launches only: their instructions are in the entries
under "kernels", from `bench.static_kernels`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import aot, hlo, ptx
from bench.environment import environment
from bench.least_work import decode_bytes_min, prefill_flops_min
from bench.prediction_model import device, predict
from bench.published import published
from bench.random_weights import abstract_params
from gemma_jax import xla_flags
from gemma_jax.cache import KVCache, init_cache
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import PREFILL_CHUNK, greedy_step, prefill
from gemma_jax.model import Gemma4, Params
from gemma_jax.parameters import pack_params
from pallas_kernels.packed import PackedArray

MODELS = ("e2b", "e4b", "26b_a4b", "31b")
WEIGHT_FORMATS = ("bf16", "eq8_0", "q4k")
IMPLEMENTATIONS = ("xla", "mosaic")
DEPTH = 512  # positions in the cache: its capacity, all filled


def decode_loop(
    params: Params, cache: KVCache, token: jax.Array, steps: jax.Array, *, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    """`steps` greedy tokens of every row in one `lax.while_loop`: what the accounting is of."""
    active = jnp.ones(token.shape, bool)

    def one_token(carry: tuple[jax.Array, jax.Array, KVCache]) -> Any:
        i, token, cache = carry
        token, cache = greedy_step(params, token, active, cache, model=model)
        return i + 1, token, cache

    carry = (jnp.int32(0), token, cache)
    _, token, cache = jax.lax.while_loop(lambda carry: carry[0] < steps, one_token, carry)
    return token, cache


def _served(config: Gemma4Config, weight_format: str, implementation: str) -> tuple[Gemma4, Params]:
    """The decoder, and its parameters as that implementation wants them: hand kernels in fragment order."""
    params = abstract_params(config, weight_format)
    if implementation == "xla":
        return Gemma4(config, jnp.bfloat16, implementation), params
    return Gemma4(config, jnp.bfloat16, (implementation, "xla")), jax.eval_shape(
        pack_params, params
    )


def _left_alone(config: Gemma4Config, params: Params, implementation: str, batch: int) -> int:
    """Bytes of experts that no row chooses: operands of hand kernels, which do not read them."""
    if implementation == "xla" or not config.num_experts:
        return 0
    whole = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, PackedArray))
    planes = jax.tree.leaves([x for x in whole if len(x.shape) == 3])
    experts = sum(math.prod(plane.shape) * plane.dtype.itemsize for plane in planes)
    chosen = min(batch * config.num_experts_per_token, config.num_experts)
    return experts * (config.num_experts - chosen) // config.num_experts


def decode_entry(
    config: Gemma4Config, weight_format: str, implementation: str, target: str, batch: int
) -> dict[str, Any]:
    """Compiles the decode loop and accounts for one turn of it; bytes are per token of one row."""
    model, params = _served(config, weight_format, implementation)
    cache = jax.eval_shape(lambda: init_cache(config, batch, DEPTH))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        program = aot.compile_for(
            target,
            lambda *args: decode_loop(*args, model=model),
            params,
            cache,
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
            donate_argnums=(1,),
            compiler_options=ptx.dump_options(Path(folder)),
        )
        seconds = time.perf_counter() - begin
        launches = ptx.launches(Path(folder))
    module, entry = hlo.parse(_text(program))
    [(body, _)] = hlo.while_bodies(module, entry)
    kernels = list(hlo.kernels(module, body))
    layer_bytes = {math.prod(x.shape) * x.dtype.itemsize for kv in cache.layers for x in kv}
    left_alone = _left_alone(config, params, implementation, batch)
    moved = sum(k.bytes for k in kernels) - left_alone
    issued = sum(launches[k.name].instructions for k in kernels if k.name in launches)
    prediction = predict(kernels, launches, target)
    not_moving = left_alone / device(target).bandwidth
    return {
        "batch": batch,
        "depth": DEPTH,
        "kernels": len(kernels),
        "kernels_per_layer": len(kernels) / config.num_layers,
        "bytes_per_token": moved / batch,
        "bytes_min": decode_bytes_min(
            config, abstract_params(config, weight_format), batch, depth=DEPTH
        )
        / batch,
        "temp_bytes": _memory(program).temp_size_in_bytes,
        "cache_copies": sum(
            k.op.startswith("copy") and hlo.size(k.shape) in layer_bytes for k in kernels
        ),
        "instructions_per_token": issued / batch,
        "bytes_us": 1e6 * (prediction.bytes_seconds - not_moving),
        "instructions_us": 1e6 * prediction.instruction_seconds,
        "predicted_us": 1e6 * (prediction.seconds - not_moving),
        "compile_seconds": seconds,
    }


def prefill_entry(
    config: Gemma4Config, weight_format: str, implementation: str, target: str
) -> dict[str, Any]:
    """Compiles the prefill of one chunk of one row."""
    model, params = _served(config, weight_format, implementation)
    cache = jax.eval_shape(lambda: init_cache(config, 1, PREFILL_CHUNK))
    arguments = (
        params,
        jax.ShapeDtypeStruct((1, PREFILL_CHUNK), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        cache,
    )
    begin = time.perf_counter()
    program = aot.compile_for(
        target, lambda *args: prefill(*args, model=model), *arguments, donate_argnums=(3,)
    )
    seconds = time.perf_counter() - begin
    # XLA does not analyse the cost of programs for absent GPUs; it does for what they are compiled from, and of hand
    # kernels for what they stand for.
    model, params = _served(config, weight_format, "xla")
    cost: Any = prefill.lower(params, *arguments[1:], model=model).cost_analysis()
    return {
        "batch": 1,
        "tokens": PREFILL_CHUNK,
        "flops": cost["flops"],
        "flops_min": prefill_flops_min(config, PREFILL_CHUNK),
        "temp_bytes": _memory(program).temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def _text(program: jax.stages.Compiled) -> str:
    text = program.as_text()
    if text is None:
        raise RuntimeError("this backend does not show its optimised programs")
    return text


def _memory(program: jax.stages.Compiled) -> Any:
    return program.memory_analysis()


def new_entries(
    options: argparse.Namespace, target: str, content: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind of entry, entry) of what `content` has not got yet for one target, printed as they come."""
    for name, weight_format, implementation in itertools.product(
        options.model, options.format, options.implementation
    ):
        config = published(name, options.layers)
        what: dict[str, Any] = {
            "model": name,
            "layers": config.num_layers,
            "format": weight_format,
            "implementation": implementation,
            "target": target,
        }
        arguments = (config, weight_format, implementation, target)
        for batch in options.batch:
            if not _has(content["decode"], what | {"batch": batch}):
                entry = what | decode_entry(*arguments, batch)
                print(_decode_line(entry), file=sys.stderr, flush=True)
                yield "decode", entry
        if not options.no_prefill and not _has(content["prefill"], what):
            entry = what | prefill_entry(*arguments)
            print(_prefill_line(entry), file=sys.stderr, flush=True)
            yield "prefill", entry
    if not options.no_kernels:
        from bench import static_kernels  # which imports this module

        for entry in static_kernels.entries(target, without=content["kernels"]):
            yield "kernels", entry


def _has(entries: list[dict[str, Any]], what: dict[str, Any]) -> bool:
    return any(entry.items() >= what.items() for entry in entries)


def _decode_line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['target']} {entry['model']} {entry['format']} batch {entry['batch']}: "
        f"{entry['kernels_per_layer']:.1f} kernels a layer, "
        f"{entry['bytes_per_token'] / 1e6:.0f} MB a token "
        f"({entry['bytes_per_token'] / entry['bytes_min']:.2f} of the minimum), "
        f"{entry['temp_bytes'] / 1e6:.1f} MB of temporaries, "
        f"{entry['cache_copies']} cache copies, "
        f"bytes {entry['bytes_us']:.0f} us, instructions {entry['instructions_us']:.0f} us, "
        f"predicted {entry['predicted_us']:.0f} us; "
        f"compiled in {entry['compile_seconds']:.0f} s"
    )


def _prefill_line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['target']} {entry['model']} {entry['format']} prefill of {entry['tokens']}: "
        f"{entry['flops'] / 1e9:.0f} GFLOP ({entry['flops'] / entry['flops_min']:.2f} of the minimum), "
        f"{entry['temp_bytes'] / 1e6:.0f} MB of temporaries; "
        f"compiled in {entry['compile_seconds']:.0f} s"
    )


def _begun(path: Path) -> dict[str, Any]:
    """What `path` has, if it was made by this commit with these versions.

    Raises:
      ValueError: it was not.
    """
    here = environment()
    if not path.exists():
        return {"decode": [], "prefill": [], "kernels": [], "environment": here}
    content = json.loads(path.read_text())
    made = content["environment"]
    if any(made[key] != here[key] for key in ("commit", "versions", "uncommitted_changes")):
        raise ValueError(f"{path} is of commit {made['commit']} or other versions: delete it first")
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Runs one process per target, because JAX's kernel caches do not know the target, each adding to the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="file to begin or to complete")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--format", nargs="+", choices=WEIGHT_FORMATS, default=WEIGHT_FORMATS)
    parser.add_argument("--target", nargs="+", choices=aot.TARGETS, default=aot.TARGETS)
    parser.add_argument("--batch", nargs="*", type=int, default=[1], help="none: prefill only")
    parser.add_argument("--layers", type=int, help="only the first layers, for a quick look")
    parser.add_argument(
        "--implementation", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS
    )
    parser.add_argument("--no-prefill", action="store_true", help="decode only")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the hand kernels")
    options = parser.parse_args(argv)
    if len(options.target) > 1:
        command = [sys.executable, "-m", "bench.static", *(sys.argv[1:] if argv is None else argv)]
        for target in options.target:
            done = subprocess.run([*command, "--target", target], check=False)
            if done.returncode:
                return done.returncode
        return 0
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = xla_flags.with_defaults(os.environ.get("XLA_FLAGS", ""))
    try:
        content = _begun(options.json)
    except ValueError as error:
        parser.error(str(error))
    for kind, entry in new_entries(options, options.target[0], content):
        content[kind].append(entry)
        _write(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
