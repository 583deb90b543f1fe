"""Whole conversions: values, the manifest, every error, and what is left when a conversion is stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from random_checkpoint import Tensors, random_checkpoint
from small_checkpoints import CONFIGS, in_bf16

from convert import converter, storage
from convert.converter import convert_checkpoint
from convert.load import load_checkpoint
from convert.manifest import Manifest
from gemma_jax.config import Gemma4Config
from gemma_jax.model import param_shapes
from pallas_kernels import quantize

ROOT = Path(__file__).parents[2]
Write = Callable[..., Path]


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fails(source: Path, *parts: str, error: type[Exception] = ValueError) -> None:
    """Expects one error with all `parts` in its message, in order, and nothing left beside `source`."""
    before = content(source.parent)
    with pytest.raises(error, match=".*".join(re.escape(part) for part in parts)):
        convert_checkpoint(source, source.parent / "out", format="eq8_0")
    assert content(source.parent) == before


def test_converted_values_are_those_of_the_quantizer(
    write: Write, tmp_path: Path, moe_tensors: Tensors
) -> None:
    convert_checkpoint(write(moe_tensors), tmp_path / "out", format="q4k")
    _, params, _ = load_checkpoint(tmp_path / "out")
    attention = [moe_tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    for weight, original, format in (
        (params["layers_0"]["attention"]["qkv"], np.concatenate(attention), "q4k"),
        (params["embed"]["weight"], moe_tensors["model.embed_tokens.weight"], "q6k"),
    ):
        expected = quantize(jnp.asarray(original), format)
        assert type(weight) is type(expected)
        # Programs for different shapes may break a tie between two scales differently, nothing else.
        same = np.asarray(weight.dequantize()) == np.asarray(expected.dequantize())
        assert np.mean(same) > 0.99
    norm = params["layers_1"]["input_norm"]
    np.testing.assert_array_equal(norm, moe_tensors["model.layers.1.input_layernorm.weight"])
    assert norm.dtype == jnp.bfloat16


@pytest.mark.parametrize("family", CONFIGS)
def test_bf16_round_trip_is_exact(write: Write, tmp_path: Path, family: str) -> None:
    tensors = in_bf16(random_checkpoint(CONFIGS[family]))
    source = write(tensors, CONFIGS[family])
    manifest = convert_checkpoint(source, tmp_path / "out", format="bf16")
    assert manifest.bits_per_weight == 16
    assert {entry.relative_error for entry in manifest.tensors.values()} == {0.0}
    config, params, read = load_checkpoint(tmp_path / "out")
    assert config == Gemma4Config.from_hf(CONFIGS[family])
    assert read == manifest
    _, direct, _ = load_checkpoint(source)
    for path in param_shapes(config):
        stored, expected = params, direct
        for key in path.split("/"):
            stored, expected = stored[key], expected[key]
        np.testing.assert_array_equal(np.asarray(stored), np.asarray(expected), err_msg=path)
    layer = params["layers_0"]["ffn"]["gate_up"]
    expected = [tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    np.testing.assert_array_equal(np.asarray(layer), np.concatenate(expected))


def test_the_folder_is_self_contained(write: Write, tmp_path: Path, moe_tensors: Tensors) -> None:
    source = write(moe_tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text("{}")
    (source / "README.md").write_text("not copied")
    manifest = convert_checkpoint(source, tmp_path / "out", format="bf16")
    shutil.rmtree(source)
    assert content(tmp_path / "out") == {
        "arrays", "manifest.json", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert load_checkpoint(tmp_path / "out")[2] == manifest


def test_the_manifest_tells_formats_errors_and_bits(
    write: Write, tmp_path: Path, moe_tensors: Tensors
) -> None:
    manifest = convert_checkpoint(write(moe_tensors), tmp_path / "out", format="q4k")
    entries = manifest.tensors
    assert entries["embed/weight"].format == "q6k"
    assert entries["layers_0/moe/gate_up"].format == "q4k"
    assert entries["layers_0/moe/gate_up"].shape == (8, 64, 64)
    assert entries["layers_0/moe/router"].format == "bfloat16"
    assert entries["final_norm"].relative_error == 0
    # Uniform rounding to 4 and 6 bits within blocks of normal numbers: a few per cent, and a quarter of that.
    assert 0.03 < entries["layers_1/ffn/down"].relative_error < 0.12
    assert 0.005 < entries["embed/weight"].relative_error < 0.03
    assert manifest.parameters == sum(a.size for a in moe_tensors.values())
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written["parameters"] == manifest.parameters
    assert written["bits_per_weight"] == pytest.approx(manifest.bits_per_weight, abs=1e-4)
    assert 4.5 < manifest.bits_per_weight < 6.6
    assert manifest.source == "source"


def test_sharded_and_single_files_convert_to_the_same(
    write: Write, tmp_path: Path, moe_tensors: Tensors
) -> None:
    single = convert_checkpoint(write(moe_tensors), tmp_path / "a", format="bf16")
    sharded = convert_checkpoint(
        write(moe_tensors, shards=3, name="sharded"), tmp_path / "b", format="bf16"
    )
    assert sharded.tensors == single.tensors
    assert sharded.source_hash == single.source_hash
    for group in ("embed", "layers_0", "final_norm"):
        one, other = (storage.read_group(tmp_path / name, group) for name in "ab")
        for path, planes in one.items():
            np.testing.assert_array_equal(planes["value"], other[path]["value"])


def test_the_source_hash_sees_every_byte(
    write: Write, tmp_path: Path, moe_tensors: Tensors
) -> None:
    first = convert_checkpoint(write(moe_tensors), tmp_path / "a", format="bf16")
    moe_tensors["model.layers.1.layer_scalar"][0] *= 2
    changed = convert_checkpoint(write(moe_tensors, name="b"), tmp_path / "c", format="bf16")
    assert first.source_hash.startswith("sha256:")
    assert changed.source_hash != first.source_hash


def test_existing_destination_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        convert_checkpoint(tmp_path / "absent", tmp_path / "out", format="q4k")


def test_unknown_format_is_refused(write: Write, moe_tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q4k, eq8_0, bf16.*'q8'"):
        convert_checkpoint(write(moe_tensors), tmp_path / "out", format="q8")


def test_damaged_checkpoints_leave_nothing(write: Write, moe_tensors: Tensors) -> None:
    name = "model.layers.2.experts.down_proj"
    good = moe_tensors[name]
    missing = {key: a for key, a in moe_tensors.items() if key != name}
    fails(write(missing, name="missing"), name, "missing")
    fails(write(moe_tensors | {"model.extra": good}, name="extra"), "model.extra", "safetensors")
    misshaped = moe_tensors | {name: good[:, :, :-1].copy()}
    fails(write(misshaped, name="misshaped"), name, "(8, 64, 31)", "(8, 64, 32)")
    integers = moe_tensors | {name: good.astype(np.int8)}
    fails(write(integers, name="integers"), name, "I8")
    nan = good.copy()
    nan[3, 2, 1] = np.nan
    fails(write(moe_tensors | {name: nan}, name="nan"), name, "safetensors holds nan", "[3, 2, 1]")
    truncated = write(moe_tensors, name="truncated")
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails(truncated, str(file), "truncated")
    sharded = write(moe_tensors, shards=3, name="sharded")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    fails(sharded, "model-00002-of-00003.safetensors", error=FileNotFoundError)
    no_config = write(moe_tensors, name="no_config")
    (no_config / "config.json").unlink()
    fails(no_config, "no config.json", error=FileNotFoundError)


def test_rows_that_blocks_do_not_divide_are_named(write: Write) -> None:
    config = CONFIGS["e_type"] | {"hidden_size_per_layer_input": 16}
    source = write(in_bf16(random_checkpoint(config)), config)
    fails(source, "layers_0/ple/projection", "(64, 16)", "multiple of 32")


def test_disk_too_small_is_noticed_at_once(
    write: Write, moe_tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(converter, "_write_arrays", lambda *_: pytest.fail("must not start"))
    fails(write(moe_tensors), "no space left", "a checkpoint of", error=OSError)


def run(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


CONVERT = """
import sys
from convert.converter import convert_checkpoint
convert_checkpoint(sys.argv[1], sys.argv[2], format="bf16")
"""

# Stands still within the save of the first group, in the thread Orbax runs in, until the file sys.argv[3] is there.
STOPPING_WITHIN_A_SAVE = (
    """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
