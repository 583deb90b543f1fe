"""Folders that appear whole or not at all, and groups of arrays through Orbax."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert.storage import Planes, atomic_folder, read_group, write_group


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def group(numbers: np.random.Generator) -> dict[str, Planes]:
    codes = numbers.integers(0, 2**32, (7, 5), dtype=np.uint32)
    return {
        "layers_0/ffn/down": {"codes": codes, "d": np.ones((7, 1), np.float16)},
        "layers_0/input_norm": {"value": numbers.normal(size=3).astype(ml_dtypes.bfloat16)},
        "layers_0/moe/down": {"scales": numbers.integers(-9, 9, (2, 3, 4), dtype=np.int8)},
    }


def test_groups_come_back_bit_by_bit(tmp_path: Path, numbers: np.random.Generator) -> None:
    stored = group(numbers)
    write_group(tmp_path, "layers_0", stored)
    read = read_group(tmp_path, "layers_0")
    assert read.keys() == stored.keys()
    for path, planes in stored.items():
        assert read[path].keys() == planes.keys()
        for name, plane in planes.items():
            assert read[path][name].dtype == plane.dtype
            np.testing.assert_array_equal(read[path][name], plane)


def test_a_group_is_an_orbax_checkpoint(tmp_path: Path, numbers: np.random.Generator) -> None:
    stored = group(numbers)
    write_group(tmp_path, "layers_0", stored)
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "arrays" / "layers_0")
    for path, planes in stored.items():
        for name, plane in planes.items():
            np.testing.assert_array_equal(restored[path.replace("/", ".")][name], plane)


def write_packed(folder: Path, name: str, tree: dict[str, Planes]) -> None:
    """Writes a group as earlier versions did."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
    stored = {path.replace("/", "."): planes for path, planes in tree.items()}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "arrays" / name, args=ocp.args.PyTreeSave(stored))


def test_groups_packed_by_earlier_versions_are_read(
    tmp_path: Path, numbers: np.random.Generator
) -> None:
    stored = group(numbers)
    write_packed(tmp_path, "layers_0", stored)
    jax.tree.map(np.testing.assert_array_equal, read_group(tmp_path, "layers_0"), stored)


def test_damaged_groups_of_earlier_versions_are_named(tmp_path: Path) -> None:
    # One array: of several, TensorStore would go on reporting to an event loop that the first error has closed.
    write_packed(tmp_path, "final_norm", {"final_norm": {"value": np.ones(3, np.float32)}})
    cut_short(tmp_path / "arrays" / "final_norm" / "manifest.ocdbt")
    with pytest.raises(ValueError, match=r"arrays/final_norm is damaged"):
        read_group(tmp_path, "final_norm")


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def compress(path: Path) -> None:
    path.write_text(path.read_text().replace('"compressor":null', '"compressor":{"id":"zstd"}'))


def split(path: Path) -> None:
    path.write_text(path.read_text().replace('"chunks":[7,5]', '"chunks":[7,1]'))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("0.0", cut_short, r"codes/0.0 has 139 bytes, but uint32\[7, 5\] takes 140"),
        ("0.0", Path.unlink, "codes/0.0 is missing"),
        (".zarray", cut_short, r"codes/\.zarray is damaged"),
        (".zarray", compress, r"codes/\.zarray.*one uncompressed chunk"),
        (".zarray", split, r"codes/\.zarray.*one uncompressed chunk"),
    ],
)
def test_damaged_planes_are_named(
    tmp_path: Path,
    numbers: np.random.Generator,
    file: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    write_group(tmp_path, "layers_0", group(numbers))
    damage(tmp_path / "arrays" / "layers_0" / "layers_0.ffn.down.codes" / file)
    with pytest.raises(ValueError, match=rf"arrays/layers_0/layers_0\.ffn\.down\.{message}"):
        read_group(tmp_path, "layers_0")


def test_missing_groups_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arrays/layers_0 is missing"):
        read_group(tmp_path, "layers_0")


def test_folder_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    destination = tmp_path / "x"
    with atomic_folder(destination) as folder:
        assert folder.parent == tmp_path
        (folder / "file").write_text("text")
        assert not destination.exists()
    assert content(tmp_path) == ["x"]
    assert content(destination) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "x") as folder:
            (folder / "file").write_text("text")
            raise error

    with pytest.raises(error):
        fail()
    assert content(tmp_path) == []


def test_existing_destination_is_refused_and_kept(tmp_path: Path) -> None:
    destination = tmp_path / "x"
    destination.mkdir()
    with pytest.raises(FileExistsError, match=str(destination)), atomic_folder(destination):
        pytest.fail("the block must not run")
    assert content(tmp_path) == ["x"]


def test_destination_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    theirs = tmp_path / "x" / "theirs"
    with pytest.raises(FileExistsError, match="meanwhile"), atomic_folder(tmp_path / "x"):
        theirs.mkdir(parents=True)
    assert content(tmp_path) == ["x"]
    assert theirs.exists()


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), atomic_folder(tmp_path / "absent" / "x"):
        pytest.fail("the block must not run")


HOLD = """
import sys
from pathlib import Path
from convert.storage import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_folders_of_dead_processes_are_removed_those_of_living_ones_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "x")]
    # The repository's root is where its packages are imported from.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        (unfinished,) = tmp_path.iterdir()
        other = tmp_path / ".y.unfinished-a"  # of a conversion to another destination
        other.mkdir()
        with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x"):
            raise RuntimeError
        assert unfinished.exists()
    finally:
        process.kill()
        process.communicate()
    assert unfinished.exists()
    with atomic_folder(tmp_path / "x"):
        assert not unfinished.exists()
    assert content(tmp_path) == [".y.unfinished-a", "x"]


def test_the_folder_has_the_rights_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_full_disk_without_a_file_name_gets_the_destination(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"no space left.*writing x") as caught,
        atomic_folder(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    assert content(tmp_path) == []
