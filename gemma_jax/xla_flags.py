"""The XLA flags that the decode loop wants on NVIDIA GPUs, set when `gemma_jax` is imported.

``--xla_gpu_enable_command_buffer=+WHILE`` and ``--xla_gpu_graph_min_graph_size=1`` make one CUDA graph of a whole call
of `gemma_jax.generate`, loops included: without them the host takes part in every step.
``--xla_backend_extra_options=-nvptx-fma-level=2`` lets XLA's own kernels multiply and add in one instruction.

XLA reads ``XLA_FLAGS`` once, when the first array or program is made. A flag that the variable already has stays as it
is, so ``XLA_FLAGS=--xla_gpu_graph_min_graph_size=5`` takes back the second. Nothing is set where JAX will not use CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import jax
from jax._src import xla_bridge  # no public name says whether a backend has started

FLAGS = {
    "xla_gpu_enable_command_buffer": "+WHILE",
    "xla_gpu_graph_min_graph_size": "1",
    "xla_backend_extra_options": "-nvptx-fma-level=2",
}
_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


def with_defaults(flags: str) -> str:
    """`flags`, the value of ``XLA_FLAGS``, and after them those of `FLAGS` that it does not name."""
    named = {flag.lstrip("-").split("=")[0] for flag in flags.split()}
    missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in named]
    return " ".join([flags, *missing]).strip()


def current() -> dict[str, str | None]:
    """What ``XLA_FLAGS`` says now of each of `FLAGS`; None where it does not name it."""
    given = dict(
        flag.lstrip("-").partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split()
    )
    return {name: given.get(name) for name in FLAGS}


def enable() -> None:
    """Completes ``XLA_FLAGS`` in this process's environment if JAX may use CUDA.

    Warns:
      RuntimeWarning: a GPU backend has started already, without the flags; import `gemma_jax` before the first array
        is made, or set the variable outside.
    """
    now = os.environ.get("XLA_FLAGS", "")
    wanted = with_defaults(now)
    if wanted == now or not _may_use_cuda():
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = wanted
    elif jax.default_backend() == "gpu":
        warnings.warn(
            "gemma_jax was imported after JAX had started its GPU backend, so decoding runs without the XLA flags that "
            "make one CUDA graph of it. Import gemma_jax before the first array is made, or start the process with "
            f"XLA_FLAGS='{wanted}'.",
            RuntimeWarning,
            stacklevel=3,
        )


def _may_use_cuda() -> bool:
    platforms = jax.config.jax_platforms
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    try:
        return any(importlib.util.find_spec(name) for name in _PLUGINS)
    except ModuleNotFoundError:  # there is no package jax_plugins at all
        return False