import orbax.checkpoint as ocp
save = ocp.Checkpointer.save
def save_and_wait(*arguments, **options):
    save(*arguments, **options)
    while not Path(sys.argv[3]).exists():
        time.sleep(0.01)
ocp.Checkpointer.save = save_and_wait
"""
    + CONVERT
)

# No file may grow beyond 30 kB: a real failure in the middle of a write.
LIMITED = (
    """
import resource, sys
from convert import converter
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
"""
    + CONVERT
)

# The same, but small planes are still being written when a large one has failed, as on a busy disk.
LIMITED_AND_SLOW = (
    """
import asyncio, threading, time
from concurrent.futures import Future
import orbax.checkpoint as ocp
write = ocp.type_handlers.NumpyHandler._open_and_write
async def write_slowly(self, value, *where):
    if value.nbytes > 20_000:
        return await write(self, value, *where)
    written = Future()
    def work():
        time.sleep(0.5)
        written.set_result(asyncio.run(write(self, value, *where)))
    threading.Thread(target=work).start()
    await asyncio.wrap_future(written)
ocp.type_handlers.NumpyHandler._open_and_write = write_slowly
"""
    + LIMITED
)

ON_A_FULL_DISK = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", sys.argv[2]], check=True)
from pathlib import Path
from convert import converter
converter._check_space = lambda *_: None  # the disk fills while the arrays are written
try:
    converter.convert_checkpoint(sys.argv[1], sys.argv[2] + "/out", format="bf16")
except OSError as error:
    print(error.errno, error, list(Path(sys.argv[2]).iterdir()), file=sys.stderr)
"""


