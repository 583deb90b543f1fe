"""How the next token is to be chosen: the settings of one request, and their arrays for a batch.

`Sampling` is what a caller writes, checked field by field. `stack_sampling` turns a list of them
into `SamplingParams`, arrays with one entry per row of the batch: rows with different settings
then run through one compiled program. `TokenCounts` remembers what each row has already said.
The maths on the device is in `gemma_jax.sampler`.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.constraints import Constraint

_MAX_INT32 = 2**31 - 1
_MAX_UINT32 = 2**32 - 1
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MIN_NORMAL = float(np.finfo(np.float32).tiny)  # anything smaller may be flushed to zero


@dataclass(frozen=True)
class Sampling:
    """Settings of one request. Every field is checked; nothing is clipped silently.

    Fields:
      temperature: divides the logits; 0 takes the most likely token (after penalties and bias;
        the three filters below cannot change it).
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps
        all. Holtzman et al., https://arxiv.org/abs/1904.09751.
      min_p: keep tokens with at least min_p times the probability of the most likely one; 0 keeps
        all. Nguyen et al., https://arxiv.org/abs/2407.01082.
      repetition_penalty: logits of tokens in the prompt or the output are divided by it if
        positive, multiplied if negative; 1 changes nothing, 0 is refused. https://arxiv.org/abs/1909.05858.
      presence_penalty: subtracted once from the logit of each token in the output.
      frequency_penalty: subtracted once per occurrence in the output.
      logit_bias: token id -> number added to its logit; -inf forbids the token.
      seed: 0 .. 2**32 - 1; the same seed on the same logits draws the same tokens.
      max_new_tokens: limit of this row; None takes the limit of the whole call.
      stop_ids: token ids that end the row, besides the end-of-sequence ids of the model.
      stop: strings that end the row; they act on decoded text, the device never sees them.
      ignore_eos: go on past the model's own end-of-sequence ids.
      constraint: what the text must match, such as a JSON schema; see `gemma_jax.Constraint`. Like `stop` it acts in
        what makes text (`gemma_jax.LanguageModel`), and only through masks on the device. It comes before every other
        setting: a logit_bias of -inf cannot forbid the only token that the constraint allows.

    Raises:
      ValueError: a field is out of its range; the message names field, value and range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int = 0
    max_new_tokens: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "temperature": _number("temperature", self.temperature, low=0.0),
            "top_k": _integer("top_k", self.top_k, 0, _MAX_INT32),
            "top_p": _number("top_p", self.top_p, low=0.0, high=1.0),
            "min_p": _number("min_p", self.min_p, low=0.0, high=1.0),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, low=_MIN_NORMAL
            ),
            "presence_penalty": _number("presence_penalty", self.presence_penalty),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty),
            "logit_bias": _bias(self.logit_bias),
            "seed": _integer("seed", self.seed, 0, _MAX_UINT32),
            "stop_ids": _ids(self.stop_ids),
            "stop": _strings(self.stop),
        }
        if self.max_new_tokens is not None:
            limit = _integer("max_new_tokens", self.max_new_tokens, 1, _MAX_INT32)
            checked["max_new_tokens"] = limit
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: got {self.ignore_eos!r}, accepted are True and False")
        if not isinstance(self.constraint, Constraint | None):
            raise ValueError(
                f"constraint: got {self.constraint!r}, accepted are a gemma_jax.Constraint and None"
            )
        if self.constraint is not None and self.ignore_eos:
            raise ValueError(
                "ignore_eos: got True with a constraint, which nothing but an "
                "end-of-sequence token can end; accepted is False"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@flax.struct.dataclass
class SamplingParams:
    """The settings of B rows as arrays. Build it with `stack_sampling`.

    stop_ids is padded with -1, which no token equals. bias_ids is padded with distinct ids far
    above any vocabulary, which a scatter drops. Their widths m and n are powers of two, so that a
    few more ids in one request do not compile a new program.
    """

    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]
    min_p: jax.Array  # float32 [B]
    repetition_penalty: jax.Array  # float32 [B]
    presence_penalty: jax.Array  # float32 [B]
    frequency_penalty: jax.Array  # float32 [B]
    seed: jax.Array  # uint32 [B]
    max_new_tokens: jax.Array  # int32 [B]
    ignore_eos: jax.Array  # bool [B]
    stop_ids: jax.Array  # int32 [B, m]
    bias_ids: jax.Array  # int32 [B, n]
    bias_values: jax.Array  # float32 [B, n]


