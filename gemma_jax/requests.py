"""What `gemma_jax.engine.Engine` is asked and what it answers."""

from __future__ import annotations

import dataclasses
from typing import Any

from gemma_jax.batch_programs import Round
from gemma_jax.lm import Completion
from gemma_jax.sampling import Sampling, SamplingParams
from gemma_jax.scheduler import Row
from gemma_jax.streaming import StopStrings
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


@dataclasses.dataclass(eq=False)
class Answer(Row):
    """A row, and what has been generated for it so far."""

    _: dataclasses.KW_ONLY
    request: Request
    sampling: SamplingParams
    decoder: Any
    stop: StopStrings
    top: int | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    replayed: int = 0  # tokens that the device will generate again, because the row was evicted
    text: str = ""
    is_stopped: bool = False
    cached_tokens: int = 0
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)

    def take(self, seen: Round, slot: int, count: int) -> int:
        """Takes the tokens of a round, up to one that completes a stop string; returns how many are new."""
        known = min(self.replayed, count)
        self.replayed -= known
        before = len(self.tokens)
        for i in range(known, count):
            self.tokens.append(int(seen.tokens[slot, i]))
            if self.top is not None:
                assert seen.logprobs is not None
                chosen, ids, values = (x[slot, i] for x in seen.logprobs)
                self.logprobs.append(float(chosen))
                best = zip(ids[: self.top].tolist(), values[: self.top].tolist(), strict=True)
                self.top_logprobs.append(dict(best))
            if self.decoder is not None:
                text, self.is_stopped = self.stop.push(self.decoder.push(self.tokens[-1]))
                self.text += text
                if self.is_stopped:
                    break
        return len(self.tokens) - before

    def completion(self, finish_reason: str, tokenizer: Tokenizer | None) -> Completion:
        if self.decoder is not None:
            text, self.is_stopped = self.stop.push(self.decoder.flush())
            self.text += text if self.is_stopped else text + self.stop.flush()
        elif tokenizer is not None:
            self.text = tokenizer.decode(self.tokens)
        return Completion(
            text=self.text,
            tokens=tuple(self.tokens),
            finish_reason=finish_reason,
            prompt_tokens=len(self.prompt),
            logprobs=None if self.top is None else tuple(self.logprobs),
            top_logprobs=None if self.top is None else tuple(self.top_logprobs),
        )
