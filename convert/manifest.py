"""The manifest of a converted checkpoint: what is in it, in which format, and what the format lost."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One parameter of a converted checkpoint.

    format: "q4k", "eq8_0", "q6k", or the dtype of a plain array ("bfloat16", "float16", "float32").
    shape: the logical shape.
    nbytes: bytes of its planes.
    relative_error: ||w - stored|| / ||w||, 0 where nothing was lost.
    """

    format: str
    shape: tuple[int, ...]
    nbytes: int
    relative_error: float

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted checkpoint holds.

    format: what was asked for, "q4k", "eq8_0" or "bf16".
    source: folder name or hub id that it was made from.
    source_hash: "sha256:…" over config.json and every used tensor's name, dtype, shape and bytes; the same for a
        checkpoint in one file and in shards.
    tensors: path -> entry, in the order of the parameter tree.
    """

    format: str
    source: str
    source_hash: str
    tensors: dict[str, TensorEntry]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(entry.size for entry in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter, computed from the planes."""
        return 8 * self.nbytes / self.parameters

    def to_json(self) -> str:
        """The text of manifest.json."""
        content = {
            "format_version": FORMAT_VERSION,
            "format": self.format,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "source": self.source,
            "source_hash": self.source_hash,
            "tensors": {
                path: dataclasses.asdict(entry) | {"shape": list(entry.shape)}
                for path, entry in self.tensors.items()
            },
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """The manifest of a converted folder.

        Raises:
            FileNotFoundError: `folder` has none.
            ValueError: it is damaged, or of a version that this code does not know.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text())
            version = content["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a manifest: {error!r}") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {version!r}, this version reads {FORMAT_VERSION}"
            )
        try:
            return _parse(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from None


def _parse(content: dict[str, Any]) -> Manifest:
    tensors = {
        path: TensorEntry(
            format=str(entry["format"]),
            shape=tuple(int(size) for size in entry["shape"]),
            nbytes=int(entry["nbytes"]),
            relative_error=float(entry["relative_error"]),
        )
        for path, entry in content["tensors"].items()
    }
    return Manifest(content["format"], content["source"], content["source_hash"], tensors)
