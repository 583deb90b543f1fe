"""Generation as pure, jitted functions: `prefill`, `decode_step`, and the whole `generate` loop on the device.

All of them take ``model``, a `gemma_jax.model.Gemma4`, as a static keyword: it carries the config, the activation
type and the choice of kernels. They can be called from the caller's own `jax.jit`.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from gemma_jax.cache import KVCache, init_cache
from gemma_jax.model import Gemma4, Params
from gemma_jax.norms import Stream
from gemma_jax.sampler import is_plain, log_probabilities, sample
from gemma_jax.sampling import SamplingParams, TokenCounts

PREFILL_CHUNK = 512


class FinishReason(enum.IntEnum):
    """Why a row ended: it did not yet, it sampled an end-of-sequence or stop token, or it reached its token limit."""

    UNFINISHED = 0
    STOP = 1
    LENGTH = 2


@struct.dataclass
class GenerateResult:
    """What `generate` returns; N is `max_new_tokens`.

    Attributes:
      tokens: int32 ``[B, N]``, padded with the model's pad id; an end-of-sequence token is included.
      lengths: int32 ``[B]``, how many of them count.
      finish_reasons: int32 ``[B]``, values of `FinishReason`.
      logprobs: float32 ``[B, N]``, log-probability of each token under the unmodified distribution, or None.
      top_tokens, top_logprobs: ``[B, N, n]``, the n most probable tokens at each step, or None.
    """

    tokens: jax.Array
    lengths: jax.Array
    finish_reasons: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


@struct.dataclass
class DecodeState:
    """Everything that changes from one generated token to the next.

    Attributes:
      cache: holds the prompt and every generated token but the last.
      counts: how often each token occurred, for the penalties.
      token: int32 ``[B]``, the token sampled last.
      generated: int32 ``[B]``, how many tokens each row has.
      reason: int32 ``[B]``, a `FinishReason`; rows that are finished stay as they are.
      logprobs: of the last token: chosen ``[B]``, top ids ``[B, n]``, top values ``[B, n]``; None if not asked for.
    """

    cache: KVCache
    counts: TokenCounts
    token: jax.Array
    generated: jax.Array
    reason: jax.Array
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    params: Params, tokens: jax.Array, lengths: jax.Array, cache: KVCache, *, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    """Takes prompts into the cache.

    The prompt goes through in chunks of at most `PREFILL_CHUNK` tokens, as many as the longest row needs, so one
    program serves every length up to T. Only the last position of each row passes the KV-shared layers and the head.

    Args:
      params: the model's parameters.
      tokens: int32 ``[B, T]``, each row's prompt, then anything.
      lengths: int32 ``[B]``, 1 to T tokens of each row count.
      cache: what precedes the prompt, usually empty (`gemma_jax.init_cache`); donated.
        ``cache.lengths + lengths`` must not exceed its capacity.
      model: the decoder (static).

    Returns:
      float32 logits ``[B, V]`` of the token after each prompt, and the cache.
    """
    batch, width = tokens.shape
    chunk = min(PREFILL_CHUNK, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, -width % chunk)))
    start = cache.lengths

    def one_chunk(i: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        last_hidden, cache = carry
        part = lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        offsets = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        positions = jnp.where(offsets < lengths[:, None], start[:, None] + offsets, -1)
        hidden, cache = _apply(model, params, part, positions, cache, method="encode")
        is_last = offsets == lengths[:, None] - 1
        picked = jnp.take_along_axis(hidden, jnp.argmax(is_last, axis=1)[:, None, None], axis=1)
        return jnp.where(jnp.any(is_last, axis=1)[:, None, None], picked, last_hidden), cache

    carry = (jnp.zeros((batch, 1, model.config.hidden_size), jnp.float32), cache)
    if tokens.shape[1] == chunk:
        hidden, cache = one_chunk(jnp.int32(0), carry)
    else:
        chunks = (jnp.max(lengths) + chunk - 1) // chunk
        hidden, cache = lax.fori_loop(0, chunks, one_chunk, carry)
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    logits = _apply(model, params, hidden, last, cache, method="decode")
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def decode_step(
    params: Params, token: jax.Array, active: jax.Array, cache: KVCache, *, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    """Takes one more token of each row into the cache.

    Args:
      params: the model's parameters.
      token: int32 ``[B]``.
      active: bool ``[B]``; the other rows keep their lengths and what they hold below them, and their logits mean
        nothing. A cache of a single row must have room for one more position, whether the row is active or not.
      cache: donated, so that it is updated in place.
      model: the decoder (static).

    Returns:
      float32 logits ``[B, V]`` of the token after it, and the cache.
    """
    hidden, cache = _hidden(params, token, active, cache, model)
    return _apply(model, params, hidden, method="logits")[:, 0], cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def greedy_step(
    params: Params, token: jax.Array, active: jax.Array, cache: KVCache, *, model: Gemma4
) -> tuple[jax.Array, KVCache]:
    """`decode_step` and the arg-max of its logits, int32 ``[B]``, which then need not go to memory."""
    hidden, cache = _hidden(params, token, active, cache, model)
    return _apply(model, params, hidden, method="most_likely")[:, 0], cache


@functools.partial(jax.jit, static_argnames=("model", "capacity", "top_logprobs"))
def start(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: SamplingParams,
    *,
    model: Gemma4,
    capacity: int,
    top_logprobs: int | None = None,
    mask: jax.Array | None = None,
) -> DecodeState:
    """Prefills an empty cache of `capacity` positions and samples each row's first token.

    See `generate` for the arguments; `mask` says what may come first, as `gemma_jax.sampler.process_logits` takes it.
    """
    cache = init_cache(model.config, tokens.shape[0], capacity, model.dtype)
    logits, cache = prefill(params, tokens, lengths, cache, model=model)
    zero = jnp.zeros((tokens.shape[0],), jnp.int32)
    state = DecodeState(
        cache=cache,
        counts=TokenCounts.from_prompt(tokens, lengths, model.config.vocab_size),
        token=zero,
        generated=zero,
        # A row that may generate nothing is finished before it begins.
        reason=jnp.where(sampling.max_new_tokens < 1, FinishReason.LENGTH, FinishReason.UNFINISHED),
        logprobs=None,
    )
    token, logprobs = _sample(state, logits, sampling, top_logprobs, mask)
    return _take(state, token, logprobs, sampling, model)


@functools.partial(jax.jit, static_argnames=("model", "top_logprobs"), donate_argnames="state")
def choose(
    state: DecodeState,
    logits: jax.Array,
    sampling: SamplingParams,
    mask: jax.Array,
    *,
    model: Gemma4,
    top_logprobs: int | None = None,
) -> DecodeState:
    """Samples each unfinished row's next token among those that a mask allows: `advance` after `decode_step`.

    The two are apart so that the host can find the mask, which depends on the last token, while the device computes
    the logits, which do too.

    Args:
      state: its cache holds what `decode_step` returned; donated.
      logits: float32 ``[B, V]``, of `decode_step`.
      sampling: settings per row.
      mask: uint32 ``[B, ceil(V / 32)]``; see `gemma_jax.sampler.process_logits`.
      model, top_logprobs: as for `generate` (static).
    """
    token, logprobs = _sample(state, logits, sampling, top_logprobs, mask)
    return _take(state, token, logprobs, sampling, model)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def force(
    params: Params, state: DecodeState, tokens: jax.Array, lengths: jax.Array, *, model: Gemma4
) -> DecodeState:
    """Gives rows tokens that were not sampled, several at once: what they cost is one chunk of prefill without a head.

    Args:
      params: the model's parameters.
      state: donated. Its cache has room for ``lengths`` more positions.
      tokens: int32 ``[B, T]``, T at least 2, the next tokens of each row, then anything.
      lengths: int32 ``[B]``, 0 to T tokens of each row count; 0 leaves a row exactly as it is.
      model: the decoder (static).

    Returns:
      The state as if each of the tokens had been sampled, but that no row ends with any of them.
    """
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    given = offsets < lengths[:, None]
    # The cache holds every generated token but the last: that one goes in now, and the last of the new ones stays out.
    fed = jnp.concatenate([state.token[:, None], tokens[:, :-1]], axis=1)
    positions = jnp.where(given, state.cache.lengths[:, None] + offsets, -1)
    _, cache = _apply(model, params, fed, positions, state.cache, method="encode")
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    return state.replace(
        cache=cache,
        counts=state.counts.add(tokens, given),
        token=jnp.where(lengths > 0, last, state.token),
        generated=state.generated + lengths,
    )


@functools.partial(jax.jit, static_argnames=("model", "top_logprobs"), donate_argnames="state")
def advance(
    params: Params,
    state: DecodeState,
    sampling: SamplingParams,
    *,
    model: Gemma4,
    top_logprobs: int | None = None,
) -> DecodeState:
    """Feeds each unfinished row's last token to the model and samples the next; `state` is donated."""
    active = state.reason == FinishReason.UNFINISHED
    hidden, cache = _hidden(params, state.token, active, state.cache, model)
    state = state.replace(cache=cache)

    def from_logits() -> tuple[jax.Array, Any]:
        logits = _apply(model, params, hidden, method="logits")[:, 0]
        return _sample(state, logits, sampling, top_logprobs)

    def most_likely() -> jax.Array:
        return _apply(model, params, hidden, method="most_likely")[:, 0]

    if top_logprobs is None:
        # All V logits go to memory only if a row wants more of them than which is the largest.
        plain = jnp.all(is_plain(sampling) | ~active)
        token, logprobs = lax.cond(plain, most_likely, lambda: from_logits()[0]), None
    else:
        token, logprobs = from_logits()
    return _take(state, token, logprobs, sampling, model)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "capacity", "top_logprobs"))
