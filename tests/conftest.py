"""Shared by all tests: golden files and small checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import random_checkpoint

# XLA's threads on a CPU, as many as there are cores otherwise. Each warpgroup of an emulated kernel that waits at a
# barrier keeps one: with two cores, the warpgroup that they wait for could find none and all would wait forever.
os.environ.setdefault("NPROC", "16")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of golden files."""
    return DATA


@pytest.fixture(scope="session")
def random_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of random checkpoints, one per family of architectures."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: random_checkpoint.write_checkpoint(root / name, config)
        for name, config in random_checkpoint.FAMILIES.items()
    }
