"""The part of a report that is about compiled programs: what `bench.static` counted and predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.plan import DECODE, OURS, median
from bench.tables import NOT_MEASURED, Sweep, megabytes, number, table

_KEYS = ("model", "format", "implementation", "target")


class Comparison(NamedTuple):
    """A predicted and a measured time of the same decode step, in microseconds."""

    entry: dict[str, Any]
    measured_us: float

    @property
    def error(self) -> float:
        """``predicted / measured - 1``."""
        return self.entry["predicted_us"] / self.measured_us - 1


def section(statics: Sequence[tuple[str, dict[str, Any]]], sweeps: Sequence[Sweep]) -> list[str]:
    """Lines for the files of `bench.static`, given with their names, compared with the sweeps."""
    lines = ["## Compiled programs: counts and predictions, not measurements", ""]
    decode = [entry for _, content in statics for entry in content["decode"]]
    prefill = [entry for _, content in statics for entry in content["prefill"]]
    for name, content in statics:
        made = content.get("environment", {})
        commit, versions = made.get("commit", "unknown"), made.get("versions", {})
        lines.append(f"- `{name}`: commit `{commit}`, JAX {versions.get('jax', 'unknown')}")
    lines += [
        "",
        "Counted in programs that were compiled for GPUs which were not there. The predicted time is a model: each",
        "kernel takes the longer of its bytes and its instructions, and a launch (`bench/prediction_model.py`).",
        "",
        "### Decode steps",
        "",
        *table(
            [
                *_KEYS,
                "batch",
                "depth",
                "kernels per layer",
                "bytes ÷ minimum",
                "temporaries, MB",
                "cache copies",
                "bytes µs",
                "instructions µs",
                "predicted µs",
                "predicted tokens/s",
            ],
            [_decode_row(entry) for entry in decode],
        ),
        "### Prefill chunks",
        "",
        *table(
            [*_KEYS, "tokens", "FLOPs ÷ minimum", "temporaries, MB"],
            [
                [
                    *(str(entry[key]) for key in _KEYS),
                    str(entry.get("tokens", "")),
                    # XLA does not count every program's operations.
                    f"{entry['flops'] / entry['flops_min']:.2f}"
                    if entry["flops"]
                    else NOT_MEASURED,
                    megabytes(entry["temp_bytes"]),
                ]
                for entry in prefill
            ],
        ),
        "### Error of the predictions",
        "",
    ]
    found = compare(decode, sweeps)
    if not found:
        return [*lines, "No card has run a case that was predicted.", ""]
    rows = [
        [
            *(str(c.entry[key]) for key in _KEYS),
            str(c.entry["batch"]),
            number(c.entry["predicted_us"]),
            number(c.measured_us),
            f"{c.error:+.0%}",
        ]
        for c in found
    ]
    head = [*_KEYS, "batch", "predicted µs", "measured µs", "error of the prediction"]
    return [*lines, *table(head, rows)]


def compare(decode: Sequence[dict[str, Any]], sweeps: Sequence[Sweep]) -> list[Comparison]:
    """Predictions of whole models beside measurements of the same step on the device that was the target."""
    found = []
    for entry in decode:
        for sweep in sweeps:
            if entry["target"].upper() not in sweep.device.upper():
                continue
            for r in sweep.results:
                same = all(r[key] == entry[key] for key in ("model", "format", "implementation"))
                same = same and (r["engine"], r["phase"]) == (OURS, DECODE) and "error" not in r
                if same and all(r[k] == entry.get(k, r[k]) for k in ("batch", "depth", "layers")):
                    found.append(Comparison(entry, 1e6 * median(r) / r["new_tokens"]))
    return found


def _decode_row(entry: dict[str, Any]) -> list[str]:
    return [
        *(str(entry[key]) for key in _KEYS),
        str(entry["batch"]),
        str(entry.get("depth", "")),
        f"{entry['kernels_per_layer']:.1f}",
        f"{entry['bytes_per_token'] / entry['bytes_min']:.2f}",
        megabytes(entry["temp_bytes"]),
        str(entry["cache_copies"]),
        number(entry["bytes_us"]),
        number(entry["instructions_us"]),
        number(entry["predicted_us"]),
        number(1e6 * entry["batch"] / entry["predicted_us"]),
    ]
