"""Offline batch jobs: a file of requests in, a file of answers out, each exactly once.

>>> import json, pathlib, tempfile
>>> import gemma_jax
>>> lm = gemma_jax.load("tiny-dense", format="q4k")
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> lines = [json.dumps({"prompt": text, "max_tokens": 8}) for text in ("The captain", "Call me")]
>>> _ = (folder / "in.jsonl").write_text("\\n".join([*lines, "no JSON"]))
>>> summary = map_jsonl(lm, folder / "in.jsonl", folder / "out.jsonl", slots=2, context=64)
>>> summary.answered, summary.failed
(2, 1)
>>> map_jsonl(lm, folder / "in.jsonl", folder / "out.jsonl", slots=2, context=64).answered_now
0
"""

from __future__ import annotations

import os
from typing import Any

from gemma_jax.batch.job import Summary, run_job
from gemma_jax.batch.progress import Progress
from gemma_jax.batch.records import Served
from gemma_jax.engine import Engine, default_context
from gemma_jax.lm import LanguageModel

__all__ = ["Progress", "Served", "Summary", "map_jsonl", "run_job"]


def map_jsonl(
    lm: LanguageModel,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    slots: int = 8,
    context: int | None = None,
    max_new_tokens: int = 256,
    model_names: tuple[str, ...] = ("gemma",),
    errors: str | os.PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Answers every line of a file with a model that is loaded; `gemma-jax batch` from Python.

    Called again with the same arguments, it goes on where it was interrupted.

    Args:
      lm: what `gemma_jax.load` returned.
      source, output, errors: files; see `gemma_jax.batch.job.run_job`. Lines are in the forms of
        `gemma_jax.batch.records`.
      slots: rows that decode together.
      context: most positions of a row, prompt and answer; 4096, or what the model has if that is less.
      max_new_tokens: of a line that names no limit.
      model_names: what a line may call the model.
      settings: further names and values that must be the same when an output is continued.
      progress: is told what happens; nothing is shown by default.

    Raises:
      ValueError, OSError: see `gemma_jax.batch.job.run_job`.
    """
    context = context or default_context(lm.config)
    served = Served(lm.tokenizer, model_names, context, max_new_tokens)
    return run_job(
        os.fspath(source),
        os.fspath(output),
        served,
        lambda slots: Engine.from_language_model(lm, slots=slots, context=context),
        slots=slots,
        errors=None if errors is None else os.fspath(errors),
        settings={"context": context, "max_new_tokens": max_new_tokens} | (settings or {}),
        progress=progress,
    )
