"""The compiled programs of `gemma_jax.engine.Engine`: admit a row, prefill a chunk of one, decode all of them.

Their number does not depend on the work: slots, context and chunks are fixed, and everything else is data. Tokens of a
row, prompt and continuation, lie side by side on the device. Prefill takes all of the prompt but its last token into
the cache; that one begins the decoding, so prefill needs neither the head nor the KV-shared layers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from gemma_jax.cache import KVCache
from gemma_jax.generation import FinishReason, end_of_row
from gemma_jax.model import Gemma4, Params
from gemma_jax.paged_cache import (
    Plan,
    Rings,
    init_paged_cache,
    init_snapshots,
    restore_rings,
    row_of,
    save_rings,
    with_row,
)
from gemma_jax.sampler import log_probabilities, sample
from gemma_jax.sampling import Sampling, SamplingParams, TokenCounts, stack_sampling

MAX_STOP_IDS = 16
MAX_LOGIT_BIAS = 64


@struct.dataclass
class BatchState:
    """Everything on the device that changes, for B slots.

    Attributes:
      cache: ``cache.lengths`` positions of each row; its pages are given anew with each call.
      snapshots: rings that were set aside.
      counts: how often each token occurred, for the penalties.
      tokens: int32 ``[B, context + chunk]``, the prompt and what was generated so far.
      prompt_lengths: int32 ``[B]``.
      known: int32 ``[B]``, how many of `tokens` were given: the prompt and, if the row was evicted, what it had
        generated until then. It is fed again as if it were sampled.
      reason: int32 ``[B]``, a `FinishReason`.
      sampling: settings of the rows.
    """

    cache: KVCache
    snapshots: Rings
    counts: TokenCounts
    tokens: jax.Array
    prompt_lengths: jax.Array
    known: jax.Array
    reason: jax.Array
    sampling: SamplingParams


class NewRow(NamedTuple):
    """What `admit` puts into a slot; scalars are int32.

    Attributes:
      tokens: int32 ``[context + chunk]``, the prompt and what is known of the continuation.
      prompt_length, known: how many tokens they are, without and with the continuation.
      length: how many positions the row's pages hold already.
      snapshot: where the rings after these positions lie; -1 for none.
      sampling: settings, arrays of one row.
    """

    tokens: jax.Array
    prompt_length: jax.Array
    known: jax.Array
    length: jax.Array
    snapshot: jax.Array
    sampling: SamplingParams


class Round(NamedTuple):
    """What `decode` generated; N is its `steps`.

    Attributes:
      tokens: int32 ``[B, N]``.
      counts: int32 ``[B]``, how many of them count.
      reason: int32 ``[B]``, the rows' `FinishReason` after them.
      logprobs: chosen ``[B, N]``, top ids and their values ``[B, N, n]``; None if not asked for.
    """

    tokens: jax.Array
    counts: jax.Array
    reason: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None


def init_state(model: Gemma4, slots: int, context: int, chunk: int, plan: Plan) -> BatchState:
    """No rows at all."""
    cache = init_paged_cache(model.config, slots, context, plan, model.dtype)
    vocab_size = model.config.vocab_size

    def zeros() -> jax.Array:
        return jnp.zeros((slots,), jnp.int32)

    return BatchState(
        cache=cache,
        snapshots=init_snapshots(model.config, cache, plan.snapshots),
        counts=TokenCounts(
            jnp.zeros((slots, vocab_size), bool), jnp.zeros((slots, vocab_size), jnp.int32)
        ),
        tokens=jnp.zeros((slots, context + chunk), jnp.int32),
        prompt_lengths=zeros(),
        known=zeros(),
        reason=zeros(),
        sampling=jax.tree.map(
            lambda x: jnp.tile(x, (slots, *(1,) * (x.ndim - 1))),
            sampling_row(Sampling(), 1, vocab_size),
        ),
    )


def sampling_row(sampling: Sampling, max_new_tokens: int, vocab_size: int) -> SamplingParams:
    """Settings of one row as arrays ``[1, …]`` whose widths are the same for all rows.

    Raises:
      ValueError: an id outside the vocabulary, or more ids than there is room for.
    """
    for name, most in (("stop_ids", MAX_STOP_IDS), ("logit_bias", MAX_LOGIT_BIAS)):
        if len(getattr(sampling, name)) > most:
            raise ValueError(
                f"{name} has {len(getattr(sampling, name))} entries; the engine takes at most {most}"
            )
    row = stack_sampling([sampling], max_new_tokens=max_new_tokens, vocab_size=vocab_size)
    stops = MAX_STOP_IDS - row.stop_ids.shape[1]
    biases = MAX_LOGIT_BIAS - row.bias_ids.shape[1]
    # Ids of no effect have to differ from each other: a scatter is told that they do.
    unused = jnp.iinfo(jnp.int32).max - MAX_LOGIT_BIAS - jnp.arange(biases, dtype=jnp.int32)
    return row.replace(
        stop_ids=jnp.pad(row.stop_ids, ((0, 0), (0, stops)), constant_values=-1),
        bias_ids=jnp.concatenate([row.bias_ids, unused[None]], axis=1),
        bias_values=jnp.pad(row.bias_values, ((0, 0), (0, biases))),
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def admit(state: BatchState, slot: jax.Array, row: NewRow, *, model: Gemma4) -> BatchState:
    """Puts a row into a slot; `state` is donated."""
    config, cache = model.config, state.cache
    if state.snapshots and state.snapshots[0].keys.shape[0]:
        cache = lax.cond(
            row.snapshot >= 0,
            lambda cache: restore_rings(config, cache, slot, state.snapshots, row.snapshot),
            lambda cache: cache,
            cache,
        )
    counts = TokenCounts.from_prompt(row.tokens[None], row.prompt_length[None], config.vocab_size)

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), slot, axis=0)

    return state.replace(
        cache=cache.replace(lengths=put(cache.lengths, row.length[None])),
        counts=jax.tree.map(put, state.counts, counts),
        tokens=put(state.tokens, row.tokens[None]),
        prompt_lengths=put(state.prompt_lengths, row.prompt_length[None]),
        known=put(state.known, row.known[None]),
        reason=put(state.reason, jnp.full((1,), FinishReason.UNFINISHED)),
        sampling=jax.tree.map(put, state.sampling, row.sampling),
    )


@functools.partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames="state")
def prefill_chunk(
    params: Params,
    state: BatchState,
    pages: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    *,
    model: Gemma4,
    chunk: int,
) -> BatchState:
    """Takes the next `count` tokens, at most `chunk` (static), of the row in `slot` into the cache; donates `state`."""
    cache = state.cache.replace(pages=pages)
    row = row_of(model.config, cache, slot)
    begin = row.lengths[0]
    tokens = lax.dynamic_slice(state.tokens, (slot, begin), (1, chunk))
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    positions = jnp.where(offsets < count, begin + offsets, -1)[None]
    encoded: Any = model.apply({"params": params}, tokens, positions, row, method="encode")
    row = encoded[1]
    return state.replace(cache=with_row(model.config, cache, slot, row))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def save_snapshot(
    state: BatchState, slot: jax.Array, snapshot: jax.Array, *, model: Gemma4
) -> BatchState:
    """Sets the rings of a slot aside; `state` is donated."""
    rings = save_rings(model.config, state.cache, slot, state.snapshots, snapshot)
    return state.replace(snapshots=rings)


@functools.partial(
    jax.jit,
    static_argnames=("model", "steps", "top_logprobs", "row_by_row"),
    donate_argnames="state",
)
def decode(
    params: Params,
    state: BatchState,
    pages: jax.Array,
    enabled: jax.Array,
    *,
    model: Gemma4,
    steps: int,
    top_logprobs: int | None,
    row_by_row: bool,
) -> tuple[BatchState, Round]:
    """Up to `steps` tokens for every row that is enabled and has not ended; stops when none is left.

    Args:
      params: the model's parameters.
      state: donated.
      pages: int32 ``[B, context / page]``: every such row has pages for `steps` more positions, or for all of its own.
      enabled: bool ``[B]``.
      model: the decoder (static).
      steps: most tokens per row (static).
      top_logprobs: as for `gemma_jax.generate` (static).
      row_by_row: whether the model runs over one row after the other, as many as there are, and not over all slots at
        once (static). What is computed for a row is then the same whatever the number of slots.
    """
    slots = enabled.shape[0]
    state = state.replace(cache=state.cache.replace(pages=pages))
    tokens = jnp.full((slots, steps), model.config.pad_id, jnp.int32)
    logprobs = None
    if top_logprobs is not None:
        wide = (slots, steps, top_logprobs)
        logprobs = (
            jnp.zeros((slots, steps), jnp.float32),
            jnp.zeros(wide, jnp.int32),
            jnp.zeros(wide, jnp.float32),
        )
    start = Round(tokens, jnp.zeros((slots,), jnp.int32), state.reason, logprobs)
    forward = _row_by_row if row_by_row else _all_rows

    def going(state: BatchState) -> jax.Array:
        return enabled & (state.reason == FinishReason.UNFINISHED)

    def goes_on(carry: tuple[jax.Array, BatchState, Round]) -> jax.Array:
        return (carry[0] < steps) & jnp.any(going(carry[1]))

    def one_token(
        carry: tuple[jax.Array, BatchState, Round],
    ) -> tuple[jax.Array, BatchState, Round]:
        i, state, out = carry
        active = going(state)
        token = jnp.take_along_axis(state.tokens, state.cache.lengths[:, None], axis=1)
        logits, cache = forward(params, token, active, state.cache, model)
        # What is done with the logits must not change how they are computed.
        logits, cache = lax.optimization_barrier((logits, cache))
        state, token = _choose(state.replace(cache=cache), logits, active, model)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=1)
        values = None
        if top_logprobs is not None:
            new = log_probabilities(logits, token, top_logprobs)
            assert out.logprobs is not None
            values = tuple(put(old, value) for old, value in zip(out.logprobs, new, strict=True))
        out = Round(put(out.tokens, token), out.counts + active, state.reason, values)
        return i + 1, state, out

    _, state, out = lax.while_loop(goes_on, one_token, (jnp.int32(0), state, start))
    return state, out


def _choose(
    state: BatchState, logits: jax.Array, active: jax.Array, model: Gemma4
) -> tuple[BatchState, jax.Array]:
    """Samples the next token of each active row, or takes the one that is known; what it does to the row."""
    with jax.named_scope("sample"):
        # The cache has the token that was fed: `at` is the position of the next.
        at = state.cache.lengths
        rows = jnp.arange(at.shape[0], dtype=jnp.int32)
        generated = at - state.prompt_lengths
        token = sample(logits, state.sampling, state.counts, generated)
        token = jnp.where(at < state.known, state.tokens[rows, at], token)
        token = jnp.where(active, token, model.config.pad_id)
        reason = end_of_row(token, generated + 1, state.sampling, model)
        where = jnp.where(active, at, state.tokens.shape[1])  # out of range: dropped
        state = state.replace(
            counts=state.counts.add(token, active),
            tokens=state.tokens.at[rows, where].set(token, mode="drop", unique_indices=True),
            reason=jnp.where(active, reason, state.reason),
        )
        return state, token


def _all_rows(
    params: Params, token: jax.Array, active: jax.Array, cache: KVCache, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    positions = jnp.where(active, cache.lengths, -1)[:, None]
    result: Any = model.apply({"params": params}, token, positions, cache)
    logits, cache = result
    return logits[:, 0], cache


def _row_by_row(
    params: Params, token: jax.Array, active: jax.Array, cache: KVCache, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    """`_all_rows` as a loop over the active ones."""
    order = jnp.argsort(~active, stable=True)
    logits = jnp.zeros((active.shape[0], model.config.vocab_size), jnp.float32)

    def one_row(i: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        logits, cache = carry
        slot = order[i]
        row = row_of(model.config, cache, slot)
        new, row = _all_rows(params, token[slot][None], jnp.ones((1,), bool), row, model)
        logits = lax.dynamic_update_slice_in_dim(logits, new, slot, axis=0)
        return logits, with_row(model.config, cache, slot, row)

    return lax.fori_loop(0, jnp.sum(active), one_row, (logits, cache))
