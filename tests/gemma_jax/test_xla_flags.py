"""XLA's flags: set in time, the user's kept, and what they are for."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from gemma_jax import xla_flags

ALL = " ".join(f"--{name}={value}" for name, value in xla_flags.FLAGS.items())


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("", ALL),
        (ALL, ALL),
        ("--xla_dump_to=/tmp/x", f"--xla_dump_to=/tmp/x {ALL}"),
        (
            "--xla_gpu_graph_min_graph_size=5",
            "--xla_gpu_graph_min_graph_size=5 --xla_gpu_enable_command_buffer=+WHILE "
            "--xla_backend_extra_options=-nvptx-fma-level=2",
        ),
    ],
)
def test_flags_that_are_named_already_stay(given: str, want: str) -> None:
    assert xla_flags.with_defaults(given) == want


@pytest.mark.parametrize(("platforms", "want"), [("cpu", ""), ("cuda", ALL), ("cuda,cpu", ALL)])
def test_importing_the_package_sets_them_where_cuda_may_be_used(platforms: str, want: str) -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = "import gemma_jax, os; print(os.environ.get('XLA_FLAGS', ''))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == want


def test_a_gpu_that_has_started_without_them_is_worth_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(xla_flags, "_may_use_cuda", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xla_flags.enable()  # the backend that has started is a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(RuntimeWarning, match="XLA_FLAGS='--xla_gpu_enable_command_buffer"):
        xla_flags.enable()
    assert os.environ["XLA_FLAGS"] == ""


COMPILE = """
import sys
import jax, jax.numpy as jnp
import gemma_jax
from bench import aot
from bench.published import published
from bench.random_weights import abstract_params
config = published("e4b", 2)
model = gemma_jax.Gemma4(config, jnp.bfloat16, "xla")
sampling = gemma_jax.stack_sampling(
    [gemma_jax.Sampling(temperature=1.0, top_p=0.9)], max_new_tokens=8, vocab_size=config.vocab_size)
shape = jax.ShapeDtypeStruct
aot.compile_for(
    "h200",
    lambda *a: gemma_jax.generate(*a, model=model, max_new_tokens=8, capacity=64),
    abstract_params(config, "q4k"), shape((1, 16), jnp.int32), shape((1,), jnp.int32),
    jax.tree.map(lambda x: shape(x.shape, x.dtype), sampling),
)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("flags", [ALL, "--xla_gpu_graph_min_graph_size=5"])
def test_generate_becomes_one_cuda_graph(tmp_path: Path, flags: str) -> None:
    """Prefill, the loop over tokens and the sampler with its conditions, as XLA will run them on an H200."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    environment = {"XLA_FLAGS": f"{flags} --xla_dump_to={tmp_path}", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", COMPILE], env=os.environ | environment, check=True)
    [dump] = tmp_path.glob("*.jit_*.thunk_sequence_after_thunk_passes.txt")
    lines = dump.read_text().splitlines()
    steps = [line for line in lines if line[:1].isdigit()]
    graphs = [line for line in lines if "kCommandBuffer" in line]
    assert (len(steps) == len(graphs) == 1) == (flags == ALL)
