"""What `gemma-jax doctor` prints: which kernels run on this machine, what is set wrong, and whether a model fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from convert.load import describe
from gemma_jax import compilation_cache, xla_flags
from gemma_jax.cache import cache_bytes
from gemma_jax.engine import default_context
from gemma_jax.info import CACHE_ITEMSIZE
from gemma_jax.kernel_support import Support, support
from gemma_jax.machine import CUDA_PLUGINS, Machine
from gemma_jax.tables import pairs, size, table


@dataclasses.dataclass(frozen=True)
class CompilationCache:
    """Where compiled programs are kept (None: nowhere), how many files there are, and their bytes."""

    folder: str | None
    files: int
    nbytes: int

    @classmethod
    def here(cls) -> CompilationCache:
        """That of this process, which `compilation_cache.enable` switches on."""
        folder = compilation_cache.enable()
        if folder is None:
            return cls(None, 0, 0)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return cls(str(folder), len(sizes), sum(sizes))


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a model needs for `batch` rows of `context` positions, without the work space of the programs."""

    model: str
    context: int
    batch: int
    weights: int
    cache: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that `gemma-jax doctor` knows; `problems` are what a user should mend.

    xla_flags: what ``XLA_FLAGS`` says of each flag of `gemma_jax.xla_flags`, None where it does not name it.
    """

    machine: Machine
    xla_flags: dict[str, str | None]
    cache: CompilationCache
    kernels: list[Support]
    need: Need | None
    problems: list[str]

    def to_json(self) -> str:
        """One JSON object with the fields of the dataclasses; sizes in bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self) -> str:
        """Several lines for a terminal."""
        parts = [
            ["device", *pairs(_device(self.machine))],
            ["versions", *pairs(list(self.machine.versions.items()))],
            [f"XLA flags{'' if self.machine.platform == 'gpu' else ' (of use on GPUs only)'}"],
            ["compilation cache", *_cache(self.cache)],
            ["kernels, for the shapes of E4B and the experts of 26B-A4B", *_kernels(self.kernels)],
        ]
        parts[2] += [f"  {name} = {value or 'not set'}" for name, value in self.xla_flags.items()]
        if self.need is not None:
            parts.append(_need(self.need, self.machine))
        parts.append(["problems", *(f"  {p}" for p in self.problems or ["none found"])])
        return "\n\n".join("\n".join(part) for part in parts)


def examine(
    model: str | Path | None = None, *, context: int | None = None, batch: int = 1
) -> Report:
    """Looks at this machine, and at what a checkpoint would need on it. Starts JAX's backend, loads no weight.

    Args:
      model: a converted or Hugging Face folder, or a hub id.
      context: positions per row to plan memory for; 4096 unless given, or what the model has.
      batch: rows to plan for.

    Raises:
      ValueError: a context or batch the model cannot have, or either of them without a model; as for
        `convert.load.describe`.
    """
    if model is None and (context is not None or batch != 1):
        raise ValueError("--context, --batch: given without a MODEL, whose memory they plan")
    need = None if model is None else _plan(model, context, batch)
    machine = Machine.here()
    flags, cache = xla_flags.current(), CompilationCache.here()
    return Report(
        machine=machine,
        xla_flags=flags,
        cache=cache,
        kernels=support(machine),
        need=need,
        problems=find_problems(machine, flags, cache, need),
    )


