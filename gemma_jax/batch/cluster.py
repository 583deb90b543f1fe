"""A job on many machines: one Ray actor a GPU, or a machine without any, each with an engine of its own.

    driver: input ──▶ chunks of requests ──▶ actors: Engine ──results, as they end──▶ driver: output

The driver alone reads and writes, and a result counts when it has arrived there: what an actor that was lost had not
handed in yet is given to another, so that every row is answered once, and resuming a job is what it is on one machine.
Ray Data would cut the input into blocks of its own and hand results on a block at a time; actors that stream keep
the job's memory and its loss at a kill as small as they are without Ray.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import gemma_jax
from gemma_jax.checkpoints import resolve
from gemma_jax.config import Gemma4Config
from gemma_jax.engine import Engine, Request, Result, default_context
from gemma_jax.tokenizer import Tokenizer

# Of requests, times slots: what an engine drains at the end of is small beside it.
_LARGEST_CHUNK = 16
_MOST_LOSSES = 5  # of actors in a row, with no result between them


class Cluster:
    """A Ray cluster whose actors have loaded a model.

    Args:
      model, format, dtype: see `gemma_jax.load`; `model` is found on every machine of the cluster.
      context: most positions of a row; 4096, or what the model has if that is less.
      address: of the cluster; None takes that of RAY_ADDRESS, or starts one on this machine that ends with the process.
      workers: actors; one for each GPU of the cluster, or one for each machine if there is none.

    Raises:
      ValueError: Ray is not installed.
      ConnectionError: there is no cluster at `address`.
    """

    def __init__(
        self,
        model: str,
        format: str | None = None,
        dtype: str | None = None,
        context: int | None = None,
        *,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        from convert import hub

        try:
            import ray
        except ImportError:
            raise ValueError("Ray is not installed: pip install 'gemma-jax[ray]'") from None
        folder = hub.resolve(resolve(model))
        self.tokenizer = Tokenizer.from_folder(folder)
        config = Gemma4Config.from_hf(folder / "config.json")
        self.context = context or default_context(config)
        if not ray.is_initialized():
            ray.init(
                address=address or os.environ.get("RAY_ADDRESS"),
                logging_level=logging.WARNING,
                include_dashboard=None if address else False,
            )
        self._ray = ray
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = workers or gpus or sum(node["Alive"] for node in ray.nodes())
        options: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        actor = ray.remote(max_restarts=-1, scheduling_strategy="SPREAD", **options)(Worker)
        self.actors = [actor.remote(model, format, dtype, self.context) for _ in range(count)]

    def with_slots(self, slots: int) -> ClusterEngine:
        """What answers requests with `slots` rows at a time in each actor."""
        return ClusterEngine(self._ray, self.actors, slots)


@dataclasses.dataclass
class _Chunk:
    """Requests that an actor has, by their place in it; `results` is the stream of what it hands in."""

    actor: Any
    left: dict[int, Request]
    results: Any


class ClusterEngine:
    """The engine of a cluster: `run` is that of `gemma_jax.Engine`."""

    def __init__(self, ray: Any, actors: list[Any], slots: int) -> None:
        self._ray, self._actors, self._slots = ray, actors, slots

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields a result for every request as each ends.

        Raises:
          RuntimeError: actors are lost one after the other, or their devices run out of memory.
        """
        new = iter(requests)
        again: collections.deque[Request] = collections.deque()
        idle = list(self._actors)
        chunks: dict[Any, _Chunk] = {}
        size, losses = self._slots, 0
        while True:
            while idle and (taken := self._take(again, new, size)):
                size = min(2 * size, _LARGEST_CHUNK * self._slots)
                actor = idle.pop()
                results = actor.answer.options(num_returns="streaming").remote(taken, self._slots)
                chunks[results] = _Chunk(actor, dict(enumerate(taken)), results)
            if not chunks:
                return
            [ready], _ = self._ray.wait(list(chunks), num_returns=1)
            chunk = chunks[ready]
            try:
                place, result = self._ray.get(next(chunk.results))
            except StopIteration:
                del chunks[ready]
                idle.append(chunk.actor)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.RayTaskError) as error:
                losses += 1
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise RuntimeError(f"RESOURCE_EXHAUSTED in an actor: {error}") from error
                is_lost = isinstance(error, self._ray.exceptions.RayActorError)
                if not is_lost or losses > _MOST_LOSSES:
                    raise RuntimeError(f"an actor failed: {error}") from error
                del chunks[ready]
                again.extend(chunk.left.values())
                idle.append(chunk.actor)  # Ray starts it anew
            else:
                losses = 0
                # The request that was asked for, with a key that never left this process.
                yield dataclasses.replace(result, request=chunk.left.pop(place))

    @staticmethod
    def _take(
        again: collections.deque[Request], new: Iterator[Request], size: int
    ) -> list[Request]:
        taken: list[Request] = []
        while len(taken) < size:
            request = again.popleft() if again else next(new, None)
            if request is None:
                break
            taken.append(request)
        return taken


class Worker:
    """An actor: a loaded model that answers chunks of requests."""

    def __init__(self, model: str, format: str | None, dtype: str | None, context: int) -> None:
        self._lm = gemma_jax.load(model, format=format, dtype=dtype)
        self._context = context
        self._engine: Engine | None = None

    def process_id(self) -> int:
        """Of the actor's process."""
        return os.getpid()

    def answer(self, requests: list[Request], slots: int) -> Iterator[tuple[int, Result]]:
        """Yields (place in `requests`, result) as each ends."""
        if self._engine is None or self._engine.slots != slots:
            self._engine = Engine.from_language_model(self._lm, slots=slots, context=self._context)
        numbered = (dataclasses.replace(r, key=i) for i, r in enumerate(requests))
        for result in self._engine.run(numbered):
            yield result.request.key, result
