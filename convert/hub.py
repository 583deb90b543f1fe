"""Finds a checkpoint folder: a local one, or a snapshot of a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What a text checkpoint consists of; repositories also hold the same weights in other formats.
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def is_repository(source: str | Path) -> bool:
    """Whether `source` means a repository on the hub: no local path, and of the form ``org/name``."""
    return not Path(source).exists() and _REPOSITORY.fullmatch(str(source)) is not None


def resolve(source: str | Path) -> Path:
    """The local folder of `source`: itself if it is one, otherwise the snapshot of hub id ``org/name``.

    Raises:
        FileNotFoundError: no such folder, and not the form of a hub id.
        OSError: the hub cannot be reached or does not give the repository; the message says why.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{source} is a file; expected a checkpoint folder or a hub id")
    if not is_repository(source):
        raise FileNotFoundError(f"no checkpoint folder {source}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_FILES))
    except Exception as error:  # of many kinds: HTTP, validation, access, no connection
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"no folder {source} here, and it cannot be fetched from the hub: "
            f"{type(error).__name__}: {reason}"
        ) from error
