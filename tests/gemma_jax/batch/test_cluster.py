"""A job on a local Ray cluster of two actors, one of which is killed."""

from __future__ import annotations

import collections
import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import pytest

from gemma_jax.batch import Served, run_job
from gemma_jax.batch.cluster import Cluster
from gemma_jax.engine import Request, Result

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).parents[3]
ROWS = 80


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={
            "env_vars": {
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
                "PYTHONPATH": str(ROOT),
            }
        },
    )
    yield Cluster("tiny-dense", context=64, workers=2)
    ray.shutdown()


class KillsOne:
    """The cluster's engine, one actor of which dies after 20 results."""

    def __init__(self, cluster: Cluster, slots: int) -> None:
        self._cluster, self._engine = cluster, cluster.with_slots(slots)

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for count, result in enumerate(self._engine.run(requests)):
            if count == 20:
                victim = self._cluster.actors[0]
                os.kill(ray.get(victim.process_id.remote()), signal.SIGKILL)
            yield result


def test_a_lost_actor_loses_nothing_doubles_nothing_and_the_job_resumes(
    cluster: Cluster, tmp_path: Path
) -> None:
    lines = [
        {"custom_id": f"row {i}", "prompt": "The captain", "max_tokens": 4} for i in range(ROWS)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    served = Served(cluster.tokenizer, ("tiny-dense",), cluster.context, 16)
    summary = run_job(*files, served, lambda slots: KillsOne(cluster, slots), slots=4)
    assert (summary.answered_now, summary.failed) == (ROWS, 0)
    assert ids(tmp_path) == {f"row {i}": 1 for i in range(ROWS)}
    whole = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(whole[:-10]) + whole[-10][:20])
    assert run_job(*files, served, cluster.with_slots, slots=4).answered_now == 10
    assert ids(tmp_path) == {f"row {i}": 1 for i in range(ROWS)}


def ids(folder: Path) -> collections.Counter[str]:
    lines = (folder / "out.jsonl").read_bytes().splitlines()
    return collections.Counter(json.loads(line)["custom_id"] for line in lines)
