"""The published architectures: their ``config.json`` files, kept in ``bench/configs``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gemma_jax.config import GLOBAL, Gemma4Config

CONFIGS = Path(__file__).parent / "configs"
PUBLISHED = ("e2b", "e4b", "12b", "26b_a4b", "31b")


def published(model: str, layers: int | None = None) -> Gemma4Config:
    """The published architecture of that name, or its first `layers` layers."""
    config = Gemma4Config.from_hf(CONFIGS / f"gemma4_{model}.json")
    if layers is None:
        return config
    own = config.layer_types.index(GLOBAL) + 1  # enough for K/V of both types
    return dataclasses.replace(
        config,
        num_layers=layers,
        layer_types=config.layer_types[:layers],
        num_kv_shared_layers=max(0, min(config.num_kv_shared_layers, layers - own)),
    )
