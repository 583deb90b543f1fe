"""What decode and prefill will do on GPUs that are not here, read from the compiled programs.

    python -m bench.static --json FILE [--model e4b …] [--format q4k …] [--target h200 …] [--batch 1 …]

Compiles the greedy decode loop and one prefill chunk of the published architectures in their true shapes, with abstract
weights (no memory needed), and counts kernels, bytes, temporaries and copies of the cache. Deterministic, with two
caveats: nothing is autotuned without the device, so XLA's own matrix products have the first tiling that comes, and a
prefill's loops over key blocks, whose trip counts are known at run time only, are counted once.

`predicted_us` is a model, not a measurement: every kernel takes the time of its bytes at the target's bandwidth plus
`LAUNCH_SECONDS`. It leaves out instructions, so it is optimistic where they bind a kernel. No card has checked it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import aot, hlo
from bench.environment import environment
from bench.published import published
from bench.random_weights import abstract_params
from gemma_jax import xla_flags
from gemma_jax.cache import KVCache, init_cache
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import PREFILL_CHUNK, decode_step, prefill
from gemma_jax.model import Gemma4, Params, param_shapes
from pallas_kernels.arrays import QuantizedArray

MODELS = ("e2b", "e4b", "26b_a4b", "31b")
WEIGHT_FORMATS = ("bf16", "eq8_0", "q4k")
IMPLEMENTATIONS = ("xla",)
DEPTH = 512  # positions in the cache: its capacity, all filled

# Bytes per second. A device-to-device copy on an H200 reaches 4.3 of its 4.8 TB/s; the others are taken to reach the
# same share of theirs.
_COPY_SHARE = 4.3 / 4.8
BANDWIDTH = {
    target: nominal * _COPY_SHARE
    for target, nominal in {"h200": 4.8e12, "h100": 3.35e12, "b200": 8e12, "gb10": 0.273e12}.items()
}
LAUNCH_SECONDS = 2e-6


def decode_loop(
    params: Params, cache: KVCache, token: jax.Array, steps: jax.Array, *, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    """`steps` greedy tokens of every row in one `lax.while_loop`: what the accounting is of."""
    active = jnp.ones(token.shape, bool)

    def one_token(carry: tuple[jax.Array, jax.Array, KVCache]) -> Any:
        i, token, cache = carry
        logits, cache = decode_step(params, token, active, cache, model=model)
        return i + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    carry = (jnp.int32(0), token, cache)
    _, token, cache = jax.lax.while_loop(lambda carry: carry[0] < steps, one_token, carry)
    return token, cache


def decode_entry(
    config: Gemma4Config, weight_format: str, implementation: str, target: str, batch: int
) -> dict[str, Any]:
    """Compiles the decode loop and accounts for one turn of it; bytes are per token of one row."""
    model = Gemma4(config, jnp.bfloat16, implementation)
    params = abstract_params(config, weight_format)
    cache = jax.eval_shape(lambda: init_cache(config, batch, DEPTH))
    begin = time.perf_counter()
    program = aot.compile_for(
        target,
        lambda *args: decode_loop(*args, model=model),
        params,
        cache,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        donate_argnums=(1,),
    )
    seconds = time.perf_counter() - begin
    module, entry = hlo.parse(_text(program))
    [(body, _)] = hlo.while_bodies(module, entry)
    kernels = list(hlo.kernels(module, body))
    layer_bytes = {math.prod(x.shape) * x.dtype.itemsize for kv in cache.layers for x in kv}
    moved = sum(k.bytes for k in kernels)
    return {
        "batch": batch,
        "depth": DEPTH,
        "kernels": len(kernels),
        "kernels_per_layer": len(kernels) / config.num_layers,
        "bytes_per_token": moved / batch,
        "bytes_min": decode_bytes_min(config, params, batch) / batch,
        "temp_bytes": _memory(program).temp_size_in_bytes,
        "cache_copies": sum(
            k.op.startswith("copy") and hlo.size(k.shape) in layer_bytes for k in kernels
        ),
        "predicted_us": 1e6 * (moved / BANDWIDTH[target] + LAUNCH_SECONDS * len(kernels)),
        "compile_seconds": seconds,
    }


def decode_bytes_min(
    config: Gemma4Config, params: Params, batch: int, *, depth: int = DEPTH, itemsize: int = 2
) -> int:
    """Bytes that one decode step of `batch` rows must read: each matrix once, each row's keys and values once a layer.

    Every row has `depth` positions in the cache, whose elements have `itemsize` bytes.
    Of experts, those that `batch` rows choose if no two choose the same; of tables that are only looked up, nothing.
    """
    total = 0
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )
    for path, leaf in leaves:
        names = [key.key for key in path]
        nbytes = (
            leaf.nbytes
            if isinstance(leaf, QuantizedArray)
            else math.prod(leaf.shape) * leaf.dtype.itemsize
        )
        if names == ["ple", "embedding"]:
            continue
        if len(leaf.shape) == 3:
            chosen = min(batch * config.num_experts_per_token, config.num_experts)
            nbytes = nbytes * chosen // config.num_experts
        total += nbytes
    for i in range(config.num_layers):
        positions = depth if config.is_global(i) else min(depth, config.sliding_window)
        total += batch * positions * 2 * config.kv_heads_of(i) * config.head_dim_of(i) * itemsize
    return total


def prefill_entry(
    config: Gemma4Config, weight_format: str, implementation: str, target: str
) -> dict[str, Any]:
    """Compiles the prefill of one chunk of one row."""
    model = Gemma4(config, jnp.bfloat16, implementation)
    params = abstract_params(config, weight_format)
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
    # XLA does not analyse the cost of programs for absent GPUs; it does for what they are compiled from.
    cost: Any = prefill.lower(*arguments, model=model).cost_analysis()
    return {
        "batch": 1,
        "tokens": PREFILL_CHUNK,
        "flops": cost["flops"],
        "flops_min": prefill_flops_min(config, PREFILL_CHUNK),
        "temp_bytes": _memory(program).temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def prefill_flops_min(config: Gemma4Config, tokens: int) -> int:
    """Multiply-adds, twice, of the matrices over `tokens` positions, the KV-shared layers and the head over one."""
    total = 0
    for path, leaf in param_shapes(config).items():
        if len(leaf.shape) < 2 or path == "ple/embedding":
            continue
        weights = math.prod(leaf.shape)
        if len(leaf.shape) == 3:
            weights = weights * config.num_experts_per_token // config.num_experts
        layer = path.split("/")[0]
        shared = layer.startswith("layers_") and config.is_kv_shared(
            int(layer.removeprefix("layers_"))
        )
        total += 2 * weights * (1 if shared or layer == "embed" else tokens)
    return total


def _text(program: jax.stages.Compiled) -> str:
    text = program.as_text()
    if text is None:
        raise RuntimeError("this backend does not show its optimised programs")
    return text


def _memory(program: jax.stages.Compiled) -> Any:
    return program.memory_analysis()


def report(options: argparse.Namespace, target: str) -> dict[str, list[dict[str, Any]]]:
    """All entries of one target, printed as they come."""
    out: dict[str, list[dict[str, Any]]] = {"decode": [], "prefill": [], "kernels": []}
    for name in options.model:
        config = published(name, options.layers)
        for weight_format in options.format:
            for implementation in IMPLEMENTATIONS:
                what = {
                    "model": name,
                    "layers": config.num_layers,
                    "format": weight_format,
                    "implementation": implementation,
                    "target": target,
                }
                for batch in options.batch:
                    entry = decode_entry(config, weight_format, implementation, target, batch)
                    out["decode"].append(what | entry)
                    print(
                        f"{target} {name} {weight_format} batch {batch}: "
                        f"{entry['kernels_per_layer']:.1f} kernels a layer, "
                        f"{entry['bytes_per_token'] / 1e6:.0f} MB a token "
                        f"({entry['bytes_per_token'] / entry['bytes_min']:.2f} of the minimum), "
                        f"{entry['temp_bytes'] / 1e6:.1f} MB of temporaries, "
                        f"{entry['cache_copies']} cache copies, "
                        f"predicted {entry['predicted_us']:.0f} us; "
                        f"compiled in {entry['compile_seconds']:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
                if not options.no_prefill:
                    entry = prefill_entry(config, weight_format, implementation, target)
                    out["prefill"].append(what | entry)
                    print(
                        f"{target} {name} {weight_format} prefill of {entry['tokens']}: "
                        f"{entry['flops'] / 1e9:.0f} GFLOP ({entry['flops'] / entry['flops_min']:.2f} of the minimum), "
                        f"{entry['temp_bytes'] / 1e6:.0f} MB of temporaries; "
                        f"compiled in {entry['compile_seconds']:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    if not options.no_kernels:
        from bench import static_kernels  # which imports this module

        out["kernels"] += static_kernels.entries(target)
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs one process per target, because JAX's kernel caches do not know the target, and merges what they print."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the entries; default: stdout")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--format", nargs="+", choices=WEIGHT_FORMATS, default=WEIGHT_FORMATS)
    parser.add_argument("--target", nargs="+", choices=aot.TARGETS, default=aot.TARGETS)
    parser.add_argument("--batch", nargs="*", type=int, default=[1], help="none: prefill only")
    parser.add_argument("--layers", type=int, help="only the first layers, for a quick look")
    parser.add_argument("--no-prefill", action="store_true", help="decode only")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the hand kernels")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = xla_flags.with_defaults(os.environ.get("XLA_FLAGS", ""))
    merged: dict[str, Any] = {"decode": [], "prefill": [], "kernels": []}
    if len(options.target) == 1:
        merged = report(options, options.target[0])
    else:
        rest = sys.argv[1:] if argv is None else argv
        for target in options.target:
            done = subprocess.run(
                [sys.executable, "-m", "bench.static", *_without(rest), "--target", target],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                return done.returncode
            for key, entries in json.loads(done.stdout).items():
                if key in ("decode", "prefill", "kernels"):
                    merged[key] += entries
    merged["environment"] = environment()
    text = json.dumps(merged, indent=1) + "\n"
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    else:
        print(text)
    return 0


def _without(arguments: list[str]) -> list[str]:
    """The arguments less ``--target …`` and ``--json FILE``."""
    kept, skipping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            skipping = argument.split("=")[0] in ("--target", "--json")
        if not skipping:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main())
