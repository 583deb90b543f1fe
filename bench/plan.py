"""What a sweep measures: its cases, their order, and how long the next one will take."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

SEED = 0  # of weights and prompts
PREFILL, DECODE, FIRST_TOKEN = "prefill", "decode", "first_token"
OURS, LLAMA_CPP, TRANSFORMERS, OPENAI = "gemma-jax", "llama.cpp", "transformers", "openai"

# What each engine can be asked for. llama-bench has neither batches nor a first token, and an OpenAI-compatible server
# does not say when it has finished a prefill.
_PHASES = {
    OURS: (PREFILL, FIRST_TOKEN, DECODE),
    LLAMA_CPP: (PREFILL, DECODE),
    TRANSFORMERS: (PREFILL, FIRST_TOKEN, DECODE),
    OPENAI: (FIRST_TOKEN, DECODE),
}
_BATCHES = (OURS, TRANSFORMERS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure. Two results are of the same case if all of these are equal.

    Attributes:
      engine: `OURS` or a peer.
      model, format: whose weights, and how they are stored.
      implementation: name of our kernels, or "auto"; None for peers.
      phase: `PREFILL` (prompt to logits), `FIRST_TOKEN` (token ids on the host to the first new one on the host) or
        `DECODE`.
      batch: rows.
      tokens: of each row's prompt, in prefill and first token.
      depth, new_tokens: of decode, the positions in the cache before it and the tokens generated.
    """

    engine: str
    model: str
    format: str
    implementation: str | None
    phase: str
    batch: int = 1
    tokens: int | None = None
    depth: int | None = None
    new_tokens: int | None = None

    @classmethod
    def of(cls, result: dict[str, Any]) -> Case:
        """The case that a result is of."""
        values: dict[str, Any] = {f.name: result.get(f.name) for f in dataclasses.fields(cls)}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The keys of a result that say which case it is of."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if v is not None or k == "implementation"}

    @property
    def group(self) -> tuple[str, str, str]:
        """Cases of one group share a process and its parameters."""
        return self.engine, self.model, self.format

    @property
    def size(self) -> int:
        """Positions in the cache at the end, over all rows."""
        return self.batch * (self.tokens or (self.depth or 0) + (self.new_tokens or 0))

    def __str__(self) -> str:
        what = f"depth {self.depth}" if self.phase == DECODE else f"{self.tokens} tokens"
        engine = f"{self.engine} {self.implementation}" if self.implementation else self.engine
        phase = self.phase.replace("_", " ")
        return f"{self.model} {self.format} {engine}: {phase}, {what}, batch {self.batch}"


@dataclasses.dataclass(frozen=True)
class Lists:
    """The lists whose products a sweep covers; batches above 1 are decoded at `batch_depths` only."""

    models: Sequence[str]
    formats: Sequence[str]
    implementations: Sequence[str]
    prompts: Sequence[int]
    depths: Sequence[int]
    batches: Sequence[int]
    batch_depths: Sequence[int]
    new_tokens: int
    peers: Sequence[str] = ()


def plan(lists: Lists) -> list[Case]:
    """Every case: model by model, format by format, our engine and then the peers, the smallest first."""
    cases: list[Case] = []
    for model in lists.models:
        for weight_format in lists.formats:
            for engine in (OURS, *lists.peers):
                # It runs what is published, in bfloat16; none of its own formats is one of ours.
                if engine == TRANSFORMERS and weight_format != "bf16":
                    continue
                names: Sequence[str | None] = lists.implementations if engine == OURS else (None,)
                group = [
                    case
                    for name in names
                    for case in _cases(lists, engine, model, weight_format, name)
                ]
                # llama-bench is one process a phase.
                by_phase = engine == LLAMA_CPP
                cases += sorted(set(group), key=lambda c: (by_phase and c.phase, c.size, str(c)))
    return cases


def _cases(
    lists: Lists, engine: str, model: str, weight_format: str, implementation: str | None
) -> list[Case]:
    what = (engine, model, weight_format, implementation)
    cases = [
        Case(*what, phase, tokens=tokens)
        for phase in _PHASES[engine]
        if phase != DECODE
        for tokens in lists.prompts
    ]
    decode = [(1, depth) for depth in lists.depths]
    if engine in _BATCHES:
        decode += [(batch, depth) for batch in lists.batches for depth in lists.batch_depths]
    new = lists.new_tokens
    return cases + [Case(*what, DECODE, batch, None, depth, new) for batch, depth in decode]


def median(result: dict[str, Any]) -> float:
    """The middle of a result's samples, in seconds."""
    return statistics.median(result["seconds"])


def rate(result: dict[str, Any]) -> float:
    """Tokens per second of all rows together, from the median."""
    tokens = result["new_tokens"] if result["phase"] == DECODE else result["tokens"]
    return result["batch"] * tokens / median(result)


def expected_seconds(case: Case, results: Sequence[dict[str, Any]]) -> float:
    """How long a case will take with warm-up and compilation, judged by those before it; 0 if nothing is known.

    The nearest smaller case of the same kind, its samples scaled by `Case.size`; without one, the longest of the
    engine's so far.
    """

    def kind(c: Case) -> tuple[Any, ...]:
        return (*c.group, c.implementation, c.phase)

    known = [(Case.of(r), r) for r in results if "wall_seconds" in r]
    alike = [(c, r) for c, r in known if kind(c) == kind(case)]
    if not alike:
        return max((r["wall_seconds"] for c, r in known if c.engine == case.engine), default=0.0)
    nearest, result = min(alike, key=lambda pair: (abs(case.size - pair[0].size), str(pair[0])))
    samples = result.get("seconds", [])
    running = min(sum(samples) + max(samples, default=0.0), result["wall_seconds"])
    growth = max(1.0, case.size / nearest.size)
    return result["wall_seconds"] + (growth - 1) * running


def expected_loading(case: Case, results: Sequence[dict[str, Any]]) -> float:
    """How long the engine takes to start and have its weights: the longest so far of the group, else of the engine."""
    known = [(Case.of(r), r["load_seconds"]) for r in results if "load_seconds" in r]
    same_group = [seconds for c, seconds in known if c.group == case.group]
    return max(same_group or [s for c, s in known if c.engine == case.engine], default=0.0)
