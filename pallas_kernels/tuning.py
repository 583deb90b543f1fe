"""Block sizes that were measured on a GPU, kept in ``tuned/<device>.json`` and used on GPUs of that name only.

    {"device": "NVIDIA H200", "measured": {"commit": …, "time": …, …}, "configs": [
        {"kernel": "quantized_matmul.mosaic_decode", "format": "q4k", "rows": 1, "shape": [20480, 2560],
         "config": {"tiles": 4, "warpgroups": 4, "ctas": 132, "units": 1}}, …]}

`kernel` is the module that defines the `Config`, under `pallas_kernels`; `config` holds every field of it. Written by
``python -m bench.kernels --autotune``. Files are read strictly: one that says anything else is an error, not a guess.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.arrays import FORMATS

FOLDER = Path(__file__).parent / "tuned"
_FORMATS = (*FORMATS, "bf16")


class Key(NamedTuple):
    """Which calls a config is for: those of a kernel on weights of a format and shape, by the rows of x."""

    kernel: str
    format: str
    rows: int
    shape: tuple[int, ...]


def tuned[T](config_type: type[T], x: jax.Array, w: Any) -> T | None:
    """The config that was measured for a call of `config_type`'s kernel on this GPU, or None.

    Of those for the same weights the one for the fewest rows that are at least x's.

    Raises:
        ValueError: this GPU's file is damaged.
    """
    if jax.default_backend() != "gpu":
        return None
    rows = math.prod(x.shape[:-1])
    wanted = key_of(config_type, rows, w)
    configs = _configs_of(jax.devices()[0].device_kind)
    alike = {k.rows: c for k, c in configs.items() if k._replace(rows=rows) == wanted}
    return min(((r, c) for r, c in alike.items() if r >= rows), default=(0, None))[1]


def key_of(config_type: type, rows: int, w: Any) -> Key:
    """The key of a call with `rows` rows of x."""
    kernel = config_type.__module__.removeprefix("pallas_kernels.")
    return Key(kernel, getattr(w, "format", "bf16"), rows, tuple(w.shape))


def path_of(device: str, folder: Path = FOLDER) -> Path:
    """Where the configs of a device of that name are kept.

    >>> path_of("NVIDIA H100 80GB HBM3").name
    'nvidia_h100_80gb_hbm3.json'
    """
    return folder / (re.sub(r"\W+", "_", device.lower()).strip("_") + ".json")


@functools.cache
def _configs_of(device: str) -> Mapping[Key, Any]:
    path = path_of(device)
    return load(path, device) if path.exists() else {}


def dump(path: Path, device: str, measured: Mapping[str, Any], configs: Mapping[Key, Any]) -> None:
    """Writes a file that `load` reads, whole or not at all."""
    entries = [k._asdict() | {"config": dataclasses.asdict(c)} for k, c in sorted(configs.items())]
    content = {"device": device, "measured": dict(measured), "configs": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path, device: str) -> dict[Key, Any]:
    """Reads the configs of a device, each an instance of its kernel's `Config`.

    Raises:
        ValueError: the file is not of that device, or not what this module describes; names the file and the key.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    top = _fields(path, "the file", content, {"device": str, "measured": dict, "configs": list})
    if top["device"] != device:
        raise ValueError(f"{path}: device = {top['device']!r}: expected {device!r}")
    configs: dict[Key, Any] = {}
    for i, entry in enumerate(top["configs"]):
        where = f"configs[{i}]"
        kinds = {"kernel": str, "format": str, "rows": int, "shape": list, "config": dict}
        found = _fields(path, where, entry, kinds)
        if found["format"] not in _FORMATS:
            raise ValueError(
                f"{path}: {where}.format = {found['format']!r}: expected one of {', '.join(_FORMATS)}"
            )
        sizes = {f"shape[{n}]": size for n, size in enumerate(found["shape"])}
        _check_sizes(path, where, {"rows": found["rows"]} | sizes)
        if len(sizes) < 2:
            raise ValueError(f"{path}: {where}.shape = {found['shape']}: expected [..., N, K]")
        key = Key(found["kernel"], found["format"], found["rows"], tuple(found["shape"]))
        if key in configs:
            raise ValueError(f"{path}: {where} is of the same call as one before it")
        configs[key] = _config(path, where, found)
    return configs


def _config(path: Path, where: str, entry: Mapping[str, Any]) -> Any:
    """The `Config` of an entry's kernel with the entry's values."""
    module = f"pallas_kernels.{entry['kernel']}"
    is_kernel = re.fullmatch(r"\w+\.\w+", entry["kernel"]) and _is_module(module)
    config_type = getattr(importlib.import_module(module), "Config", None) if is_kernel else None
    if config_type is None:
        raise ValueError(
            f"{path}: {where}.kernel = {entry['kernel']!r}: expected a module <op>.<family> of pallas_kernels that "
            "defines a Config"
        )
    where = f"{where}.config"
    names = {field.name: int for field in dataclasses.fields(config_type)}
    values = _fields(path, where, entry["config"], names)
    _check_sizes(path, where, values)
    try:
        return config_type(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {error}") from None


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _fields(path: Path, where: str, found: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """`found` if it is an object with exactly those keys, of those types."""
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {where} is no JSON object")
    for key in found.keys() - kinds.keys():
        raise ValueError(f"{path}: {where} has an unknown key {key!r}")
    for key, kind in kinds.items():
        if key not in found:
            raise ValueError(f"{path}: {where} has no {key!r}")
        if type(found[key]) is not kind:  # true is an int to isinstance
            name = {str: "a string", int: "an integer", list: "a list", dict: "an object"}[kind]
            raise ValueError(f"{path}: {where}.{key} = {found[key]!r}: expected {name}")
    return found


def _check_sizes(path: Path, where: str, sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{path}: {where}.{name} = {size!r}: expected an integer of 1 or more")
