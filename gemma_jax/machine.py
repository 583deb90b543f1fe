"""What this machine is to JAX: device, driver, memory, versions."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata
from pathlib import Path

import jax

CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt")
_PACKAGES = ("gemma-jax", "jax", "jaxlib", *CUDA_PLUGINS, "flax", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")
_MEMORY = Path("/proc/meminfo")


@dataclasses.dataclass(frozen=True)
class Machine:
    """JAX's default device and what is installed around it.

    Attributes:
      platform: "cpu", "gpu", …; None if JAX cannot start, for the reason `failure`.
      device: its kind as JAX names it, "NVIDIA H200".
      compute_capability: of a CUDA device, "9.0".
      nvidia_driver: first line of what a loaded NVIDIA kernel module says of itself, whether JAX uses it or not.
      memory_total: bytes that JAX may allocate on the device; of a CPU all there is.
      memory_free: bytes of those that are free.
      versions: of the packages that are installed, and of Python.
      failure: why there is no device.
    """

    platform: str | None
    device: str
    compute_capability: str | None
    nvidia_driver: str | None
    memory_total: int | None
    memory_free: int | None
    versions: dict[str, str]
    failure: str | None = None

    @classmethod
    def here(cls) -> Machine:
        """This machine. Starts JAX's backend."""
        driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.is_file() else None
        try:
            device = jax.devices()[0]
        except RuntimeError as error:  # a platform was asked for that is not there
            return cls(None, "none", None, driver, None, None, _versions(), str(error))
        total, free = _memory(device)
        return cls(
            device.platform,
            device.device_kind,
            getattr(device, "compute_capability", None),
            driver,
            total,
            free,
            _versions(),
        )


def _memory(device: jax.Device) -> tuple[int | None, int | None]:
    if device.platform == "cpu":
        if not _MEMORY.is_file():
            return None, None
        fields = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        kibibytes = (fields[name].split()[0] for name in ("MemTotal", "MemAvailable"))
        total, free = (1024 * int(number) for number in kibibytes)
        return total, free
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit, limit and limit - stats.get("bytes_in_use", 0)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
