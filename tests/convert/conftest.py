"""Small checkpoints to convert, whole and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoint import Tensors, random_checkpoint
from safetensors.numpy import save_file
from small_checkpoints import CONFIGS, in_bf16

Write = Callable[..., Path]


@pytest.fixture
def moe_tensors() -> Tensors:
    """Tensors of a small mixture-of-experts checkpoint in bfloat16."""
    return in_bf16(random_checkpoint(CONFIGS["moe"]))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes tensors as a Hugging Face folder: ``write(tensors, config, shards=1, name="source")``."""

    def write(
        tensors: Tensors,
        config: dict[str, Any] = CONFIGS["moe"],
        shards: int = 1,
        name: str = "source",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        weight_map = {}
        names = sorted(tensors)
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {key: tensors[key] for key in names[i::shards]}
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def numbers() -> np.random.Generator:
    """Random numbers from a fixed seed."""
    return np.random.default_rng(0)