@pytest.mark.parametrize("script", [LIMITED, LIMITED_AND_SLOW], ids=["fast", "slow"])
def test_a_write_that_fails_leaves_nothing(write: Write, moe_tensors: Tensors, script: str) -> None:
    source = write(moe_tensors)
    process = run(script, source, source.parent / "out")
    _, message = process.communicate()
    assert process.returncode == 1
    assert "OSError: cannot write" in message
    assert content(source.parent) == {"source"}


def test_a_disk_that_fills_up_gives_one_error_and_is_left_empty(
    write: Write, tmp_path: Path
) -> None:
    sandbox = ("unshare", "--user", "--map-root-user", "--mount")
    try:
        subprocess.run([*sandbox, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let a test mount a small disk")
    config = CONFIGS["moe"] | {"vocab_size": 16_384, "vocab_size_per_layer_input": 16_384}
    source = write(in_bf16(random_checkpoint(config)), config)  # the embedding alone is 2 MB
    (tmp_path / "disk").mkdir()
    _, message = run(ON_A_FULL_DISK, source, tmp_path / "disk", prefix=sandbox).communicate()
    line = message.strip().splitlines()[-1]
    assert line.startswith(f"{errno.ENOSPC} [Errno {errno.ENOSPC}] no space left")
    assert "embed (embed/weight)" in line
    assert line.endswith("[]")


def wait_for_arrays(folder: Path, process: subprocess.Popen[str]) -> Path:
    """Waits until the conversion has written its first group."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := list(folder.glob(".out.unfinished-*/arrays/embed")):
            return found[0].parents[1]
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    raise TimeoutError("no array was written")


def test_kill_9_leaves_no_folder_that_loads(
    write: Write, tmp_path: Path, moe_tensors: Tensors
) -> None:
    source = write(moe_tensors)
    process = run(STOPPING_WITHIN_A_SAVE, source, tmp_path / "out", tmp_path / "go on")
    unfinished = wait_for_arrays(tmp_path, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert content(tmp_path) == {"source", unfinished.name}
    with pytest.raises(FileNotFoundError):
        load_checkpoint(unfinished)
    manifest = convert_checkpoint(source, tmp_path / "out", format="bf16")
    assert content(tmp_path) == {"source", "out"}
    assert Manifest.read(tmp_path / "out") == manifest


def test_an_interrupt_leaves_nothing(write: Write, tmp_path: Path, moe_tensors: Tensors) -> None:
    go_on = tmp_path / "go on"
    process = run(STOPPING_WITHIN_A_SAVE, write(moe_tensors), tmp_path / "out", go_on)
    wait_for_arrays(tmp_path, process)
    process.send_signal(signal.SIGINT)
    go_on.touch()
    _, message = process.communicate()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in message
    assert content(tmp_path) == {"source", go_on.name}


def test_progress_is_told_on_standard_error(
    write: Write, tmp_path: Path, moe_tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(moe_tensors)
    convert_checkpoint(source, tmp_path / "a", format="bf16", progress=True)
    out, err = capsys.readouterr()
    total = sum(a.nbytes for a in moe_tensors.values())
    assert err.splitlines()[-1].startswith(f"convert: 100% of {total / 1e6:.0f} MB")
    assert err.rstrip().endswith("0 s left")
    convert_checkpoint(source, tmp_path / "b", format="bf16")  # no terminal, not asked for
    assert out + "".join(capsys.readouterr()) == ""


def test_float32_is_stored_rounded_under_bf16(write: Write, tmp_path: Path) -> None:
    tensors = {name: a / 3 for name, a in random_checkpoint(CONFIGS["k_eq_v"]).items()}
    source = write(tensors, CONFIGS["k_eq_v"])
    manifest = convert_checkpoint(source, tmp_path / "out", format="bf16")
    assert 0 < manifest.tensors["embed/weight"].relative_error < 2**-8
    _, params, _ = load_checkpoint(tmp_path / "out")
    expected = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["embed"]["weight"]), expected)
    assert params["final_norm"].dtype == jnp.float32
