"""Files as arrays, without a descriptor, for as long as the array lives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from convert.mapping import map_array

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def written(folder: Path, numbers: np.random.Generator) -> tuple[Path, np.ndarray]:
    values = numbers.standard_normal((30, 70)).astype(ml_dtypes.bfloat16)
    values.tofile(folder / "file")
    return folder / "file", values


def test_an_array_is_what_the_file_holds(tmp_path: Path, numbers: np.random.Generator) -> None:
    path, values = written(tmp_path, numbers)
    mapped = map_array(path, values.dtype, values.shape)
    path.unlink()  # the mapping stays
    np.testing.assert_array_equal(mapped, values)
    assert mapped.dtype == values.dtype
    with pytest.raises(ValueError, match="read-only"):
        mapped[0, 0] = 1


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named(
    tmp_path: Path, numbers: np.random.Generator, change: int
) -> None:
    path, values = written(tmp_path, numbers)
    os.truncate(path, values.nbytes + change)
    with pytest.raises(ValueError, match=rf"file has {4200 + change} bytes.*\[30, 70\] takes 4200"):
        map_array(path, values.dtype, values.shape)


def test_a_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    size = tmp_path.stat().st_size
    with pytest.raises(OSError, match=str(tmp_path)):
        map_array(tmp_path, np.dtype(np.uint8), (size,))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory of their own")
def test_jax_takes_the_mapping_without_a_copy_and_keeps_it(
    tmp_path: Path, numbers: np.random.Generator
) -> None:
    path, values = written(tmp_path, numbers)
    mapped = map_array(path, values.dtype, values.shape)
    address = mapped.ctypes.data
    on_device = jax.device_put(mapped)
    del mapped
    assert on_device.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(on_device, values)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory of their own")
def test_donating_a_mapped_array_does_not_write_to_the_file(
    tmp_path: Path, numbers: np.random.Generator
) -> None:
    path, values = written(tmp_path, numbers)
    mapped = jax.device_put(map_array(path, values.dtype, values.shape))
    jax.jit(lambda x: x + 1, donate_argnums=0)(mapped).block_until_ready()
    np.testing.assert_array_equal(map_array(path, values.dtype, values.shape), values)


@on_linux
def test_a_mapping_holds_no_descriptor_and_ends_with_the_array(
    tmp_path: Path, numbers: np.random.Generator
) -> None:
    path, values = written(tmp_path, numbers)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    mapped = map_array(path, values.dtype, values.shape)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert str(path) in Path("/proc/self/maps").read_text()
    row = mapped[3]
    del mapped
    assert str(path) in Path("/proc/self/maps").read_text()
    del row
    assert str(path) not in Path("/proc/self/maps").read_text()
