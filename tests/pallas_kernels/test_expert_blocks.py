"""Blocks of pairs of one expert: each pair once; and what the kernels over them are once compiled for an H200."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_blocks import SortedBlocks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 8, 16])
@pytest.mark.parametrize(
    "ids",
    [[3] * 40, [0, 5] * 20, [5, 4, 3, 2, 1, 0], [0] * 16 + [1] * 17, [2]],
    ids=["one_expert", "first_and_last", "one_each", "full_blocks", "one_pair"],
)
def test_every_pair_is_in_one_block_of_its_expert(ids: list[int], size: int) -> None:
    blocks = SortedBlocks.of(jnp.array(ids, jnp.int32), 6, size)
    table, order = (np.asarray(t) for t in blocks.tables)
    used = int(table[0, 3])
    assert used == sum(-(-ids.count(e) // size) for e in set(ids)) <= blocks.most == len(table)
    seen = []
    for expert, first, end, _ in table[:used]:
        assert 0 < end - first <= size
        assert {ids[pair] for pair in order[first:end]} == {expert}
        seen += list(order[first:end])
    assert sorted(seen) == list(range(len(ids)))
    # Those not in use can be read, too.
    assert np.all((table[:, 0] >= 0) & (table[:, 0] < 6))
    assert np.all((table[:, 1] >= 0) & (table[:, 1] < table[:, 2]) & (table[:, 2] <= len(ids)))


_COMPILE = """
import json, jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from bench import aot
from pallas_kernels import PACKED, expert_down, expert_gate_up

def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)

def weight(weight_format, shape):
    return array(shape, jnp.bfloat16) if weight_format == "bf16" else PACKED[weight_format].abstract(shape)

def compiled(op, *arguments):
    run = lambda *a: op(*a, implementation="mosaic")
    return aot.compile_for("h200", run, *arguments).memory_analysis().temp_size_in_bytes

for name in ("q4k", "eq8_0", "bf16"):
    up, down = weight(name, (128, 1408, 2816)), weight(name, (128, 2816, 704))
    for tokens in (1, 8, 16, 512):
        ids = array((tokens, 8), jnp.int32)
        x, scale = array((tokens, 2816), jnp.bfloat16), array((tokens,), jnp.float32)
        h, weights = array((tokens, 8, 704), jnp.bfloat16), array((tokens, 8), jnp.float32)
        temporaries = [compiled(expert_gate_up, x, up, ids, scale), compiled(expert_down, h, down, ids, weights)]
        print(json.dumps([tokens, *temporaries]))
"""


@pytest.mark.heavy
def test_kernels_of_26b_a4b_spill_no_register_and_copy_no_weight(tmp_path: Path) -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(tmp_path)}
    command = [sys.executable, "-c", _COMPILE]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 12
    for tokens, up, down in lines:
        # Tables of a few words a row, and beyond 8 tokens the products of down before they are added up. With many
        # the products of up too, and their rows of x once in the order of fragments and once in that of experts.
        pairs, many = 8 * tokens, tokens == 512
        assert up < 64 * pairs + 4096 + many * (4 * pairs * 1408 + 2 * (pairs + tokens) * 2816)
        assert down < 64 * pairs + 4096 + (tokens > 8) * 4 * pairs * 2816 + many * 4 * pairs * 704
    reports = [file.read_text() for file in tmp_path.glob("*.ptxas")]
    assert len(reports) == 24
    for report in reports:
        # JAX 0.11.2's assembler keeps a value of blocks of 16 in memory while it loops over K: once a group of tiles.
        spilled = int(re.search(r"(\d+) bytes spill stores", report)[1])
        assert spilled <= (8 if jax.__version_info__ < (0, 12) else 0), report
        is_prefill = "expert_prefill" in report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= (255 if is_prefill else 128)
