"""Hugging Face checkpoint in, converted checkpoint out, one top-level group of parameters in memory at a time."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from pathlib import Path

from convert import hub
from convert.encode import Encoder
from convert.huggingface import Parameter, find_parameters
from convert.manifest import FILE_NAME, Manifest, TensorEntry
from convert.policy import AS_STORED, FORMATS, check_format, format_of
from convert.progress import Progress
from convert.safetensors_source import SafetensorsSource
from convert.storage import Planes, atomic_folder, no_space, write_group
from gemma_jax.config import Gemma4Config
from gemma_jax.model import param_shapes
from pallas_kernels.arrays import FORMATS as QUANTIZED

CONFIG_FILE = "config.json"
# Copied as they are where the source has them.
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    format: str,
    progress: bool | None = None,
) -> Manifest:
    """Converts a Hugging Face checkpoint to a self-contained folder.

    Tensors are read in slabs of 8 MB, encoded on all cores and written group by group (embed, ple, each layer), so
    that memory peaks at about 1 GB plus twice the largest group. `dst` appears when it is complete and on the disk;
    a conversion that fails or is interrupted leaves nothing, a killed one a hidden folder ``.{dst}.unfinished-*``
    that the next conversion to `dst` removes.

    Args:
        src: folder with config.json and safetensors, or a hub id ``org/name``.
        dst: folder to make; its parent exists.
        format: "q4k", "eq8_0" or "bf16".
        progress: None shows a bar on a terminal, True also prints lines where there is none, False shows nothing.

    Returns:
        The manifest that `dst` has.

    Raises:
        FileExistsError: `dst` exists.
        FileNotFoundError: `src` or a file in it is missing.
        ValueError: unknown format; a damaged checkpoint (the message names tensor and file).
        OSError: `src` cannot be fetched, `dst` cannot be written; errno ENOSPC where the disk is full.
    """
    check_format(format)
    if format is None:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got None")
    destination = Path(dst)
    if destination.exists():  # before a download of hours, and again when it is renamed
        raise FileExistsError(f"{destination} exists already; nothing is overwritten")
    folder = hub.resolve(src)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {folder}")
    config = Gemma4Config.from_hf(folder / CONFIG_FILE)
    with SafetensorsSource(folder) as source:
        parameters = find_parameters(source, config, param_shapes(config))
        formats = {p.path: format_of(p.path, p.shape, format) for p in parameters}
        with atomic_folder(destination) as temporary:
            _check_space(temporary, parameters, formats)
            for name in (CONFIG_FILE, *TEXT_FILES):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, temporary / name)
            entries, hashes = _write_arrays(temporary, source, parameters, formats, progress)
            manifest = Manifest(
                format=format,
                source=str(src) if hub.is_repository(src) else folder.resolve().name,
                source_hash=_source_hash(folder / CONFIG_FILE, source, hashes),
                tensors=entries,
            )
            (temporary / FILE_NAME).write_text(manifest.to_json())
    return manifest


def _write_arrays(
    folder: Path,
    source: SafetensorsSource,
    parameters: list[Parameter],
    formats: dict[str, str],
    show: bool | None,
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Encodes and writes all groups; returns the manifest's entries and the tensors' sha256."""
    entries: dict[str, TensorEntry] = {}
    hashes: dict[str, str] = {}
    total = sum(tensor.nbytes for parameter in parameters for tensor in parameter.tensors)
    with (
        Progress(total, "convert", show) as progress,
        Encoder(source, progress.update, hash_tensors=True) as encoder,
    ):
        for group, members in itertools.groupby(parameters, key=lambda p: p.group):
            tree: dict[str, Planes] = {}
            for parameter in members:
                encoded = encoder.encode(parameter, formats[parameter.path])
                tree[parameter.path] = encoded.planes
                entries[parameter.path] = encoded.entry
                hashes |= encoded.hashes
                del encoded
            write_group(folder, group, tree)
            tree.clear()  # before the next group is encoded, not when the name is bound anew
    return entries, hashes


def _check_space(folder: Path, parameters: list[Parameter], formats: dict[str, str]) -> None:
    """Raises the error for a full disk if the planes will not fit, before hours are spent on them."""
    needed = 0
    for parameter in parameters:
        format = formats[parameter.path]
        if format in QUANTIZED:
            needed += QUANTIZED[format].abstract(parameter.shape).nbytes
        else:
            itemsize = parameter.dtype.itemsize if format == AS_STORED else 2
            needed += parameter.size * itemsize
    if shutil.disk_usage(folder).free < needed:
        raise no_space(folder, f"a checkpoint of {needed / 1e9:.2f} GB")


def _source_hash(config: Path, source: SafetensorsSource, hashes: dict[str, str]) -> str:
    """sha256 over config.json and, by name, every used tensor: independent of how they are sharded."""
    digest = hashlib.sha256(config.read_bytes())
    for name in sorted(hashes):
        info = source[name]
        digest.update(f"\n{name} {info.dtype} {list(info.shape)} {hashes[name]}".encode())
    return f"sha256:{digest.hexdigest()}"