def find_problems(
    machine: Machine,
    flags: dict[str, str | None],
    cache: CompilationCache,
    need: Need | None,
) -> list[str]:
    """What keeps this machine from running a model, or from running it fast, each with its remedy."""
    found = []
    jaxlib = machine.versions.get("jaxlib")
    for plugin in CUDA_PLUGINS:
        if machine.versions.get(plugin, jaxlib) != jaxlib:
            found.append(
                f"{plugin} is version {machine.versions[plugin]}, jaxlib {jaxlib}: install the same of both"
            )
    if machine.failure is not None:
        found.append(f"JAX finds no device: {' '.join(machine.failure.split())}")
    elif machine.platform == "cpu" and machine.nvidia_driver and not jax.config.jax_platforms:
        found.append(
            f"an NVIDIA driver is loaded ({machine.nvidia_driver}) but JAX runs on the CPU: install "
            "'.[cuda13]', or see what JAX says when it starts"
        )
    missing = [f"--{name}={xla_flags.FLAGS[name]}" for name, value in flags.items() if not value]
    if machine.platform == "gpu" and missing:
        found.append(
            f"XLA_FLAGS came too late and lack {' '.join(missing)}: import gemma_jax before the first array is "
            "made, or set them outside"
        )
    if cache.folder is None:
        found.append(
            "compiled programs cannot be kept: make the cache folder writable, or name another with "
            "JAX_COMPILATION_CACHE_DIR"
        )
    if need is not None and machine.memory_free is not None:
        together = need.weights + need.cache
        if together > machine.memory_free:
            found.append(
                f"{need.model} needs {size(together)} for {need.batch} x {need.context:,} positions, "
                f"{size(machine.memory_free)} are free: take a smaller --context, --batch or format"
            )
    return found


def _plan(model: str | Path, context: int | None, batch: int) -> Need:
    found = describe(model)
    longest = found.config.max_position_embeddings
    if context is not None and not 1 <= context <= longest:
        raise ValueError(f"--context: {context} given, 1 to {longest} accepted by this model")
    if batch < 1:
        raise ValueError(f"--batch: {batch} given, 1 or more accepted")
    context = context or default_context(found.config)
    cache = cache_bytes(found.config, batch, context, CACHE_ITEMSIZE)
    return Need(str(model), context, batch, found.manifest.nbytes, cache)


def _device(machine: Machine) -> list[tuple[str, str]]:
    rows = [("kind", f"{machine.device} ({machine.platform or 'JAX does not start'})")]
    if machine.compute_capability:
        rows.append(("capability", machine.compute_capability))
    rows.append(("NVIDIA driver", machine.nvidia_driver or "none"))
    if machine.memory_total is not None and machine.memory_free is not None:
        rows.append(("memory", f"{size(machine.memory_free)} free of {size(machine.memory_total)}"))
    return rows


def _cache(cache: CompilationCache) -> list[str]:
    if cache.folder is None:
        return ["  none: every process compiles for itself"]
    return [f"  {cache.folder}: {cache.files} files, {size(cache.nbytes)}"]


def _kernels(rows: list[Support]) -> list[str]:
    """A table with a column of formats that are served alike, and the reasons below it, each once."""
    reasons: dict[str, int] = {}
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        objections = [
            f"not {n} [{reasons.setdefault(r, len(reasons) + 1)}]" for n, r in row.why_not.items()
        ]
        others = ", ".join([*(f"{name} on request" for name in row.on_request), *objections])
        merged.setdefault((row.op, row.call, row.default, others), []).append(row.format)
    lines: list[tuple[str, ...]] = [("op", "call", "formats", "runs", "others")]
    for (op, call, default, others), formats in merged.items():
        lines.append((op, call, " ".join(formats), default, others or "-"))
    notes = [f"  [{i}] {reason}" for reason, i in reasons.items()]
    if any(row.on_request for row in rows):
        notes.append(
            "  on request: implementation=('mosaic', 'xla'); no card has run these kernels yet"
        )
    return [*table(lines, left=5), *notes]


def _need(need: Need, machine: Machine) -> list[str]:
    rows = [
        ("weights", size(need.weights)),
        ("cache", f"{size(need.cache)} for {need.batch} x {need.context:,} positions in bfloat16"),
        ("together", f"{size(need.weights + need.cache)}, without work space"),
    ]
    if machine.memory_free is not None:
        rows.append(("free", size(machine.memory_free)))
    return [need.model, *pairs(rows)]
