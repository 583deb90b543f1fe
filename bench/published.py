"""The published architectures, and a small one of their kind: ``config.json`` files in ``bench/configs``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gemma_jax.config import GLOBAL, Gemma4Config

CONFIGS = Path(__file__).parent / "configs"
PUBLISHED = ("e2b", "e4b", "12b", "26b_a4b", "31b")
# Not published: an E-type of 255 million parameters, half of them embeddings of 32768 tokens, for slow devices.
SMALL = ("e260m",)


def published(model: str, layers: int | None = None) -> Gemma4Config:
    """The architecture of one of those names, or its first `layers` layers.

    Raises:
      ValueError: no such architecture.
    """
    if model not in (*PUBLISHED, *SMALL):
        raise ValueError(f"model is {model!r}; expected one of {', '.join((*PUBLISHED, *SMALL))}")
    file = f"gemma4_{model}.json" if model in PUBLISHED else f"{model}.json"
    config = Gemma4Config.from_hf(CONFIGS / file)
    if layers is None:
        return config
    own = config.layer_types.index(GLOBAL) + 1  # enough for K/V of both types
    return dataclasses.replace(
        config,
        num_layers=layers,
        layer_types=config.layer_types[:layers],
        num_kv_shared_layers=max(0, min(config.num_kv_shared_layers, layers - own)),
    )