def generate(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: SamplingParams,
    *,
    model: Gemma4,
    max_new_tokens: int,
    capacity: int | None = None,
    top_logprobs: int | None = None,
) -> GenerateResult:
    """Generates a continuation of every prompt, entirely on the device: prefill, then one `lax.while_loop`.

    Args:
      params: the model's parameters, quantized or not.
      tokens: int32 ``[B, T]``, each row's prompt, then anything.
      lengths: int32 ``[B]``, 1 to T tokens of each row count.
      sampling: settings per row, from `gemma_jax.stack_sampling`; different settings share one program.
      model: the decoder (static).
      max_new_tokens: N, room for generated tokens (static); ``sampling.max_new_tokens`` may end a row earlier.
      capacity: positions the cache holds (static); T + N unless given.
      top_logprobs: None for no log-probabilities, 0 for those of the chosen tokens, n for the n most probable too.

    Returns:
      See `GenerateResult`.

    Raises:
      ValueError: `capacity` is too small, `max_new_tokens` is below 1, or the model has fewer positions.
    """
    width = tokens.shape[1]
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    needed = width + max_new_tokens
    if capacity is not None and capacity < needed:
        raise ValueError(
            f"capacity is {capacity}, but prompts of {width} and {max_new_tokens} new tokens need {needed}"
        )
    limits = jnp.minimum(sampling.max_new_tokens, max_new_tokens)
    sampling = sampling.replace(max_new_tokens=limits)
    state = start(
        params,
        tokens,
        lengths,
        sampling,
        model=model,
        capacity=capacity or needed,
        top_logprobs=top_logprobs,
    )
    result, _ = continue_generation(
        params,
        state,
        sampling,
        model=model,
        max_new_tokens=max_new_tokens,
        top_logprobs=top_logprobs,
    )
    return result


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "top_logprobs"), donate_argnames="state"
)
def continue_generation(
    params: Params,
    state: DecodeState,
    sampling: SamplingParams,
    *,
    model: Gemma4,
    max_new_tokens: int,
    top_logprobs: int | None = None,
) -> tuple[GenerateResult, DecodeState]:
    """The decode loop of `generate`, from a state that `start` made: one `lax.while_loop` until every row has ended.

    Args:
      params: the model's parameters.
      state: holds each row's prompt and first token (``generated`` is 1, or 0 for a row that may have none); donated.
        Its cache has room for ``max_new_tokens - 1`` more positions.
      sampling: settings per row; ``sampling.max_new_tokens`` is at most `max_new_tokens`.
      model, max_new_tokens, top_logprobs: as for `generate` (static).

    Returns:
      What `generate` returns, and the state after the last token.
    """
    batch = state.token.shape[0]
    out = _record(_empty_result(batch, max_new_tokens, model, top_logprobs), state, jnp.int32(0))

    def unfinished(carry: tuple[jax.Array, DecodeState, GenerateResult]) -> jax.Array:
        return jnp.any(carry[1].reason == FinishReason.UNFINISHED)

    def one_token(
        carry: tuple[jax.Array, DecodeState, GenerateResult],
    ) -> tuple[jax.Array, DecodeState, GenerateResult]:
        step, state, out = carry
        state = advance(params, state, sampling, model=model, top_logprobs=top_logprobs)
        return step + 1, state, _record(out, state, step)

    _, state, out = lax.while_loop(unfinished, one_token, (jnp.int32(1), state, out))
    return out.replace(lengths=state.generated, finish_reasons=state.reason), state


