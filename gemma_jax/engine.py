"""`Engine`: many requests through one model, each answered as soon as it has ended.

>>> import gemma_jax
>>> lm = gemma_jax.load("tiny-dense", format="q4k")
>>> engine = Engine.from_language_model(lm, slots=4, context=64)
>>> prompts = ["The captain", "Call me", "It was"]
>>> requests = (Request(tuple(lm.tokenizer.encode(p)), max_new_tokens=8, key=p) for p in prompts)
>>> sorted(result.request.key for result in engine.run(requests) if result.error is None)
['Call me', 'It was', 'The captain']
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from gemma_jax.lm import Completion, LanguageModel
from gemma_jax.model import Gemma4, Params
from gemma_jax.sampling import Sampling
from gemma_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Nothing is checked here: what is wrong with a request becomes the `Result.error` of that request alone.

    Attributes:
      prompt: token ids, taken as they are (no BOS is added).
      sampling: how tokens are chosen, and what ends the row; greedy by default.
      max_new_tokens: most tokens to generate; ``sampling.max_new_tokens`` may be lower.
      top_logprobs: None for no log-probabilities, 0 for those of the chosen tokens, n for the n most probable too.
      key: whatever the caller knows the request by; it is handed back and never looked at.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_new_tokens: int = 256
    top_logprobs: int | None = None
    key: Any = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a request: either `completion` or `error` is None.

    Attributes:
      request: the request as it came.
      completion: the generated continuation.
      error: why there is none: what was given and what is accepted.
      cached_tokens: how many tokens of the prompt were not computed, because another request began with them.
    """

    request: Request
    completion: Completion | None
    error: str | None = None
    cached_tokens: int = 0


class Engine:
    """A model, its parameters, and a KV cache for `slots` rows at a time.

    Args:
      model: the decoder.
      params: its parameters, quantized or not.
      tokenizer: makes the text of completions, and finds stop strings; without it texts are empty and a request with
        stop strings is refused.
      slots: rows that decode together.
      context: most positions of a row, prompt and continuation together.

    Raises:
      ValueError: `slots` is below 1, or `context` not in ``2 .. config.max_position_embeddings``.
    """

    def __init__(
        self,
        model: Gemma4,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        context: int = 4096,
    ) -> None:
        limit = model.config.max_position_embeddings
        if slots < 1:
            raise ValueError(f"slots is {slots}; expected at least 1")
        if not 2 <= context <= limit:
            raise ValueError(f"context is {context}; this model takes 2 to {limit} positions")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.slots, self.context = slots, context

    @classmethod
    def from_language_model(cls, lm: LanguageModel, **options: Any) -> Engine:
        """An engine for what `gemma_jax.load` returned; `options` are those of the constructor.

        A context of the model's own is shortened to what the model has positions for.
        """
        limit = lm.config.max_position_embeddings
        options.setdefault("context", min(4096, limit))
        return cls(lm.model, lm.params, lm.tokenizer, **options)

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields a `Result` for every request, as each ends; they overtake each other.

        Requests are pulled from the iterable when there is room for them, never more than `slots` ahead, so that a job
        of any length takes the same memory. What is wrong with one request is its result's `error` and disturbs no
        other; an exception of the iterable itself ends the run.
        """
        for request in requests:
            yield self._answer(request)

    def _answer(self, request: Request) -> Result:
        if self.tokenizer is None:
            return Result(request, None, "no tokenizer")
        lm = LanguageModel(self.model, self.params, self.tokenizer)
        try:
            [done] = lm.generate(
                [request.prompt],
                request.sampling,
                max_new_tokens=request.max_new_tokens,
                top_logprobs=request.top_logprobs,
            )
        except ValueError as error:
            return Result(request, None, str(error))
        return Result(request, done)
