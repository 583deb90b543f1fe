"""Keeps compiled programs on the disk, so that the second start of a model waits for none of them.

`gemma_jax.load` and the command line switch this on. JAX's own settings come first: whoever sets
``jax_compilation_cache_dir`` (or the environment variable ``JAX_COMPILATION_CACHE_DIR``) has chosen already, and
``jax.config.update("jax_enable_compilation_cache", False)`` turns all of it off.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

# Below this a program compiles about as fast as it is read back.
_MIN_COMPILE_SECONDS = 0.1


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/gemma-jax``, or ``~/.cache/gemma-jax`` where that variable is not an absolute path.

    Raises:
      RuntimeError: the user has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "gemma-jax"


def enable(folder: str | Path | None = None) -> Path | None:
    """Lets JAX keep compiled programs in `folder`, unless it has a place for them already.

    A program is found again by its own text, the versions of JAX and XLA, and the device, so an old one is never used
    for a new one; the folder may be deleted at any time. What is in it is run as it is: nobody else may write there.

    Args:
      folder: where to keep them; `default_folder` unless given. Made if it is not there.

    Returns:
      The folder JAX uses, or None if this one cannot be made or written: then every process compiles for itself.

    >>> enable() == enable()
    True
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    try:
        folder = default_folder() if folder is None else Path(folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    return folder