def _apply(model: Gemma4, params: Params, *args: Any, method: str | None = None) -> Any:
    """What a method of the module returns; Flax declares a type for it that no module has."""
    return model.apply({"params": params}, *args, method=method)


def _hidden(
    params: Params, token: jax.Array, active: jax.Array, cache: KVCache, model: Gemma4
) -> tuple[Stream, KVCache]:
    """The last layer's output for one more token ``[B]`` of each row, and the cache with it."""
    positions = jnp.where(active, cache.lengths, -1)[:, None]
    return _apply(model, params, token[:, None], positions, cache, method="hidden")


def _sample(
    state: DecodeState,
    logits: jax.Array,
    sampling: SamplingParams,
    top_logprobs: int | None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array] | None]:
    """A token for every row, and of it and the most probable ones the log-probabilities, if they are asked for."""
    with jax.named_scope("sample"):
        token = sample(logits, sampling, state.counts, state.generated, mask)
        if top_logprobs is None:
            return token, None
        return token, log_probabilities(logits, token, top_logprobs)


def _take(
    state: DecodeState,
    token: jax.Array,
    logprobs: tuple[jax.Array, jax.Array, jax.Array] | None,
    sampling: SamplingParams,
    model: Gemma4,
) -> DecodeState:
    """Gives every unfinished row its token and decides which rows end with it."""
    with jax.named_scope("sample"):
        active = state.reason == FinishReason.UNFINISHED
        token = jnp.where(active, token, model.config.pad_id)
        generated = state.generated + active
        reason = end_of_row(token, generated, sampling, model)
        return state.replace(
            counts=state.counts.add(token, active),
            token=token,
            generated=generated,
            reason=jnp.where(active, reason, state.reason),
            logprobs=logprobs,
        )


