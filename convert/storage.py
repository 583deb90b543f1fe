"""Puts a converted checkpoint on disk: a folder that appears whole or not at all, arrays through Orbax.

The arrays lie in ``arrays/<group>``, one Orbax item per top-level key of the parameter tree, so that one layer at a
time is in memory. In an item, ``{path}.{plane}`` is stored as two levels, ``tree[path][plane]``: the quantized classes
are rebuilt from the manifest, and the stored form knows nothing of them.

Orbax is told to make a zarr array of each plane, uncompressed and in one chunk: a file that holds the plane and nothing
else. It is written and can be restored by Orbax, but reading maps the files instead, so that a checkpoint is open
before its weights are read, and processes share one copy of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives numpy the name "bfloat16"
import numpy as np

from convert.mapping import map_array

ARRAYS = "arrays"
_LOCK = ".lock"
_ZARR = ".zarray"

Planes = dict[str, np.ndarray]


@contextlib.contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into that becomes `destination` when the block ends, and is removed when it fails.

    The folder lies beside `destination`, under a name of its own, and is locked while its process lives; folders that
    killed processes left behind are recognised by their free lock and removed first. Before the rename all of it is
    flushed to the disk, so that a `destination` that exists is complete, whatever happens.

    Raises:
        FileExistsError: `destination` exists.
        FileNotFoundError: the folder that it should lie in does not.
        OSError: the disk is full (errno ENOSPC).
    """
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists already; nothing is overwritten")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{parent}, where {destination.name} should be written, is no folder"
        )
    _remove_stale(parent, destination.name)
    temporary, lock = _locked_folder(parent, destination.name)
    try:
        yield temporary
        (temporary / _LOCK).unlink()
        _flush(temporary)
        if destination.exists():
            raise FileExistsError(f"{destination} appeared meanwhile; nothing is overwritten")
        temporary.rename(destination)
        _fsync(parent)
    except BaseException as error:  # an interrupt, too, must leave nothing behind
        shutil.rmtree(temporary, ignore_errors=True)
        if is_no_space(error) and getattr(error, "filename", None) is None:
            raise no_space(destination, destination.name) from error
        raise
    finally:
        os.close(lock)


def _temporary_prefix(name: str) -> str:
    return f".{name}.unfinished-"


def _locked_folder(parent: Path, name: str) -> tuple[Path, int]:
    """A new folder beside the destination and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_temporary_prefix(name), dir=parent))
        folder.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would become the checkpoint's mode
        lock = _try_lock(folder)
        if lock is not None and folder.exists():
            return folder, lock
        # Another process took the folder for a stale one before it was locked: it is gone, or will be.
        if lock is not None:
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None if another process holds it."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        # Unlike a process id in a file, a lock ends with its process and means the same in every container.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale(parent: Path, name: str) -> None:
    for folder in parent.glob(glob.escape(_temporary_prefix(name)) + "*"):
        lock = _try_lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _flush(folder: Path) -> None:
    """Flushes every file and folder under `folder`, and itself, to the disk."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            _fsync(Path(place) / name)
        _fsync(Path(place))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_group(folder: Path, group: str, tree: Mapping[str, Planes]) -> None:
    """Writes one top-level group of parameters below `folder`.

    Args:
        folder: the checkpoint's folder.
        group: "embed", "layers_0", …
        tree: parameter path -> plane name -> array.

    Raises:
        OSError: the disk is full (errno ENOSPC) or cannot be written; the message names the group.
    """
    import orbax.checkpoint as ocp  # half a second: only for those who convert or load

    # As they are, so that they can be mapped; quantized planes would not compress anyway.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=_patient_handlers()
    )
    path = folder.absolute() / ARRAYS / group
    stored = {name.replace("/", "."): dict(planes) for name, planes in tree.items()}
    try:
        # In a thread, so that Ctrl-C reaches us and not the middle of Orbax, whose own threads would go on writing
        # into a folder that is being removed: the pool waits for the save before the interrupt goes on.
        with (
            _quiet_orbax(),
            ocp.Checkpointer(handler) as checkpointer,
            ThreadPoolExecutor(1) as pool,
        ):
            pool.submit(checkpointer.save, path, args=ocp.args.PyTreeSave(stored)).result()
    except Exception as error:  # TensorStore raises ValueError for whatever the system said
        if is_no_space(error):
            raise no_space(path, f"{group} ({', '.join(tree)})") from error
        raise OSError(f"cannot write {group} to {path}: {error}") from error


