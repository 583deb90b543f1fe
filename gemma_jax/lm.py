"""`LanguageModel`: a checkpoint with its tokenizer, text in and text out, over the functions of `gemma_jax.generation`.

What it adds to them is bucketing (prompts of any length and batches of any size share a few compiled programs), text,
stop strings and constraints (`gemma_jax.stepwise`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax import compilation_cache
from gemma_jax.cache import init_cache
from gemma_jax.checkpoints import resolve
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import FinishReason, GenerateResult, generate
from gemma_jax.model import Gemma4, Params
from gemma_jax.parameters import pack_params
from gemma_jax.sampling import Sampling, SamplingParams, stack_sampling
from gemma_jax.stepwise import Row, steps
from gemma_jax.streaming import THINKING_MARKERS, Kind, split_thinking, stream_text
from gemma_jax.tokenizer import Tokenizer
from pallas_kernels.dispatch import Implementation

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]

_SMALLEST_CAPACITY = 64
_SMALLEST_NEW_TOKENS = 16
_LOGITS_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated continuation.

    Attributes:
      text: the answer, special tokens and everything from a stop string on left out.
      tokens: the generated ids, an end-of-sequence token included.
      finish_reason: "stop" (end of sequence, stop id or stop string) or "length".
      prompt_tokens: how many tokens the prompt had.
      thought: what the model thought before answering, where it did.
      logprobs: log-probability of each token under the unmodified distribution, if asked for.
      top_logprobs: for each token the most probable ids and their log-probabilities, if asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    thought: str = ""
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None


def load(
    source: str | Path,
    format: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation = None,
) -> LanguageModel:
    """Loads a checkpoint. Compiled programs are kept in the user's cache folder: see `gemma_jax.compilation_cache`.

    Args:
      source: a folder that `gemma-jax convert` wrote, a Hugging Face folder, a hub id ("google/gemma-4-E2B-it"), or the
        name of a bundled model ("tiny-dense", "tiny-moe").
      format: "q4k", "eq8_0" or "bf16" quantizes a Hugging Face checkpoint on the way in; None keeps what is there.
      dtype: type of the activations and the KV cache: bfloat16 unless the backend is the CPU, where float32 is faster.
      implementation: of the ops, "xla", or several in order of preference: ("mosaic", "xla") uses the hand-written GPU
        kernels where there are any, for which quantized matrices are packed. None is what is known to run everywhere.

    Raises:
      ValueError: the checkpoint is damaged or not a Gemma 4, or `format` differs from that of a converted folder; the
        message names file and tensor.

    >>> lm = load("tiny-dense", format="q4k")
    >>> lm.config.num_layers
    7
    """
    from convert import hub, load  # Orbax is slow to import

    compilation_cache.enable()
    folder = hub.resolve(resolve(source))
    config, params, _ = load.load_checkpoint(folder, format=format)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size}"
        )
    config = dataclasses.replace(config, eos_ids=tokenizer.eos_ids)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if "mosaic" in (implementation or ()):
        params = pack_params(params)
    return LanguageModel(Gemma4(config, jnp.dtype(dtype), implementation), params, tokenizer)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder, its parameters and its tokenizer.

    Attributes:
      model: the Flax module, which is what the functions of `gemma_jax.generation` take.
      params: its parameters, quantized or not.
      tokenizer: see `gemma_jax.tokenizer.Tokenizer`.
    """

    model: Gemma4
    params: Params
    tokenizer: Tokenizer

    @property
    def config(self) -> Gemma4Config:
        """Sizes and switches of the decoder."""
        return self.model.config

    def logits(self, tokens: Any) -> jax.Array:
        """Logits of the next token after every position.

        Args:
          tokens: int ``[B, T]`` (or ``[T]`` for one row), without padding.

        Returns:
          float32 ``[B, T, V]``.

        Raises:
          ValueError: no tokens, ids outside the vocabulary, or more positions than the model has.

        >>> lm = load("tiny-dense")
        >>> lm.logits([lm.tokenizer.encode("Call me Ishmael.")]).shape[-1] == lm.config.vocab_size
        True
        """
        ids = np.atleast_2d(np.asarray(tokens))
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens is {ids.dtype}{list(ids.shape)}; expected int [B, T]")
        for row, row_ids in enumerate(ids.tolist()):
            self._check_ids(row_ids, f"tokens[{row}]")
        length = ids.shape[1]
        capacity = self._capacity(length)
        chunk = min(_LOGITS_CHUNK, capacity)
        cache = init_cache(self.config, ids.shape[0], capacity, self.model.dtype)
        parts = []
        for begin in range(0, length, chunk):
            part = np.zeros((ids.shape[0], chunk), np.int32)
            positions = np.full((ids.shape[0], chunk), -1, np.int32)
            count = min(chunk, length - begin)
            part[:, :count] = ids[:, begin : begin + count]
            positions[:, :count] = np.arange(begin, begin + count)
            logits, cache = _apply(self.params, part, positions, cache, model=self.model)
            parts.append(logits[:, :count])
        return jnp.concatenate(parts, axis=1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_new_tokens: int = 256,
        top_logprobs: int | None = None,
    ) -> list[Completion]:
        """Continues every prompt; all rows run as one batch on the device.

        Args:
          prompts: text (BOS is added) or token ids (taken as they are), one or a sequence.
          sampling: one setting for all rows or one per row; greedy by default. `Sampling.constraint` holds a row's
            text to a schema, a regex or a list of choices.
          max_new_tokens: most tokens per row; a row's own `Sampling.max_new_tokens` may be lower.
          top_logprobs: None for no log-probabilities, 0 for those of the chosen tokens, n for the n most probable too.

        Returns:
          One `Completion` per prompt, in order.

        Raises:
          ValueError: an empty or too long prompt, or as many settings as there are not prompts.

        >>> lm = load("tiny-dense", format="q4k")
        >>> [done] = lm.generate("The captain", max_new_tokens=8)
        >>> done.finish_reason, len(done.tokens)
        ('length', 8)
        """
        ids = self._prompt_ids(prompts)
        settings = _one_per_row(sampling, len(ids))
        if not ids:
            return []
        tokens, lengths, params, room = self._batch(ids, settings, max_new_tokens)
        if any(row.stop or row.constraint is not None for row in settings):
            rows = self._rows(settings, max_new_tokens)
            for _ in steps(
                self.params,
                tokens,
                lengths,
                params,
                rows,
                model=self.model,
                capacity=tokens.shape[1] + room,
                top_logprobs=top_logprobs,
            ):
                pass
            with_logprobs = top_logprobs is not None
            return [
                _completion(row, len(p), with_logprobs) for row, p in zip(rows, ids, strict=True)
            ]
        result = generate(
            self.params,
            tokens,
            lengths,
            params,
            model=self.model,
            max_new_tokens=room,
            top_logprobs=top_logprobs,
        )
        return self._completions(jax.device_get(result), ids)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
    ) -> Iterator[int]:
        """Yields the ids of one continuation as they come; arguments as in `generate`.

        >>> lm = load("tiny-dense", format="q4k")
        >>> len(list(lm.stream("The captain", max_new_tokens=5)))
        5
        """
        ids = self._prompt_ids([prompt])
        settings = [sampling or Sampling()]
        tokens, lengths, params, room = self._batch(ids, settings, max_new_tokens)
        [row] = rows = self._rows(settings, max_new_tokens)
        seen = 0
        capacity = tokens.shape[1] + room
        for _ in steps(
            self.params, tokens, lengths, params, rows, model=self.model, capacity=capacity
        ):
            yield from row.tokens[seen:]
            seen = len(row.tokens)

    def chat(
        self,
        messages: Messages,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 1024,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Completion:
        """Answers a conversation ``[{"role": "user", "content": "…"}, …]`` through the checkpoint's chat template.

        Raises:
          ValueError: the checkpoint has no chat template, or it refuses the messages; see `generate`.
        """
        ids = self.tokenizer.encode_chat(messages, tools=tools, enable_thinking=enable_thinking)
        [done] = self.generate([ids], sampling, max_new_tokens=max_new_tokens)
        pieces = list(split_thinking(self._decoded(done.tokens, sampling)))
        text = {k: "".join(t for kind, t in pieces if kind == k) for k in ("answer", "thought")}
        return dataclasses.replace(done, text=text["answer"], thought=text["thought"])

    def stream_chat(
        self,
        messages: Messages,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 1024,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[tuple[Kind, str]]:
        """Like `chat`, but yields ("thought" | "answer", text) as it comes."""
        ids = self.tokenizer.encode_chat(messages, tools=tools, enable_thinking=enable_thinking)
        tokens = self.stream(ids, sampling, max_new_tokens=max_new_tokens)
        return split_thinking(self._decoded(tokens, sampling))

    def _decoded(self, tokens: Any, sampling: Sampling | None) -> Iterator[str]:
        """Text of a reply with the markers of thoughts left in, up to a stop string."""
        decoder = self.tokenizer.stream_decoder(keep=THINKING_MARKERS)
        return stream_text(tokens, decoder, sampling.stop if sampling else ())

    # --- batches ------------------------------------------------------------------------------------------------

    def _prompt_ids(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        rows: Any = prompts
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            rows = [prompts]
        ids = []
        for row, prompt in enumerate(rows):
            encoded = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            self._check_ids(encoded, f"prompt {row}")
            ids.append(encoded)
        return ids

    def _check_ids(self, ids: Sequence[int], name: str) -> None:
        if not ids:
            raise ValueError(f"{name} has no tokens")
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"{name} has token id {token}; the vocabulary has {self.config.vocab_size}"
                )

    def _batch(
        self, ids: list[list[int]], settings: Sequence[Sampling], max_new_tokens: int
    ) -> tuple[jax.Array, jax.Array, SamplingParams, int]:
        """Pads a batch to a bucket: tokens ``[B', T']``, lengths, settings, and room for new tokens."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        longest = max(map(len, ids))
        limit = self.config.max_position_embeddings
        if longest + max_new_tokens > limit:
            row = max(range(len(ids)), key=lambda i: len(ids[i]))
            raise ValueError(
                f"prompt {row} has {longest} tokens; with {max_new_tokens} new ones that exceeds the "
                f"{limit} positions of this model"
            )
        # Room for new tokens is a power of two and the whole context one of a few capacities, so
        # that few programs serve every combination of lengths.
        room = min(max(_SMALLEST_NEW_TOKENS, _power_of_two(max_new_tokens)), limit - longest)
        width = self._capacity(longest + room) - room
        rows = _power_of_two(len(ids))
        tokens = np.full((rows, width), self.config.pad_id, np.int32)
        lengths = np.ones((rows,), np.int32)
        for row, row_ids in enumerate(ids):
            tokens[row, : len(row_ids)] = row_ids
            lengths[row] = len(row_ids)
        padding = [Sampling(max_new_tokens=1)] * (rows - len(ids))
        params = stack_sampling(
            [*settings, *padding], max_new_tokens=max_new_tokens, vocab_size=self.config.vocab_size
        )
        return jnp.asarray(tokens), jnp.asarray(lengths), params, room

    def _capacity(self, positions: int) -> int:
        """The smallest bucket that holds `positions`: 64, 256, 1024, 4096, then powers of two."""
        capacity = _SMALLEST_CAPACITY
        while capacity < positions:
            capacity *= 4 if capacity < 4096 else 2
        if (limit := self.config.max_position_embeddings) < positions:
            raise ValueError(f"{positions} positions asked for; this model has {limit}")
        return min(capacity, limit)

    def _rows(self, settings: Sequence[Sampling], max_new_tokens: int) -> list[Row]:
        return [Row(row, max_new_tokens, self.tokenizer, self.config) for row in settings]

    def _completions(self, result: GenerateResult, ids: list[list[int]]) -> list[Completion]:
        done = []
        for row, prompt in enumerate(ids):
            count = int(result.lengths[row])
            tokens = tuple(result.tokens[row, :count].tolist())
            logprobs = top = None
            if result.logprobs is not None:
                assert result.top_tokens is not None
                assert result.top_logprobs is not None
                logprobs = tuple(result.logprobs[row, :count].tolist())
                pairs = zip(
                    result.top_tokens[row, :count].tolist(),
                    result.top_logprobs[row, :count].tolist(),
                    strict=True,
                )
                top = tuple(dict(zip(i, v, strict=True)) for i, v in pairs)
            done.append(
                Completion(
                    text=self.tokenizer.decode(tokens),
                    tokens=tokens,
                    finish_reason=FinishReason(int(result.finish_reasons[row])).name.lower(),
                    prompt_tokens=len(prompt),
                    logprobs=logprobs,
                    top_logprobs=top,
                )
            )
        return done


def _completion(row: Row, prompt_tokens: int, with_logprobs: bool) -> Completion:
    logprobs = top = None
    if with_logprobs:
        logprobs = tuple(chosen for chosen, _, _ in row.logprobs)
        top = tuple(dict(zip(ids, values, strict=True)) for _, ids, values in row.logprobs)
    return Completion(
        text=row.text,
        tokens=tuple(row.tokens),
        finish_reason=row.reason.name.lower(),
        prompt_tokens=prompt_tokens,
        logprobs=logprobs,
        top_logprobs=top,
    )


def _one_per_row(sampling: Sampling | Sequence[Sampling] | None, rows: int) -> Sequence[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * rows
    if len(sampling) != rows:
        raise ValueError(f"sampling has {len(sampling)} entries for {rows} prompts")
    return sampling


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _apply(
    params: Params, tokens: jax.Array, positions: jax.Array, cache: Any, *, model: Gemma4
) -> tuple[jax.Array, Any]:
    return model.apply({"params": params}, tokens, positions, cache)