def end_of_row(
    token: jax.Array, generated: jax.Array, sampling: SamplingParams, model: Gemma4
) -> jax.Array:
    """The `FinishReason` of rows that have `generated` tokens, the last of them `token`; int32 ``[B]`` all."""
    ends = jnp.isin(token, jnp.asarray(model.config.eos_ids, jnp.int32)) & ~sampling.ignore_eos
    ends |= jnp.any(token[:, None] == sampling.stop_ids, axis=1)
    is_full = generated >= sampling.max_new_tokens
    otherwise = jnp.where(is_full, FinishReason.LENGTH, FinishReason.UNFINISHED)
    return jnp.where(ends, FinishReason.STOP, otherwise)


def _empty_result(
    batch: int, max_new_tokens: int, model: Gemma4, top_logprobs: int | None
) -> GenerateResult:
    shape = (batch, max_new_tokens)
    zeros = jnp.zeros((batch,), jnp.int32)
    out = GenerateResult(jnp.full(shape, model.config.pad_id, jnp.int32), zeros, zeros)
    if top_logprobs is None:
        return out
    return out.replace(
        logprobs=jnp.zeros(shape, jnp.float32),
        top_tokens=jnp.zeros((*shape, top_logprobs), jnp.int32),
        top_logprobs=jnp.zeros((*shape, top_logprobs), jnp.float32),
    )


def _record(out: GenerateResult, state: DecodeState, step: jax.Array) -> GenerateResult:
    """Writes the tokens of one step into column `step`; rows that had finished before keep their padding."""
    active = state.generated == step + 1

    def column(buffer: jax.Array | None, value: jax.Array) -> jax.Array:
        assert buffer is not None
        old = lax.dynamic_index_in_dim(buffer, step, axis=1, keepdims=False)
        keep = active.reshape(-1, *(1,) * (value.ndim - 1))
        new = jnp.where(keep, value, old)
        return lax.dynamic_update_index_in_dim(buffer, new, step, axis=1)

    out = out.replace(tokens=column(out.tokens, state.token))
    if state.logprobs is None:
        return out
    chosen, top_tokens, top_values = state.logprobs
    return out.replace(
        logprobs=column(out.logprobs, chosen),
        top_tokens=column(out.top_tokens, top_tokens),
        top_logprobs=column(out.top_logprobs, top_values),
    )