def _patient_handlers() -> Any:
    """Orbax's handler of numpy arrays, except that a failed save ends when its other writes have ended, too.

    Orbax raises the first error at once; the writes beside it would go on into a folder that is being removed, and
    would make it anew.
    """
    import orbax.checkpoint as ocp

    class AllWrites:
        def __init__(self, writes: Sequence[Any]) -> None:
            self.writes = writes

        def result(self, timeout: float | None = None) -> None:
            errors = []
            for write in self.writes:
                try:
                    write.result(timeout)
                except (
                    Exception
                ) as error:  # whatever it is: it is raised when nothing is being written
                    errors.append(error)
            if errors:
                raise errors[0]

    class PatientNumpyHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        async def serialize(
            self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
        ) -> Sequence[Any]:
            writes: list[Any] = []
            for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
                writes += await super().serialize([value], [info], [arg] if arg else None)
            return [AllWrites(writes)]

    return ocp.type_handlers.create_type_handler_registry((np.ndarray, PatientNumpyHandler()))


def read_group(folder: Path, group: str) -> dict[str, Planes]:
    """Opens what `write_group` wrote, as numpy arrays that are read when they are touched.

    Groups of earlier versions, which packed all planes into OCDBT files, are read as a whole.

    Raises:
        ValueError: the group is missing or damaged; the message names its folder or the damaged file in it.
    """
    path = folder.absolute() / ARRAYS / group
    if not path.is_dir():
        raise ValueError(f"{path} is missing: the checkpoint is incomplete")
    stored = _restore(path) if (path / "manifest.ocdbt").exists() else _map(path)
    return {name.replace(".", "/"): planes for name, planes in stored.items()}


def _map(group: Path) -> dict[str, Planes]:
    stored: dict[str, Planes] = {}
    for description in sorted(group.glob(f"*/{_ZARR}")):
        name, plane = description.parent.name.rsplit(".", 1)
        stored.setdefault(name, {})[plane] = _map_zarr(description)
    return stored


def _map_zarr(description: Path) -> np.ndarray:
    """The zarr array whose ``.zarray`` is `description` (https://zarr-specs.readthedocs.io, version 2)."""
    try:
        zarray = json.loads(description.read_bytes())
        dtype, shape = np.dtype(zarray["dtype"]), tuple(map(int, zarray["shape"]))
        is_raw = zarray["compressor"] is None and not zarray["filters"] and zarray["order"] == "C"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{description} is damaged: {error!r}") from None
    if not is_raw or zarray["chunks"] != zarray["shape"]:
        raise ValueError(f"{description} describes more than one uncompressed chunk, in row order")
    chunk = description.with_name(".".join("0" for _ in shape))
    try:
        return map_array(chunk, dtype, shape)
    except FileNotFoundError:
        raise ValueError(f"{chunk} is missing: the checkpoint is incomplete") from None


def _restore(group: Path) -> dict[str, Planes]:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    try:
        with _quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
            stored = checkpointer.restore(group)
    except Exception as error:
        raise ValueError(f"{group} is damaged: {error}") from error
    return {
        name: {plane: np.asarray(array) for plane, array in planes.items()}
        for name, planes in stored.items()
    }


def no_space(path: Path, what: str) -> OSError:
    """The error for a full disk; `what` names what was being written."""
    free = shutil.disk_usage(_existing(path)).free
    return OSError(
        errno.ENOSPC,
        f"no space left on the device while writing {what}; {free / 1e9:.2f} GB are free",
        str(path),
    )


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind `error`, or behind an error that caused it."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax, whose threads log errors that we raise, with their tracebacks."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
