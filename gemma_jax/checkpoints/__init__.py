"""The bundled checkpoints: two small Gemma-4-shaped models in the published layout."""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("tiny-dense", "tiny-moe")


def resolve(name: str | Path) -> str | Path:
    """The folder of a bundled checkpoint for its name; anything else as it is."""
    return Path(__file__).parent / name if name in BUNDLED and not Path(name).exists() else name
