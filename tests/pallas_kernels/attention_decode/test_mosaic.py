"""The kernel of ``attention_decode``: adding up many runs, who does it, and what it compiles to."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention_decode import EPS, check, definition, draw

from pallas_kernels import lanes
from pallas_kernels.attention_decode import mosaic
from pallas_kernels.attention_decode.cases import Case
from pallas_kernels.attention_decode.combine import Arrive
from pallas_kernels.attention_decode.schedule import ARRIVALS, FAN, Grid
from pallas_kernels.lanes import Emulated, Memory


@pytest.mark.parametrize("blocks", [FAN, FAN + 1, 2 * FAN + 3, FAN**2 + 1])
def test_runs_are_added_up_over_all_levels_of_the_tree(blocks: int) -> None:
    check("mosaic", Case(2, 1, 128, None, 2), [[64 * blocks - 2]], 64 * blocks)


@pytest.mark.parametrize("ctas", [1, 3, 7, 264])
def test_how_many_ctas_share_the_slots_changes_nothing_but_the_order_of_sums(ctas: int) -> None:
    """Rows of one to ten blocks. The grid has two CTAs a pair at least."""
    case, positions = Case(4, 2, 128, None, 4), [[600], [70], [-1], [0]]
    call = draw(case, positions, 640)
    with lanes.interpreted():
        out, _ = jax.jit(
            lambda call: mosaic.attention_decode(
                *call, heads=4, window=None, eps=EPS, config=mosaic.Config(ctas)
            )
        )(jax.tree.map(jnp.asarray, call))
    want, (_, values) = definition(call, case, None)
    tolerance = 6 * 2.0**-9 * np.abs(values.astype(np.float64)).max()  # as in `check`
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("members", range(1, FAN + 1))
def test_the_last_of_a_group_knows_it_and_leaves_the_table_as_it_was(members: int) -> None:
    """Twice, as in two layers of a step."""
    grid = Grid(1, 1, 1, 16384, 264)
    table = np.arange(grid.ctas * grid.columns, dtype=np.int32).reshape(grid.ctas, -1)
    table[:, ARRIVALS:] = 0
    memory, flag = Memory(table), Memory(np.full(1, 7, np.int32))
    device = Emulated()
    scalars = [device.u32(n) for n in (40, 1, members)]
    for _ in range(2):
        flags = []
        for _ in range(members):
            Arrive(grid)(device, [memory, flag], [], scalars)
            flags.append(int(flag.content()[0]))
        assert flags == [0] * (members - 1) + [1]
        assert np.array_equal(memory.content(), table)


_COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from bench import aot, hlo, static_kernels
from pallas_kernels.attention_decode import mosaic
from pallas_kernels.attention_decode.cases import CASES

jax.config.update("jax_platforms", "cpu")
S = jax.ShapeDtypeStruct
for case in dict.fromkeys(CASES.values()):  # a kernel is dumped once in a process
    c, slots = case.head_dim, case.window or 4096
    norm = S((c,), jnp.bfloat16)
    for batch, queries, paged in ((1, 1, False), (2, 4, False), (2, 1, True)):
        # Those with 4 and 16 heads of queries a KV head stand for the others.
        if (queries > 1 or paged) and case not in (CASES["e4b_global"], CASES["12b_global"]):
            continue
        table = S((batch, queries, c // 2), jnp.float32)
        cache = S((batch, slots, case.kv_heads, c), jnp.bfloat16)
        pages = S((batch, 8), jnp.int32) if paged else None
        arguments = (
            S((batch, queries, (case.heads + case.own) * c), jnp.float32),
            (norm, norm if case.own else None),
            (table, table),
            (cache, cache),
            S((batch, queries), jnp.int32),
            pages,
        )

        def op(*args):
            *args, pages = args
            return mosaic.attention_decode(
                *args, heads=case.heads, window=case.window, pages=pages, eps=1e-6
            )

        with static_kernels.dumped() as folder:
            program = aot.compile_for(sys.argv[1], op, *arguments, donate_argnums=(3,))
            machines = static_kernels.read_dumps(folder)
        text = program.as_text()
        kernels = [k.op for k in hlo.kernels(*hlo.parse(text))]
        print(json.dumps({
            "case": f"{case} B={batch} T={queries} paged={paged}",
            "hand": kernels.count("custom-call"),
            "copies": sum(op.startswith("copy") for op in kernels),
            "registers": max((m.registers for m in machines), default=0),
            "spilled": sum(m.spill_bytes for m in machines),
        }))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["h200", "b200", "gb10"])
def test_every_layer_is_one_kernel_that_spills_nothing_and_copies_no_cache(target: str) -> None:
    pytest.importorskip("jax_plugins.xla_cuda13")
    command = [sys.executable, "-c", _COMPILE, target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 11 + 2 * 2
    for entry in found:
        assert entry["registers"] <= 255, entry
        assert (entry["hand"], entry["copies"], entry["spilled"]) == (1, 0, 0), entry
