"""Architectures of the checkpoints that the conversion tests make."""

from __future__ import annotations

from typing import Any

import ml_dtypes
from random_checkpoint import FAMILIES, Tensors

# The per-layer embeddings of the shared family are 16 wide, which blocks of 32 do not divide.
CONFIGS: dict[str, dict[str, Any]] = FAMILIES | {
    "e_type": FAMILIES["e_type"] | {"hidden_size_per_layer_input": 32}
}


def in_bf16(tensors: Tensors) -> Tensors:
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
