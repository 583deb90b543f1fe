"""Reads checkpoints into parameters: converted folders, Hugging Face folders, repositories on the hub."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from convert import hub
from convert.converter import CONFIG_FILE
from convert.encode import Encoder, as_weight
from convert.huggingface import find_parameters
from convert.manifest import FILE_NAME, Manifest, TensorEntry
from convert.policy import check_format, format_of
from convert.progress import Progress
from convert.safetensors_source import SafetensorsSource
from convert.storage import read_group
from gemma_jax.config import Gemma4Config
from gemma_jax.model import param_shapes
from pallas_kernels.packed import Weight

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint folder holds.

    config: the architecture.
    manifest: formats, shapes and bytes of every parameter; of a Hugging Face folder as its headers tell, with an empty
        source hash.
    converted: whether it is a converted folder.
    """

    config: Gemma4Config
    manifest: Manifest
    converted: bool


def load_checkpoint(
    folder: str | Path, *, format: str | None = None, progress: bool | None = None
) -> tuple[Gemma4Config, Params, Manifest | None]:
    """Loads a checkpoint onto the default device.

    On a CPU the weights of a converted folder are its files, mapped and fetched as they are needed: as long as the
    parameters are in use, the files may be removed but not changed.

    Args:
        folder: a converted folder, a Hugging Face folder, or a hub id ``org/name``.
        format: for a Hugging Face checkpoint, the format to convert it to on the way in ("q4k", "eq8_0", "bf16"); None
            keeps its dtypes. A converted folder has its format already; only that one may be asked for.
        progress: as in `convert.converter.convert_checkpoint`.

    Returns:
        The architecture, the parameters as a nested dict of arrays and quantized arrays, and the manifest of a
        converted folder (None for a Hugging Face one).

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: a damaged or incomplete checkpoint, a format that it cannot be loaded in.
        OSError: the hub does not give the repository.
    """
    check_format(format)
    place = hub.resolve(folder)
    config = _config(place)
    if (place / FILE_NAME).is_file():
        manifest = Manifest.read(place)
        if format not in (None, manifest.format):
            raise ValueError(
                f"{place} is converted to {manifest.format}; it cannot be loaded as {format}: "
                "convert the original checkpoint again"
            )
        return config, _load_converted(place, config, manifest, progress), manifest
    return config, _load_huggingface(place, config, format, progress), None


def describe(folder: str | Path) -> Description:
    """What `load_checkpoint(folder)` would load, from headers and manifest alone.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: a damaged or incomplete checkpoint.
        OSError: the hub does not give the repository.
    """
    place = hub.resolve(folder)
    config = _config(place)
    if (place / FILE_NAME).is_file():
        manifest = Manifest.read(place)
        _check_manifest(place, config, manifest)
        return Description(config, manifest, converted=True)
    with SafetensorsSource(place) as source:
        entries = {
            p.path: TensorEntry(p.dtype.name, p.shape, p.size * p.dtype.itemsize, 0.0)
            for p in find_parameters(source, config, param_shapes(config))
        }
    manifest = Manifest(entries["embed/weight"].format, str(folder), "", entries)
    return Description(config, manifest, converted=False)


def _config(folder: Path) -> Gemma4Config:
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {folder}: it is not a checkpoint folder")
    return Gemma4Config.from_hf(folder / CONFIG_FILE)


def _check_manifest(folder: Path, config: Gemma4Config, manifest: Manifest) -> None:
    """Raises unless the manifest lists the model's parameters in the model's shapes."""
    shapes = param_shapes(config)
    for path in shapes.keys() ^ manifest.tensors.keys():
        fault = "lacks" if path in shapes else "has, unlike its config.json,"
        raise ValueError(f"{folder / FILE_NAME} {fault} parameter {path}")
    for path, entry in manifest.tensors.items():
        if entry.shape != shapes[path].shape:
            raise ValueError(
                f"{folder / FILE_NAME} gives {path} shape {entry.shape}; config.json needs "
                f"{shapes[path].shape}"
            )


def _load_converted(
    folder: Path, config: Gemma4Config, manifest: Manifest, show: bool | None
) -> Params:
    _check_manifest(folder, config, manifest)
    params: Params = {}
    groups: dict[str, list[str]] = {}
    for path in manifest.tensors:
        groups.setdefault(path.split("/")[0], []).append(path)
    with Progress(manifest.nbytes, "load", show) as progress:
        for group, paths in groups.items():
            tree = read_group(folder, group)
            if tree.keys() != set(paths):
                raise ValueError(
                    f"{folder}: group {group} holds {sorted(tree)}, not {sorted(paths)}"
                )
            for path in paths:
                entry = manifest.tensors[path]
                try:
                    weight = as_weight(entry.format, tree.pop(path))
                except ValueError as error:
                    raise ValueError(f"{folder}: parameter {path}: {error}") from error
                if weight.shape != entry.shape:
                    raise ValueError(
                        f"{folder}: parameter {path} has shape {weight.shape}; "
                        f"{FILE_NAME} says {entry.shape}"
                    )
                _insert(params, path, weight)
                progress.update(entry.nbytes)
    return params


def _load_huggingface(
    folder: Path, config: Gemma4Config, format: str | None, show: bool | None
) -> Params:
    params: Params = {}
    with SafetensorsSource(folder) as source:
        parameters = find_parameters(source, config, param_shapes(config))
        formats = {p.path: format_of(p.path, p.shape, format) for p in parameters}
        total = sum(tensor.nbytes for p in parameters for tensor in p.tensors)
        with Progress(total, "load", show) as progress, Encoder(source, progress.update) as encoder:
            for parameter in parameters:
                encoded = encoder.encode(parameter, formats[parameter.path])
                _insert(params, parameter.path, as_weight(encoded.entry.format, encoded.planes))
    return params


def _insert(params: Params, path: str, weight: Weight) -> None:
    *parents, name = path.split("/")
    functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)[name] = weight
