"""Shared by all tests: golden files and small checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_checkpoint

import gemma_jax

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


@pytest.fixture(scope="session")
def tiny_dense() -> gemma_jax.LanguageModel:
    """The bundled dense model in Q4K."""
    return gemma_jax.load("tiny-dense", format="q4k")


@pytest.fixture(scope="session")
def tiny_moe() -> gemma_jax.LanguageModel:
    """The bundled mixture-of-experts model in Q4K."""
    return gemma_jax.load("tiny-moe", format="q4k")
