"""Loading converted folders, Hugging Face folders and hub ids, and describing them without loading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoint import Tensors, random_checkpoint
from small_checkpoints import CONFIGS, in_bf16

from convert import storage
from convert.converter import convert_checkpoint
from convert.load import describe, load_checkpoint
from convert.manifest import Manifest
from gemma_jax.config import Gemma4Config
from gemma_jax.model import param_shapes
from pallas_kernels import EQ8_0

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder of a mixture-of-experts model, and the same in eQ8_0."""
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("load")
    source = root / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIGS["moe"]))
    save_file(in_bf16(random_checkpoint(CONFIGS["moe"])), source / "model.safetensors")
    convert_checkpoint(source, root / "converted", format="eq8_0")
    return source, root / "converted"


@pytest.fixture
def copy(converted: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the converted folder, to be damaged."""
    return Path(shutil.copytree(converted[1], tmp_path / "copy"))


def paths(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree as a flat dict of paths."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= (
            paths(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def test_loading_with_a_format_gives_what_converting_gives(converted: tuple[Path, Path]) -> None:
    source, folder = converted
    config, params, manifest = load_checkpoint(folder)
    same_config, direct, none = load_checkpoint(source, format="eq8_0")
    assert config == same_config
    assert manifest is not None
    assert none is None
    assert isinstance(params["layers_0"]["moe"]["gate_up"], EQ8_0)
    jax.tree.map(np.testing.assert_array_equal, params, direct)


def test_the_tree_has_the_models_paths_and_shapes(converted: tuple[Path, Path]) -> None:
    for folder in converted:
        config, params, _ = load_checkpoint(folder)
        shapes = {path: weight.shape for path, weight in paths(params).items()}
        assert shapes == {path: spec.shape for path, spec in param_shapes(config).items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_without_a_format_a_checkpoint_keeps_its_dtype(write: Write, dtype: Any) -> None:
    tensors = {name: a.astype(dtype) for name, a in random_checkpoint(CONFIGS["moe"]).items()}
    _, params, _ = load_checkpoint(write(tensors))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    expected = tensors["model.layers.3.experts.down_proj"]
    np.testing.assert_array_equal(np.asarray(params["layers_3"]["moe"]["down"]), expected)


def test_a_converted_folder_loads_in_its_own_format_only(converted: tuple[Path, Path]) -> None:
    load_checkpoint(converted[1], format="eq8_0")
    with pytest.raises(ValueError, match="converted to eq8_0; it cannot be loaded as q4k"):
        load_checkpoint(converted[1], format="q4k")
    with pytest.raises(ValueError, match="'q9'"):
        load_checkpoint(converted[0], format="q9")


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        load_checkpoint(tmp_path / "file")


def test_missing_and_damaged_groups_are_named(copy: Path) -> None:
    shutil.rmtree(copy / "arrays" / "layers_2")
    with pytest.raises(ValueError, match=r"arrays/layers_2 is missing"):
        load_checkpoint(copy)
    plane = copy / "arrays" / "layers_1" / "layers_1.ffn.down.scale"
    os.truncate(plane / "0.0", 1)
    with pytest.raises(ValueError, match=rf"{plane}/0\.0 has 1 bytes"):
        load_checkpoint(copy)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tensors"].pop("layers_1/ffn/down"), "lacks parameter layers_1/ffn/down"),
        (lambda m: m["tensors"].update(x=m["tensors"]["final_norm"]), "has.* parameter x"),
        (lambda m: m["tensors"]["final_norm"].update(shape=[65]), r"final_norm shape \(65,\).*64"),
        (lambda m: m.update(format_version=2), "format_version 2.*reads 1"),
        (lambda m: m.pop("format"), "damaged.*format"),
        (lambda m: m["tensors"].update(final_norm=3), "damaged"),
        (lambda m: m.clear(), "not a manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(
    copy: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_manifest(copy, change)
    for read in (load_checkpoint, describe):
        with pytest.raises(ValueError, match=f"manifest.json.*{message}"):
            read(copy)


def test_a_manifest_cut_short_is_named(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[:100])
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        load_checkpoint(copy)


def test_arrays_that_differ_from_the_manifest_are_named(copy: Path) -> None:
    tree = storage.read_group(copy, "layers_1")
    shutil.rmtree(copy / "arrays" / "layers_1")
    scale = tree["layers_1/ffn/down"]["scale"]
    tree["layers_1/ffn/down"]["scale"] = scale[:, :-1]
    storage.write_group(copy, "layers_1", tree)
    with pytest.raises(ValueError, match=r"layers_1/ffn/down.*scale"):
        load_checkpoint(copy)
    shutil.rmtree(copy / "arrays" / "layers_1")
    del tree["layers_1/ffn/down"]
    storage.write_group(copy, "layers_1", tree)
    with pytest.raises(ValueError, match=r"layers_1/ffn/down"):
        load_checkpoint(copy)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have memory of their own")
def test_the_weights_of_a_converted_folder_are_its_files(
    converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = set()

    def read_group(folder: Path, group: str) -> dict[str, storage.Planes]:
        tree = storage.read_group(folder, group)
        mapped.update(plane.ctypes.data for plane in jax.tree.leaves(tree))
        return tree

    monkeypatch.setattr("convert.load.read_group", read_group)
    _, params, _ = load_checkpoint(converted[1])
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)} == mapped


def test_describing_reads_no_arrays(
    converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, moe_tensors: Tensors
) -> None:
    source, folder = converted
    monkeypatch.setattr(storage, "read_group", None)
    monkeypatch.setattr("convert.load.read_group", None)
    monkeypatch.setattr("convert.safetensors_source.SafetensorsSource.read_elements", None)
    described = describe(folder)
    assert described.converted
    assert described.manifest == Manifest.read(folder)
    assert described.config == Gemma4Config.from_hf(CONFIGS["moe"])
    plain = describe(source)
    assert not plain.converted
    assert plain.manifest.format == "bfloat16"
    assert plain.manifest.nbytes == sum(a.nbytes for a in moe_tensors.values())
    assert plain.manifest.bits_per_weight == 16
    assert plain.manifest.tensors.keys() == described.manifest.tensors.keys()


def test_the_manifest_counts_the_bytes_that_are_loaded(converted: tuple[Path, Path]) -> None:
    _, params, manifest = load_checkpoint(converted[1])
    assert manifest is not None
    assert manifest.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for path, weight in paths(params).items():
        assert manifest.tensors[path].nbytes == weight.nbytes, path


def test_hub_ids_are_fetched(
    converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append(repository)
        assert "*.safetensors" in options["allow_patterns"]
        return str(converted[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    _, params, _ = load_checkpoint("org/a-model")
    assert "embed" in params
    manifest = convert_checkpoint("org/a-model", tmp_path / "out", format="bf16")
    assert asked == ["org/a-model"] * 2
    assert manifest.source == "org/a-model"


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repository: str, **options: Any) -> str:
        raise ConnectionError("no route to host\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(OSError, match=r"org/a-model.*hub: ConnectionError: no route to host$"):
        load_checkpoint("org/a-model")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder a/b/c"):
        load_checkpoint("a/b/c")
