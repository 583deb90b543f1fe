"""Prefill and decode speed of the bundled models on this machine.

    python -m bench.bundled [--json FILE]

Prints medians of `--samples` runs after one warm-up; the JSON keeps every sample and what it was measured on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import gemma_jax
from bench.environment import environment
from gemma_jax.checkpoints import BUNDLED

FORMATS = ("bf16", "eq8_0", "q4k")
PROMPT, NEW = 256, 128


def measure(lm: gemma_jax.LanguageModel, samples: int) -> dict[str, list[float]]:
    """Seconds of prefilling `PROMPT` tokens and of generating `NEW` more, batch 1, greedy, EOS ignored."""
    tokens = jax.random.randint(jax.random.key(0), (1, PROMPT), 300, lm.config.vocab_size)
    lengths = jnp.array([PROMPT])
    greedy = gemma_jax.stack_sampling(
        [gemma_jax.Sampling(ignore_eos=True)], max_new_tokens=NEW, vocab_size=lm.config.vocab_size
    )

    def prefill() -> jax.Array:
        cache = gemma_jax.init_cache(lm.config, 1, PROMPT + NEW, lm.model.dtype)
        return gemma_jax.prefill(lm.params, tokens, lengths, cache, model=lm.model)[0]

    def generate() -> jax.Array:
        return gemma_jax.generate(
            lm.params, tokens, lengths, greedy, model=lm.model, max_new_tokens=NEW
        ).tokens

    def seconds(run: Any) -> float:
        begin = time.perf_counter()
        run().block_until_ready()
        return time.perf_counter() - begin

    out: dict[str, list[float]] = {}
    for name, run in (("prefill", prefill), ("generate", generate)):
        seconds(run)  # compiles
        out[name] = [seconds(run) for _ in range(samples)]
    return out


def rates(timings: dict[str, list[float]]) -> tuple[float, float]:
    """Median prefill and decode rates in tokens per second."""
    prefill = statistics.median(timings["prefill"])
    decode = statistics.median(timings["generate"]) - prefill
    return PROMPT / prefill, (NEW - 1) / decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the raw samples")
    parser.add_argument("--samples", type=int, default=5, help="measured runs of every case")
    options = parser.parse_args()
    results = []
    print(
        f"{'model':12} {'format':7} {'bits/weight':>11} {'prefill tok/s':>14} {'decode tok/s':>13}"
    )
    for model in BUNDLED:
        for format in FORMATS:
            lm = gemma_jax.load(model, format=format)
            timings = measure(lm, options.samples)
            leaves = jax.tree.leaves(lm.params, is_leaf=lambda x: hasattr(x, "bits_per_weight"))
            bits = 8 * sum(x.nbytes for x in leaves) / sum(_size(x) for x in leaves)
            prefill, decode = rates(timings)
            print(f"{model:12} {format:7} {bits:11.2f} {prefill:14.0f} {decode:13.0f}", flush=True)
            results.append(
                {"model": model, "format": format, "bits_per_weight": bits, "seconds": timings}
            )
    if options.json:
        report = {
            "benchmark": "bundled",
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "environment": environment(),
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _size(weight: Any) -> int:
    size = 1
    for n in weight.shape:
        size *= n
    return size


if __name__ == "__main__":
    main()