@flax.struct.dataclass
class TokenCounts:
    """What each of B rows contains so far: the state that the three penalties read."""

    prompt: jax.Array  # bool [B, V], the token occurs in the prompt
    output: jax.Array  # int32 [B, V], how often the token was generated

    @classmethod
    def from_prompt(cls, tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> "TokenCounts":
        """Counts after a prompt: prompt[b, v] = any(tokens[b, :lengths[b]] == v), output = 0.

        Args:
          tokens: int [B, T], padded on the right.
          lengths: int [B], tokens of each row that count.
          vocab_size: V.
        """
        batch, length = tokens.shape
        real = jnp.arange(length)[None, :] < lengths[:, None]
        ids = jnp.where(real, tokens, vocab_size)  # padding is sent out of range and dropped
        rows = jnp.arange(batch)[:, None]
        prompt = jnp.zeros((batch, vocab_size), bool).at[rows, ids].set(True, mode="drop")
        return cls(prompt=prompt, output=jnp.zeros((batch, vocab_size), jnp.int32))

    def add(self, tokens: jax.Array, active: jax.Array) -> "TokenCounts":
        """Counts after more tokens: int [B] or [B, T], those with active (of the same shape) False left out."""
        batch, vocab_size = self.output.shape
        ids = jnp.where(active, tokens, vocab_size)
        rows = jnp.arange(batch).reshape(-1, *(1,) * (tokens.ndim - 1))
        output = self.output.at[rows, ids].add(1, mode="drop")
        return TokenCounts(prompt=self.prompt, output=output)


def stack_sampling(
    rows: Sequence[Sampling], *, max_new_tokens: int, vocab_size: int
) -> SamplingParams:
    """The settings of a batch as arrays, row b from rows[b].

    Args:
      rows: B >= 1 settings.
      max_new_tokens: limit of the whole call: rows without a limit get it, larger ones too.
      vocab_size: V; ids in logit_bias and stop_ids must lie below it.

    Raises:
      ValueError: no rows, or an id outside the vocabulary; the message names row and field.
    """
    if not rows:
        raise ValueError("rows: got none, at least one Sampling is needed")
    limit = _integer("max_new_tokens", max_new_tokens, 1, _MAX_INT32)
    for index, row in enumerate(rows):
        for name, ids in (("logit_bias", row.logit_bias), ("stop_ids", row.stop_ids)):
            outside = [token for token in ids if token >= vocab_size]
            if outside:
                raise ValueError(
                    f"rows[{index}].{name}: got token id {outside[0]}, accepted are ids below "
                    f"the vocabulary size {vocab_size}"
                )

    def floats(name: str) -> jax.Array:
        return jnp.asarray(np.array([getattr(row, name) for row in rows], np.float32))

    stop_ids = np.full((len(rows), _width(len(row.stop_ids) for row in rows)), -1, np.int32)
    width = _width(len(row.logit_bias) for row in rows)
    bias_ids = np.tile(_MAX_INT32 - np.arange(width, dtype=np.int32), (len(rows), 1))
    bias_values = np.zeros((len(rows), width), np.float32)
    for index, row in enumerate(rows):
        stop_ids[index, : len(row.stop_ids)] = row.stop_ids
        bias_ids[index, : len(row.logit_bias)] = list(row.logit_bias)
        bias_values[index, : len(row.logit_bias)] = list(row.logit_bias.values())
    return SamplingParams(
        temperature=floats("temperature"),
        top_k=jnp.asarray(np.array([row.top_k for row in rows], np.int32)),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        presence_penalty=floats("presence_penalty"),
        frequency_penalty=floats("frequency_penalty"),
        seed=jnp.asarray(np.array([row.seed for row in rows], np.uint32)),
        max_new_tokens=jnp.asarray(
            np.array([min(row.max_new_tokens or limit, limit) for row in rows], np.int32)
        ),
        ignore_eos=jnp.asarray(np.array([row.ignore_eos for row in rows], bool)),
        stop_ids=jnp.asarray(stop_ids),
        bias_ids=jnp.asarray(bias_ids),
        bias_values=jnp.asarray(bias_values),
    )


def _width(lengths: Iterable[int]) -> int:
    """The smallest power of two (at least 1) that holds every length."""
    return 1 << max(max(lengths) - 1, 0).bit_length()


def _number(name: str, value: Any, low: float = -_MAX_FLOAT32, high: float = _MAX_FLOAT32) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:  # false for NaN too
        at_most = "" if high == _MAX_FLOAT32 else f" to {high:g}"
        at_least = "" if low == -_MAX_FLOAT32 else f" from {low:g}"
        accepted = f"finite float32 numbers{at_least}{at_most}"
        raise ValueError(f"{name}: got {value!r}, accepted are {accepted}")
    return number


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name}: got {value!r}, accepted are integers from {low} to {high}")
    return number


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"stop_ids: got {value!r}, accepted is a sequence of token ids")
    # A set, because repeated ids would only widen the array that every step compares with.
    return tuple(sorted({_integer("stop_ids", token, 0, _MAX_INT32) for token in value}))


def _strings(value: Any) -> tuple[str, ...]:
    # A bare string is a sequence of strings too, and would stop at each of its letters.
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"stop: got {value!r}, accepted is a sequence of strings")
    strings = tuple(value)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop: got {text!r} in it, accepted are strings that are not empty")
    return strings


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"logit_bias: got {value!r}, accepted is a mapping from token id to number"
        )
    return {
        _integer("logit_bias", token, 0, _MAX_INT32): (
            -math.inf if bias == -math.inf else _number(f"logit_bias[{token}]", bias)
        )
        for token, bias in value.items()
    }
