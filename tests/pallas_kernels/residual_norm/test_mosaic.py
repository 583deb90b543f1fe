"""The kernel of ``residual_norm`` as GPUs get it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pallas_kernels.residual_norm.cases import CASES

_COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from bench import aot, static_kernels
from pallas_kernels.residual_norm import Pending, residual_norm
from pallas_kernels.residual_norm.cases import CASES

jax.config.update("jax_platforms", "cpu")
for case in CASES.values():
    row = jax.ShapeDtypeStruct((1, 1, case.hidden), jnp.float32)
    weight = jax.ShapeDtypeStruct((case.hidden,), jnp.bfloat16)
    scalar = jax.ShapeDtypeStruct((1,), jnp.float32) if case.scalar else None
    stream = Pending(row, ((row, weight),) * case.branches, weight if case.outer else None, scalar)
    call = lambda *a: residual_norm(*a, dtype=jnp.bfloat16, implementation="mosaic")
    with static_kernels.dumped() as folder:
        aot.compile_for(sys.argv[1], call, stream, (weight,) * case.norms)
        [machine] = static_kernels.read_dumps(folder)
    print(json.dumps([machine.registers, machine.spill_bytes]))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["h200", "b200", "gb10"])
def test_every_case_is_one_kernel_without_spills(target: str) -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    command = [sys.executable, "-c", _COMPILE, target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    machines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(machines) == len(CASES)
    assert all(registers <= 160 and spilled == 0 for registers, spilled in machines), machines
