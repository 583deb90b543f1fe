"""Which number format each parameter gets in a converted checkpoint."""

from __future__ import annotations

from pallas_kernels.arrays import super_block_size

BF16 = "bf16"
AS_STORED = "as stored"
FORMATS = ("q4k", "eq8_0", BF16)

# Read one row per token or, as the head, summed over the whole vocabulary: Q4K's error would reach every logit.
_EMBEDDINGS = ("embed/weight", "ple/embedding")
# Chooses experts: small, and an error here is a different expert instead of a slightly different sum.
_ROUTER = "moe/router"


def check_format(format: str | None) -> None:
    """Raises a `ValueError` unless `format` is one of `FORMATS` or None."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")


def format_of(path: str, shape: tuple[int, ...], format: str | None) -> str:
    """The number format of one parameter in a checkpoint of the given format.

    Args:
        path: the parameter's path in the tree, "layers_0/ffn/down".
        shape: its shape.
        format: the checkpoint's format, one of `FORMATS`; None keeps every parameter as it is.

    Returns:
        "q4k", "eq8_0", "q6k", "bf16", or `AS_STORED` for norms, scales and routers, which stay in the dtype that they
        have in the source. Under "q4k" the embeddings, of which one is the head, are "q6k".

    Raises:
        ValueError: unknown format, or rows that the format's blocks do not divide.
    """
    check_format(format)
    if format is None or len(shape) < 2 or path.endswith(_ROUTER):
        return AS_STORED
    if format != BF16:
        try:
            super_block_size(shape[-1])
        except ValueError as error:
            raise ValueError(
                f"parameter {path} of shape {shape} cannot be {format}: {error}"
            ) from None
    if format == "q4k" and path in _EMBEDDINGS:
        return "q6k"
    return format
