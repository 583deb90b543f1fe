"""Files of measured block sizes: read strictly, used on the device that they are of."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.packed import PACKED
from pallas_kernels.quantized_matmul import mosaic_decode
from pallas_kernels.quantized_matmul.mosaic_decode import Config
from pallas_kernels.tuning import Key

DEVICE = "NVIDIA Test 1"
KEY = Key("quantized_matmul.mosaic_decode", "q4k", 8, (48, 256))
CONTENT: dict[str, Any] = {
    "device": DEVICE,
    "measured": {"commit": "abc"},
    "configs": [
        {
            "kernel": KEY.kernel,
            "format": "q4k",
            "rows": 8,
            "shape": [48, 256],
            "config": {"tiles": 2, "warpgroups": 3, "ctas": 7, "units": 1},
        }
    ],
}


def _changed(path: str, value: Any) -> dict[str, Any]:
    """CONTENT with another value (or none, for ...) at a path of keys and indices."""
    content = copy.deepcopy(CONTENT)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    at: Any = content
    for parent in parents:
        at = at[parent]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return content


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tuning.path_of(DEVICE, tmp_path)
    configs = {KEY: Config(2, 3, 7), KEY._replace(rows=1): Config(4, 4, 132)}
    tuning.dump(path, DEVICE, {"commit": "abc"}, configs)
    assert tuning.load(path, DEVICE) == configs
    assert [p.name for p in tmp_path.iterdir()] == ["nvidia_test_1.json"]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ("extra", 1, "the file has an unknown key 'extra'"),
        ("configs", ..., "the file has no 'configs'"),
        ("configs", {}, r"the file.configs = \{\}: expected a list"),
        ("device", "NVIDIA Other", "device = 'NVIDIA Other': expected 'NVIDIA Test 1'"),
        ("configs.0", 3, r"configs\[0\] is no JSON object"),
        ("configs.0.note", "", r"configs\[0\] has an unknown key 'note'"),
        ("configs.0.rows", "8", r"configs\[0\].rows = '8': expected an integer"),
        ("configs.0.rows", 0, r"configs\[0\].rows = 0: expected an integer of 1 or more"),
        ("configs.0.rows", True, r"configs\[0\].rows = True: expected an integer"),
        ("configs.0.format", "q5k", r"configs\[0\].format = 'q5k': expected one of q4k"),
        ("configs.0.shape", [48], r"configs\[0\].shape = \[48\]: expected \[..., N, K\]"),
        ("configs.0.shape", [48, 2.5], r"configs\[0\].shape\[1\] = 2.5: expected an integer"),
        ("configs.0.kernel", "quantized_matmul.cuda", r"configs\[0\].kernel = .*expected a module"),
        ("configs.0.kernel", "no_op.mosaic", r"configs\[0\].kernel = .*expected a module"),
        ("configs.0.kernel", "quantized_matmul.cases", r"configs\[0\].kernel = .*defines a Config"),
        ("configs.0.config.tiles", ..., r"configs\[0\].config has no 'tiles'"),
        ("configs.0.config.stages", 2, r"configs\[0\].config has an unknown key 'stages'"),
        ("configs.0.config.ctas", -1, r"configs\[0\].config.ctas = -1: expected an integer of 1"),
        ("configs.0.config.tiles", 5, r"configs\[0\].config: tiles = 5, warpgroups = 3: expected"),
    ],
)
def test_anything_else_is_an_error_that_names_file_and_key(
    tmp_path: Path, at: str, value: Any, message: str
) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(_changed(at, value)))
    with pytest.raises(ValueError, match=rf"^{path}: {message}"):
        tuning.load(path, DEVICE)


def test_two_configs_of_one_call_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(CONTENT | {"configs": 2 * CONTENT["configs"]}))
    with pytest.raises(ValueError, match=r"configs\[1\] is of the same call"):
        tuning.load(path, DEVICE)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"^{path} is not valid JSON"):
        tuning.load(path, DEVICE)


@pytest.fixture
def tuned_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU named DEVICE with a file of its own."""

    class Device:
        device_kind = DEVICE

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    path = tuning.path_of(DEVICE, tmp_path)
    path.write_text(json.dumps(CONTENT))
    monkeypatch.setattr(tuning, "path_of", lambda device: path)
    tuning._configs_of.cache_clear()
    yield
    tuning._configs_of.cache_clear()


def _config(rows: int, shape: tuple[int, ...]) -> Config:
    x = jax.ShapeDtypeStruct((rows, shape[-1]), jnp.bfloat16)
    return mosaic_decode.default_config(x, PACKED["q4k"].abstract(shape))


@pytest.mark.usefixtures("tuned_device")
def test_a_kernel_takes_what_was_measured_for_its_weights() -> None:
    measured = Config(2, 3, 7)
    assert _config(8, (48, 256)) == measured
    assert _config(3, (48, 256)) == measured  # the fewest rows that are at least three
    assert _config(9, (48, 256)) != measured
    assert _config(8, (64, 256)) != measured


def test_without_a_gpu_nothing_is_looked_up() -> None:
    assert _config(8, (48, 256)) == Config(1, 4, 132)


def test_a_kernel_has_as_many_warps_as_its_registers_leave_room_for() -> None:
    """Q6K's four planes and what they are multiplied by do not fit the 128 registers that 16 warps leave a lane."""
    x = jnp.zeros((1, 2560), jnp.bfloat16)
    for weight_format, warps in (("q4k", 16), ("eq8_0", 16), ("q6k", 12)):
        config = mosaic_decode.default_config(x, PACKED[weight_format].abstract((4096, 2560)))
        assert (4 * config.warpgroups, warps % config.tiles) == (warps, 0)


def test_the_files_of_the_package_are_sound() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert path == tuning.path_of(device)
        tuning.load(path, device)


def test_every_config_that_is_offered_is_one_that_the_kernel_takes() -> None:
    offered = mosaic_decode.configs(jnp.zeros((1, 256)), jnp.zeros((48, 256)))
    assert len(set(offered)) == len(offered) > 1
