"""Many requests at once: `gemma_jax.Engine` against concurrency, static batches, and without its prefix cache.

    python -m bench.batch [--json FILE] [--plot FILE.svg] [--model tiny-dense] [--slots 1 2 4 8]

Prompts are of random tokens and of random lengths, continuations of random lengths too; EOS is ignored. Every case runs
once to compile and then `--samples` times. Latencies are from the moment the engine pulls a request to its result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gemma_jax
from bench.environment import environment
from bench.measure import load_weights
from gemma_jax import Engine, Gemma4, LanguageModel, Request, Sampling
from gemma_jax.checkpoints import BUNDLED

CONTEXT, CHUNK, PAGE = 512, 64, 32
LONGEST_PROMPT, LONGEST_CONTINUATION = 128, 64
SHARED = 256  # tokens of the system prompt


def requests(count: int, vocab_size: int, *, shared: int = 0) -> list[Request]:
    """`count` ragged requests, the first `shared` tokens of all prompts the same."""
    rng = np.random.default_rng(0)
    system = rng.integers(300, vocab_size, shared).tolist()
    lengths = rng.integers(8, LONGEST_PROMPT + 1, count)
    news = rng.integers(8, LONGEST_CONTINUATION + 1, count)
    return [
        Request(
            (*system, *rng.integers(300, vocab_size, int(length)).tolist()),
            Sampling(ignore_eos=True),
            int(new),
            key=i,
        )
        for i, (length, new) in enumerate(zip(lengths, news, strict=True))
    ]


def run(engine: Engine, work: Sequence[Request]) -> dict[str, Any]:
    """Seconds, tokens, and the latency of every request."""
    pulled: dict[int, float] = {}
    latencies = []

    def feed() -> Iterator[Request]:
        for request in work:
            pulled[request.key] = time.perf_counter()
            yield request

    before = vars(engine.statistics).copy()
    begin = time.perf_counter()
    for result in engine.run(feed()):
        if result.error is not None:
            raise ValueError(result.error)
        latencies.append(time.perf_counter() - pulled[result.request.key])
    seconds = time.perf_counter() - begin
    counted = {k: v - before[k] for k, v in vars(engine.statistics).items()}
    return {"seconds": seconds, "latencies": latencies, **counted}


def static(lm: LanguageModel, work: Sequence[Request], rows: int) -> dict[str, Any]:
    """The same in batches of `rows` in the order of arrival, each as long as its longest row."""
    begin = time.perf_counter()
    generated, latencies = 0, []
    for first in range(0, len(work), rows):
        batch = work[first : first + rows]
        settings = [Sampling(ignore_eos=True, max_new_tokens=r.max_new_tokens) for r in batch]
        done = lm.generate(
            [list(r.prompt) for r in batch], settings, max_new_tokens=LONGEST_CONTINUATION
        )
        generated += sum(len(d.tokens) for d in done)
        latencies += [time.perf_counter() - begin] * len(batch)
    return {
        "seconds": time.perf_counter() - begin,
        "generated": generated,
        "latencies": latencies,
    }


class _NoText:
    """What `LanguageModel` needs of a tokenizer to generate from ids."""

    def decode(self, tokens: Sequence[int]) -> str:
        return ""


def loaded(model: str, weight_format: str) -> LanguageModel:
    """A bundled model, or one of `bench/configs` with random weights."""
    if model in BUNDLED:
        return gemma_jax.load(model, format=weight_format)
    config, params = load_weights(model, weight_format)
    tokenizer: Any = _NoText()
    return LanguageModel(Gemma4(config), params, tokenizer)


def measure(
    lm: LanguageModel, slots: Sequence[int], count: int, samples: int
) -> list[dict[str, Any]]:
    """All cases: name, slots, and the samples of each."""
    vocab_size = lm.config.vocab_size
    work = requests(count, vocab_size)
    shared = requests(count, vocab_size, shared=SHARED)
    results: list[dict[str, Any]] = []

    def add(name: str, rows: int, sample: Any) -> None:
        sample()
        taken = [sample() for _ in range(samples)]
        results.append({"case": name, "slots": rows, "samples": taken})
        rate = statistics.median(t["generated"] / t["seconds"] for t in taken)
        p50, p95 = np.percentile([x for t in taken for x in t["latencies"]], [50, 95])
        print(f"{name:22} {rows:5} {rate:12.1f} {p50:10.2f} {p95:10.2f}", flush=True)

    print(f"{'case':22} {'slots':>5} {'output tok/s':>12} {'p50 s':>10} {'p95 s':>10}")
    for rows in slots:
        engine = new_engine(lm, rows, snapshots=0)
        add("continuous", rows, lambda engine=engine: run(engine, work))
    most = max(slots)
    add("static", most, lambda: static(lm, work, most))
    add("static", 1, lambda: static(lm, work, 1))
    engine = new_engine(lm, most, snapshots=0)
    add("shared, no prefix cache", most, lambda: run(engine, shared))
    # A new engine each time, so that nothing is known beforehand.
    add("shared, prefix cache", most, lambda: run(new_engine(lm, most), shared))
    return results


def new_engine(lm: LanguageModel, slots: int, **options: Any) -> Engine:
    """An engine with the sizes of this benchmark."""
    return Engine(
        lm.model,
        lm.params,
        slots=slots,
        context=CONTEXT,
        chunk=CHUNK,
        page_size=PAGE,
        **options,
    )


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Output tokens/s and median latency against the number of slots, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from bench.plots import STYLE, svg

    rows = [r for r in results if r["case"] == "continuous"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3), layout="constrained")
        rate, latency = figure.subplots(1, 2)
        slots = [r["slots"] for r in rows]
        rates = [
            statistics.median(s["generated"] / s["seconds"] for s in r["samples"]) for r in rows
        ]
        rate.plot(slots, rates, "o-")
        rate.set(xlabel="slots", ylabel="output tokens/s", ylim=(0, None))
        for percentile in (50, 95):
            values = [
                np.percentile([x for s in r["samples"] for x in s["latencies"]], percentile)
                for r in rows
            ]
            latency.plot(slots, values, "o-", label=f"p{percentile}")
        latency.set(xlabel="slots", ylabel="latency, s", ylim=(0, None))
        latency.legend()
        path.write_bytes(svg(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the raw samples")
    parser.add_argument("--plot", type=Path, help="where to write a plot of them")
    parser.add_argument("--model", default="tiny-dense", help="bundled, or of bench/configs")
    parser.add_argument("--format", default="q4k", help="of the weights")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--samples", type=int, default=3, help="measured runs of every case")
    options = parser.parse_args()
    lm = loaded(options.model, options.format)
    results = measure(lm, options.slots, options.requests, options.samples)
    if options.json:
        report = {
            "benchmark": "batch",
            "settings": {
                "model": options.model,
                "format": options.format,
                "requests": options.requests,
                "context": CONTEXT,
                "chunk": CHUNK,
                "page_size": PAGE,
                "longest_prompt": LONGEST_PROMPT,
                "longest_continuation": LONGEST_CONTINUATION,
                "shared_prompt": SHARED,
            },
            "environment": environment(),
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
