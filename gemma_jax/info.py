"""What `gemma-jax info` prints: architecture, formats, sizes, and memory at a given context."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from convert.load import Description, describe
from convert.manifest import TensorEntry
from convert.policy import AS_STORED, FORMATS, format_of
from gemma_jax.cache import cache_bytes
from gemma_jax.config import Gemma4Config
from gemma_jax.tables import pairs, size, table
from pallas_kernels.arrays import FORMATS as QUANTIZED

_CONTEXTS = (4096, 32768, 131072)
# `gemma_jax.load` keeps the cache in the type of the activations, bfloat16 unless told otherwise.
CACHE_ITEMSIZE = 2


def report(folder: str | Path, *, context: int | None = None, batch: int = 1) -> str:
    """Describes a checkpoint from its headers alone; no weight is loaded.

    Args:
        folder: converted or Hugging Face folder, or a hub id.
        context: positions per row to plan memory for; some usual ones by default.
        batch: rows to plan for.

    Returns:
        Text of several lines. Memory is that of the weights plus `gemma_jax.cache.cache_bytes`;
        the work space of the programs comes on top.

    Raises:
        ValueError: for a context or batch the model cannot have; as for `convert.load.describe`.
    """
    found = describe(folder)
    config, manifest = found.config, found.manifest
    longest = config.max_position_embeddings
    if context is not None and not 1 <= context <= longest:
        raise ValueError(f"--context: {context} given, 1 to {longest} accepted by this model")
    if batch < 1:
        raise ValueError(f"--batch: {batch} given, 1 or more accepted")
    contexts = [context] if context else sorted({min(c, longest) for c in _CONTEXTS})
    lines = [
        f"{folder}: {'converted' if found.converted else 'Hugging Face checkpoint'}",
        *pairs(_architecture(config)),
        "",
        *pairs(
            [
                ("parameters", f"{manifest.parameters:,}"),
                ("format", manifest.format),
                ("size", size(manifest.nbytes)),
                ("bits per weight", f"{manifest.bits_per_weight:.3f}"),
            ]
        ),
        "",
        *table(_per_format(manifest.tensors.values())),
        *_conversions(found),
        "",
        f"memory with a bfloat16 cache, {batch} row{'s' * (batch > 1)}, without work space:",
        *table(_memory(config, manifest.nbytes, contexts, batch)),
    ]
    return "\n".join(lines)


def _architecture(config: Gemma4Config) -> list[tuple[str, str]]:
    layers = config.num_layers
    total = sum(map(config.is_global, range(layers)))
    shared = f", last {config.num_kv_shared_layers} share K/V" * bool(config.num_kv_shared_layers)
    rows = [
        ("layers", f"{layers}, {total} of them global{shared}"),
        ("hidden size", f"{config.hidden_size}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.max_position_embeddings:,}, window {config.sliding_window:,}"),
    ]
    if config.ple_size:
        rows.append(("per-layer input", f"{config.ple_size}"))
    if config.num_experts:
        rows.append(("experts", f"{config.num_experts}, {config.num_experts_per_token} a token"))
    return rows


def _per_format(entries: Iterable[TensorEntry]) -> list[Sequence[str]]:
    """A row per number format, with the largest relative error among its tensors."""
    groups: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.format, []).append(entry)
    rows: list[Sequence[str]] = [
        ("format", "tensors", "parameters", "size", "bits/weight", "worst error")
    ]
    for name, members in groups.items():
        parameters = sum(entry.size for entry in members)
        nbytes = sum(entry.nbytes for entry in members)
        worst = max(entry.relative_error for entry in members)
        rows.append(
            (
                name,
                f"{len(members)}",
                f"{parameters:,}",
                size(nbytes),
                f"{8 * nbytes / parameters:.3f}",
                f"{worst:.4f}" if worst else "-",
            )
        )
    return rows


def _conversions(found: Description) -> list[str]:
    """What a Hugging Face checkpoint would become in each format."""
    if found.converted:
        return []
    entries = found.manifest.tensors
    rows: list[Sequence[str]] = [("converted to", "size", "bits/weight")]
    for name in FORMATS:
        nbytes = sum(_converted_bytes(path, entry, name) for path, entry in entries.items())
        bits = 8 * nbytes / found.manifest.parameters
        rows.append((name, size(nbytes), f"{bits:.3f}"))
    return ["", *table(rows)]


def _converted_bytes(path: str, entry: TensorEntry, name: str) -> int:
    chosen = format_of(path, entry.shape, name)
    if chosen == AS_STORED:
        return entry.nbytes
    if chosen in QUANTIZED:
        return QUANTIZED[chosen].abstract(entry.shape).nbytes
    return 2 * math.prod(entry.shape)  # bf16


def _memory(
    config: Gemma4Config, weights: int, contexts: Iterable[int], batch: int
) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("context", "weights", "cache", "together")]
    for context in contexts:
        cache = cache_bytes(config, batch, context, CACHE_ITEMSIZE)
        rows.append((f"{context:,}", size(weights), size(cache), size(weights + cache)))
    return rows
