"""`Engine`: many requests through one model, each answered as soon as it has ended.

    >>> import gemma_jax
    >>> lm = gemma_jax.load("tiny-dense", format="q4k")
    >>> engine = Engine.from_language_model(lm, slots=4, context=64)
    >>> prompts = ["The captain", "Call me", "It was"]
    >>> requests = (Request(tuple(lm.tokenizer.encode(p)), max_new_tokens=8, key=p) for p in prompts)
    >>> sorted(result.request.key for result in engine.run(requests) if result.error is None)
    ['Call me', 'It was', 'The captain']

Continuous batching (Yu et al., "Orca", OSDI 2022) over a fixed set of compiled programs (`gemma_jax.batch_programs`).
A round takes prompts into the cache, a chunk at a time and not more than a budget, and then lets all rows decode for
several tokens; it is on its way before the tokens of the last are read. Who gets slots and pages is decided by
`gemma_jax.scheduler`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import batch_programs as programs
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import FinishReason
from gemma_jax.lm import LanguageModel, Prompt
from gemma_jax.model import Gemma4, Params
from gemma_jax.page_pool import Prefix
from gemma_jax.paged_cache import available_bytes, plan
from gemma_jax.requests import Answer, Request, Result
from gemma_jax.sampling import Sampling
from gemma_jax.scheduler import Row, Scheduler
from gemma_jax.streaming import StopStrings
from gemma_jax.tokenizer import Tokenizer

_CONTEXT = 4096


@dataclasses.dataclass
class Statistics:
    """What an engine has done so far, in tokens; `evictions` in rows."""

    prefilled: int = 0
    cached: int = 0
    generated: int = 0
    evictions: int = 0


class Engine:
    """A model, its parameters, and a KV cache for `slots` rows at a time.

    The same requests give the same tokens whatever else runs beside them, however they are ordered, and whether a row
    was evicted or found its prefix in the cache: chunks begin at multiples of `chunk`, an evicted row is fed its own
    tokens again, and noise depends on the row's seed alone. Another number of `slots` is another program, whose sums
    may be rounded differently, except where rows are computed one by one, as on a CPU.

    Args:
      model: the decoder.
      params: its parameters, quantized or not.
      tokenizer: makes the text of completions, and finds stop strings; without it texts are empty and a request with
        stop strings is refused.
      slots: rows that decode together.
      context: most positions of a row, prompt and continuation together.
      kv_bytes: memory for the KV cache; by default that of `gemma_jax.paged_cache.available_bytes`. Rows that do not
        fit into it together are computed one after the other.
      chunk: tokens of a prompt that are computed at once; a multiple of `page_size`.
      page_size: positions in a page of the global layers.
      decode_steps: tokens each row may get before the host looks at them: a stop string is found that much later.
      prefill_tokens: tokens of prompts between two rounds of decoding; two chunks by default. More of them give a
        higher throughput, fewer a steadier flow of tokens.
      max_top_logprobs: the largest `Request.top_logprobs`.
      snapshots: prefixes of prompts that are kept; 0 for none, by default up to a quarter of the memory.
      row_by_row: see `gemma_jax.batch_programs.decode`; by default on a CPU, where XLA's products of several rows are
        slower than as many of one.

    Raises:
      ValueError: a number out of its range, or `kv_bytes` too small for a single row.
    """

    def __init__(
        self,
        model: Gemma4,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        context: int = _CONTEXT,
        kv_bytes: int | None = None,
        chunk: int = 512,
        page_size: int = 64,
        decode_steps: int = 8,
        prefill_tokens: int | None = None,
        max_top_logprobs: int = 20,
        snapshots: int | None = None,
        row_by_row: bool | None = None,
    ) -> None:
        limit = model.config.max_position_embeddings
        if not 2 <= context <= limit:
            raise ValueError(f"context is {context}; this model takes 2 to {limit} positions")
        for name, value in {
            "slots": slots,
            "page_size": page_size,
            "decode_steps": decode_steps,
            "chunk": chunk,
        }.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if chunk % page_size:
            raise ValueError(f"chunk is {chunk}; expected a multiple of page_size = {page_size}")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.slots, self.context = slots, context
        self.statistics = Statistics()
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        capacity = -(-context // page_size) * page_size
        self._chunk, self._decode_steps = chunk, decode_steps
        self._prefill_tokens = prefill_tokens or 2 * chunk
        self._max_top_logprobs = max_top_logprobs
        self._row_by_row = device.platform == "cpu" if row_by_row is None else row_by_row
        self._plan = plan(
            model.config,
            slots,
            capacity,
            page_size,
            jnp.dtype(model.dtype).itemsize,
            available_bytes(device) if kv_bytes is None else kv_bytes,
            snapshots,
        )
        self._scheduler = Scheduler(slots, capacity, chunk, self._plan)
        self._state = programs.init_state(model, slots, capacity, chunk, self._plan)
        self._in_flight: deque[tuple[programs.Round, list[Answer]]] = deque()
        self._finished: list[Result] = []
        self._arrivals = 0

    @classmethod
    def from_language_model(cls, lm: LanguageModel, **options: Any) -> Engine:
        """An engine for what `gemma_jax.load` returned; `options` are those of the constructor.

        The default context is shortened to what the model has positions for.
        """
        options.setdefault("context", default_context(lm.config))
        return cls(lm.model, lm.params, lm.tokenizer, **options)

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields a `Result` for every request, as each ends; they overtake each other.

        Requests are pulled from the iterable when there is room for them, never more than `slots` ahead, so that a job
        of any length takes the same memory. What is wrong with one request is its result's `error` and disturbs no
        other; an exception of the iterable itself ends the run. Closing the iterator drops what is not finished.

        Raises:
          RuntimeError: another run of this engine has not ended.
        """
        if not self.is_idle:
            raise RuntimeError("another run of this engine has not ended: finish or close it first")
        pending = iter(requests)
        is_exhausted = False
        try:
            while True:
                while not is_exhausted and self.wants_more:
                    try:
                        request = next(pending)
                    except StopIteration:
                        is_exhausted = True
                    else:
                        self.add(request)
                if self.is_idle and is_exhausted:
                    return
                yield from self.step()
        finally:
            self.clear()

    async def arun(
        self, requests: Iterable[Request] | AsyncIterable[Request]
    ) -> AsyncIterator[Result]:
        """`run` for asyncio: the model works in a thread, and only while results are asked for.

        An asynchronous iterable of requests is read along, at most `slots` ahead of those that wait here. A consumer
        that takes no results stops the engine, which then takes no requests.
        """
        if not self.is_idle:
            raise RuntimeError("another run of this engine has not ended: finish or close it first")
        queue: asyncio.Queue[Request | None] = asyncio.Queue(self.slots)

        async def feed() -> None:
            try:
                if isinstance(requests, AsyncIterable):
                    async for request in requests:
                        await queue.put(request)
                else:
                    for request in requests:
                        await queue.put(request)
            finally:
                await queue.put(None)

        feeder = asyncio.create_task(feed())
        is_exhausted = False
        try:
            while True:
                while not is_exhausted and self.wants_more:
                    if queue.empty() and not self.is_idle:
                        break
                    request = await queue.get()
                    if request is None:
                        is_exhausted = True
                        await feeder  # raises what ended the requests
                    else:
                        self.add(request)
                if self.is_idle and is_exhausted:
                    return
                for result in await asyncio.to_thread(self.step):
                    yield result
        finally:
            feeder.cancel()
            self.clear()

    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
        top_logprobs: int | None = None,
    ) -> Iterator[Result]:
        """`run` for prompts that share their settings; ``result.request.key`` is the number of the prompt.

        Args:
          prompts: texts (BOS is added) or token ids (taken as they are); pulled as `run` pulls requests.
          sampling, max_new_tokens, top_logprobs: as in `gemma_jax.lm.LanguageModel.generate`.

        Raises:
          ValueError: text without a tokenizer.
        """
        return self.run(
            Request(self._ids(prompt), sampling or Sampling(), max_new_tokens, top_logprobs, number)
            for number, prompt in enumerate(prompts)
        )

    # --- one round after the other --------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether every request that was added has been answered."""
        return not (
            self._scheduler.waiting or self._scheduler.running or self._in_flight or self._finished
        )

    @property
    def wants_more(self) -> bool:
        """Whether fewer than `slots` requests wait."""
        return len(self._scheduler.waiting) < self.slots

    def add(self, request: Request) -> None:
        """Queues a request; `step` gives its result."""
        try:
            answer = self._checked(request)
        except (ValueError, TypeError) as error:
            self._finished.append(Result(request, None, str(error)))
            return
        self._arrivals += 1
        self._scheduler.waiting.append(answer)

    def step(self) -> list[Result]:
        """One round: what has ended since the last."""
        self._prefill()
        is_dispatched = self._decode()
        while len(self._in_flight) > is_dispatched:
            self._read()
        finished, self._finished = self._finished, []
        self.statistics.evictions = self._scheduler.evictions
        return finished

    def clear(self) -> None:
        """Drops every request that has not been answered; known prefixes stay."""
        self._in_flight.clear()
        self._finished.clear()
        self._scheduler.waiting.clear()
        for row in self._scheduler.running:
            self._scheduler.release(row)

    def _prefill(self) -> None:
        """Gives slots to rows that wait, and takes their prompts into the cache, one after the other."""
        budget = self._prefill_tokens
        rows = self._scheduler.running
        is_decoding = any(row.is_decoding for row in rows)
        row = next((row for row in rows if not row.is_decoding), None)
        while budget > 0 or not is_decoding:
            if row is None:
                admitted = self._scheduler.admit()
                if admitted is None:
                    return
                row = self._admitted(*admitted)
            budget -= self._prefill_chunk(row)
            if row.is_decoding:
                row, is_decoding = None, True

    def _admitted(self, row: Row, prefix: Prefix | None) -> Row:
        assert isinstance(row, Answer)
        tokens = np.zeros((self._state.tokens.shape[1],), np.int32)
        known = [*row.prompt, *row.tokens]
        tokens[: len(known)] = known
        row.replayed = len(row.tokens)
        if prefix is not None and not row.tokens:
            row.cached_tokens = prefix.tokens
        self.statistics.cached += row.length
        self._state = programs.admit(
            self._state,
            _int32(row.slot),
            programs.NewRow(
                jnp.asarray(tokens),
                _int32(len(row.prompt)),
                _int32(len(known)),
                _int32(row.length),
                _int32(-1 if prefix is None else prefix.snapshot),
                row.sampling,
            ),
            model=self.model,
        )
        return row

    def _prefill_chunk(self, row: Row) -> int:
        """Computes the next chunk of a prompt, and says how many tokens that took."""
        count = min(self._chunk, len(row.prompt) - 1 - row.length)
        if count:
            # The end of a prompt is padded to one of few sizes, which its length alone decides.
            sizes = (size for size in (self._chunk // 16, self._chunk // 4) if size >= count)
            self._state = programs.prefill_chunk(
                self.params,
                self._state,
                self._scheduler.table.copy(),
                _int32(row.slot),
                _int32(count),
                model=self.model,
                chunk=next(sizes, self._chunk),
            )
            row.length += count
            self.statistics.prefilled += count
            if count == self._chunk:
                held = row.pages[: self._scheduler.pages_for(row.length)]
                snapshot = self._scheduler.prefixes.add(row.prompt, row.length, held)
                if snapshot is not None:
                    slot = _int32(row.slot)
                    self._state = programs.save_snapshot(
                        self._state, slot, _int32(snapshot), model=self.model
                    )
        row.is_decoding = row.length == len(row.prompt) - 1
        return count

    def _decode(self) -> bool:
        """Starts a round of decoding, and says whether there is a row for one."""
        for row in self._scheduler.running:
            if row.is_decoding:
                self._make_room(row)
        rows = [row for row in self._scheduler.running if row.is_decoding]
        if not rows:
            return False
        answers = [row for row in rows if isinstance(row, Answer)]
        enabled = np.zeros((self.slots,), bool)
        enabled[[row.slot for row in rows]] = True
        wanted = max((-1 if a.top is None else a.top for a in answers), default=-1)
        self._state, result = programs.decode(
            self.params,
            self._state,
            self._scheduler.table.copy(),
            enabled,
            model=self.model,
            steps=self._decode_steps,
            top_logprobs={-1: None, 0: 0}.get(wanted, self._max_top_logprobs),
            row_by_row=self._row_by_row,
        )
        for row in rows:
            row.length = min(row.length + self._decode_steps, row.positions)
        self._in_flight.append((result, answers))
        return True

    def _make_room(self, row: Row) -> None:
        """Sees to it that `row` has pages for a round, unless it is the youngest of too many and has to wait."""
        while row.slot >= 0:
            if self._scheduler.reserve(row, min(row.length + self._decode_steps, row.positions)):
                return
            if self._in_flight:
                self._read()  # what has ended meanwhile gives its pages back
            else:
                self._scheduler.evict_youngest()

    def _read(self) -> None:
        """Waits for the oldest round in flight and hands its tokens out."""
        result, answers = self._in_flight.popleft()
        slots = [answer.slot for answer in answers]
        seen: programs.Round = jax.device_get(result)
        for answer, slot in zip(answers, slots, strict=True):
            if slot < 0:  # ended by a stop string while this round was on its way
                continue
            count = int(seen.counts[slot])
            ended = FinishReason(int(seen.reason[slot]))
            new = answer.take(seen, slot, count)
            self.statistics.generated += new
            if answer.is_stopped or ended != FinishReason.UNFINISHED:
                self._scheduler.release(answer)
                reason = FinishReason.STOP if answer.is_stopped else ended
                done = answer.completion(reason.name.lower(), self.tokenizer)
                self._finished.append(
                    Result(answer.request, done, cached_tokens=answer.cached_tokens)
                )

    # --- requests ---------------------------------------------------------------------------------------------------

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise ValueError("prompts has text, but the engine has no tokenizer: pass token ids")
        return tuple(self.tokenizer.encode(prompt))

    def _checked(self, request: Request) -> Answer:
        prompt, sampling, vocab_size = (
            request.prompt,
            request.sampling,
            self.model.config.vocab_size,
        )
        if not prompt:
            raise ValueError("prompt has no tokens")
        wrong = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"prompt has token id {wrong}; the vocabulary has {vocab_size}")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; expected at least 1")
        room = min(request.max_new_tokens, sampling.max_new_tokens or request.max_new_tokens)
        if len(prompt) + room > self.context:
            raise ValueError(
                f"prompt has {len(prompt)} tokens; with {room} new ones that exceeds the {self.context} positions "
                "of this engine's context"
            )
        top = request.top_logprobs
        if top is not None and not 0 <= top <= self._max_top_logprobs:
            raise ValueError(f"top_logprobs is {top}; accepted are 0 to {self._max_top_logprobs}")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("sampling.stop has strings, but the engine has no tokenizer")
        if sampling.constraint is not None:
            raise ValueError(
                "sampling.constraint is not served by the engine: use LanguageModel.generate"
            )
        decoder = self.tokenizer.stream_decoder() if self.tokenizer and sampling.stop else None
        return Answer(
            order=self._arrivals,
            prompt=prompt,
            positions=len(prompt) + room - 1,  # the last token is never fed
            request=request,
            sampling=programs.sampling_row(sampling, room, vocab_size),
            decoder=decoder,
            stop=StopStrings(sampling.stop),
            top=top,
        )


def default_context(config: Gemma4Config) -> int:
    """Positions of a row where nobody asks for more: 4096, or what the model has if that is less."""
    return min(_CONTEXT, config.max_position_embeddings)


def _int32(x: int) -> Any:
    """A scalar for a program; JAX takes NumPy's, but does not declare them to be arrays."""
    return np.int32(x)
