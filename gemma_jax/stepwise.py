"""Generation with the host reading along: what stop strings, constraints and streams need and `generate` cannot do.

Every step the host looks at the new tokens, and decides which rows end and what may come next. A batch in which no row
has a constraint takes the steps of `gemma_jax.generation.advance`. Otherwise a step is

    decode_step (device)  |  masks of the constrained rows (host, meanwhile)  ->  choose (device)

and where a constraint leaves one way to go on, its tokens are given to the row together before that (`force`). All
programs depend on shapes alone, not on which rows have a constraint or which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.config import Gemma4Config
from gemma_jax.constraints import Matcher, mask_words
from gemma_jax.generation import (
    DecodeState,
    FinishReason,
    advance,
    choose,
    decode_step,
    force,
    start,
)
from gemma_jax.model import Gemma4, Params
from gemma_jax.sampling import Sampling, SamplingParams
from gemma_jax.streaming import StopStrings
from gemma_jax.tokenizer import Tokenizer

# Tokens of a row that `force` takes at a time: one program, not one for each length.
_FORCED_CHUNK = 16
_ALL = np.uint32(0xFFFFFFFF)


class Row:
    """One continuation as the host sees it.

    Attributes:
      tokens: what was generated, or forced, so far.
      text: theirs, without what follows a stop string; while the row goes on, without what may become one.
      reason: a `FinishReason`.
      logprobs: for each token, if asked for: its own, the most probable ids, theirs.
    """

    def __init__(
        self, sampling: Sampling, max_new_tokens: int, tokenizer: Tokenizer, config: Gemma4Config
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.reason = FinishReason.UNFINISHED
        self.logprobs: list[tuple[float, list[int], list[float]]] = []
        constraint = sampling.constraint
        self.matcher = Matcher(constraint, tokenizer, config.vocab_size) if constraint else None
        self._limit = min(sampling.max_new_tokens or max_new_tokens, max_new_tokens)
        self._ends = set(sampling.stop_ids)
        if not sampling.ignore_eos:
            self._ends |= set(config.eos_ids)
        self._decoder = tokenizer.stream_decoder()
        self._stop = StopStrings(sampling.stop)

    def push(self, token: int) -> None:
        """Goes on by a token, and ends with it if it is the last."""
        self.tokens.append(token)
        text, stopped = self._stop.push(self._decoder.push(token))
        self.text += text
        if stopped or token in self._ends:
            self.reason = FinishReason.STOP
        elif len(self.tokens) >= self._limit:
            self.reason = FinishReason.LENGTH
        if self.reason != FinishReason.UNFINISHED:
            if not stopped:
                text, stopped = self._stop.push(self._decoder.flush())
                self.text += text if stopped else text + self._stop.flush()
        elif self.matcher is not None:
            self.matcher.consume(token)

    def push_forced(self) -> list[int]:
        """Goes on by what the constraint forces, where that is more than one token, and returns it."""
        if self.matcher is None or self.reason != FinishReason.UNFINISHED:
            return []
        forced = self.matcher.forced()
        # The mask forces a single one too, and `force` would cost as much as the step it saves.
        if len(forced) < 2:
            return []
        before = len(self.tokens)
        for token in forced:
            self.push(token)
            if self.reason != FinishReason.UNFINISHED:
                break
        return self.tokens[before:]


def steps(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: SamplingParams,
    rows: Sequence[Row],
    *,
    model: Gemma4,
    capacity: int,
    top_logprobs: int | None = None,
    jump_ahead: bool = True,
) -> Iterator[None]:
    """Generates into `rows`, and yields after each step of the device.

    Args:
      params, tokens, lengths, sampling, model, capacity, top_logprobs: as for `gemma_jax.generation.start`, for B rows.
      rows: at most B; the others are padding, which ends with its first token.
      jump_ahead: give rows their forced tokens together. The same tokens come either way. Log-probabilities are of
        sampled tokens: with `top_logprobs` nothing jumps.

    Raises:
      ValueError: a constraint cannot be followed further; see `Matcher`.
    """
    masks = _Masks(rows, tokens.shape[0], model.config.vocab_size)
    state = start(
        params,
        tokens,
        lengths,
        sampling,
        model=model,
        capacity=capacity,
        top_logprobs=top_logprobs,
        mask=masks.next(),
    )
    while True:
        reason = _read(state, rows)
        forced = []
        if jump_ahead and top_logprobs is None:
            forced = [row.push_forced() for row in rows]
        yield
        if all(row.reason != FinishReason.UNFINISHED for row in rows):
            return
        if any(forced):
            state = _force(params, state, forced, rows, model)
        if any(reason[b] != row.reason for b, row in enumerate(rows)):  # the host has ended a row
            reason[: len(rows)] = [row.reason for row in rows]
            state = state.replace(reason=jnp.asarray(reason))
        if masks.needed:
            active = state.reason == FinishReason.UNFINISHED
            logits, cache = decode_step(params, state.token, active, state.cache, model=model)
            state = state.replace(cache=cache)
            state = choose(
                state, logits, sampling, masks.next(), model=model, top_logprobs=top_logprobs
            )
        else:
            state = advance(params, state, sampling, model=model, top_logprobs=top_logprobs)


class _Masks:
    """The masks of a batch, one step after the other; `next` is None where no row has a constraint."""

    def __init__(self, rows: Sequence[Row], batch: int, vocab_size: int) -> None:
        self._rows = rows
        self._shape = batch, mask_words(vocab_size)
        self.needed = any(row.matcher is not None for row in rows)

    def next(self) -> jax.Array | None:
        if not self.needed:
            return None
        masks = np.full(self._shape, _ALL, np.uint32)
        for mask, row in zip(masks, self._rows, strict=False):
            if row.matcher is not None and row.reason == FinishReason.UNFINISHED:
                mask[:] = row.matcher.mask()
        return jnp.asarray(masks)


def _read(state: DecodeState, rows: Sequence[Row]) -> np.ndarray:
    """Gives every unfinished row the token that was sampled for it; returns the `FinishReason` of all rows."""
    token, reason, logprobs = jax.device_get((state.token, state.reason, state.logprobs))
    for b, row in enumerate(rows):
        if row.reason != FinishReason.UNFINISHED:
            continue
        if logprobs is not None:
            chosen, top_ids, top_values = (values[b].tolist() for values in logprobs)
            row.logprobs.append((chosen, top_ids, top_values))
        row.push(int(token[b]))
    return np.array(reason)


def _force(
    params: Params,
    state: DecodeState,
    forced: Sequence[list[int]],
    rows: Sequence[Row],
    model: Gemma4,
) -> DecodeState:
    """Feeds forced tokens to the rows that go on after them."""
    batch = state.token.shape[0]
    left: list[list[int]] = [[] for _ in range(batch)]
    for b, row in enumerate(rows):
        if row.reason == FinishReason.UNFINISHED:
            left[b] = forced[b]
    while any(left):
        chunk = np.zeros((batch, _FORCED_CHUNK), np.int32)
        for b, row_tokens in enumerate(left):
            part = row_tokens[:_FORCED_CHUNK]
            chunk[b, : len(part)] = part
        counts: Any = np.array([min(len(t), _FORCED_CHUNK) for t in left], np.int32)
        state = force(params, state, jnp.asarray(chunk), jnp.asarray(counts), model=model)
        left = [row_tokens[_FORCED_CHUNK:] for row_tokens in left]
    return state
