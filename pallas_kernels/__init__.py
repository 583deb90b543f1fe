"""Quantized array types and the operations on them. Knows nothing of Gemma.

``arrays`` holds the formats, ``quantize`` makes them, ``gguf_blocks`` translates them from and to GGML's byte layout,
``packed`` puts them in the order of the tensor cores; each operation is a package of its own with one public function.
"""

from pallas_kernels.argmax_matmul import argmax_matmul
from pallas_kernels.arrays import EQ8_0, FORMATS, Q4K, Q6K, QuantizedArray
from pallas_kernels.embedding_lookup import embedding_lookup
from pallas_kernels.expert_down import expert_down
from pallas_kernels.expert_gate_up import expert_gate_up
from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.gated_matmul import gated_matmul
from pallas_kernels.gelu_matmul import gelu_matmul
from pallas_kernels.packed import PACKED, PackedArray, Weight, pack_array
from pallas_kernels.quantize import quantize, relative_error
from pallas_kernels.quantized_matmul import quantized_matmul

__all__ = [
    "EQ8_0",
    "FORMATS",
    "PACKED",
    "Q4K",
    "Q6K",
    "PackedArray",
    "QuantizedArray",
    "Weight",
    "argmax_matmul",
    "embedding_lookup",
    "expert_down",
    "expert_gate_up",
    "expert_matmul",
    "gated_matmul",
    "gelu_matmul",
    "pack_array",
    "quantize",
    "quantized_matmul",
    "relative_error",
]
