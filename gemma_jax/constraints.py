"""Structured output: which tokens a row may choose from, so that its text follows a schema, a regex or a list.

`Constraint` is what a caller writes into `gemma_jax.Sampling`; `Matcher` follows one row through it, token by token, on
the host. Grammars are compiled and matched by llguidance (https://github.com/guidance-ai/llguidance), which walks a
trie of the vocabulary's bytes; the mask it makes is applied on the device, by `gemma_jax.sampler`.

>>> import gemma_jax
>>> lm = gemma_jax.load("tiny-dense", format="q4k")
>>> colour = Constraint.choice(["red", "green"])
>>> [done] = lm.generate("The sea was", gemma_jax.Sampling(constraint=colour))
>>> done.text in ("red", "green"), done.finish_reason
(True, 'stop')
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import llguidance
import numpy as np

from gemma_jax.tokenizer import Tokenizer

# Between the parts of a JSON text. llguidance's own default admits any amount of it, which a model can write for ever.
_WHITESPACE = r"( |\n[ \t]{0,32})"


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a row's text must match as a whole. Made by `json_schema`, `regex`, `choice` or `lark`; checked there.

    Constraints are compared and hashed by their grammar, and compiled once for each tokenizer. A row ends with an
    end-of-sequence token, which is allowed exactly where the text so far matches; no other special token ever is.
    A row that reaches its token limit first has a text that begins a matching one.

    Attributes:
      grammar: the grammar as llguidance takes it.
    """

    grammar: str

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any] | str | bool, *, compact: bool = False
    ) -> Constraint:
        """JSON that is valid under `schema`; ``{"type": "object"}`` takes any object, ``True`` any JSON.

        Properties come in the schema's order. Supported are the keywords of https://json-schema.org that llguidance
        can hold a text to while it is written; others, such as "not" and "uniqueItems", are refused.

        Args:
          schema: the schema, or its JSON.
          compact: without whitespace between tokens of JSON; otherwise a space, or a newline and indentation, may
            stand wherever JSON admits whitespace.

        Raises:
          ValueError: not a schema, one that nothing satisfies, or a keyword that is not supported.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json_schema: got {_short(schema)}, not JSON: {error}") from None
        if not isinstance(parsed, Mapping | bool):
            raise ValueError(
                f"json_schema: got {_short(parsed)}, accepted are an object, True and False"
            )
        whitespace: Any = (
            {"whitespace_flexible": False} if compact else {"whitespace_pattern": _WHITESPACE}
        )
        # Wrapped, since the compiler takes options only from an object, and a schema may be True.
        if isinstance(parsed, bool):
            text = json.dumps({"allOf": [parsed]})

        def compiled(text: str) -> str:
            return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=whitespace)

        return cls._checked("json_schema", schema, compiled, text)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        r"""Texts that `pattern` matches from beginning to end.

        Args:
          pattern: in the syntax of Rust's regex crate (https://docs.rs/regex), without anchors, look-around and
            back-references.

        Raises:
          ValueError: not such a pattern; the message shows where.

        >>> Constraint.regex("a(b")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: regex: got 'a(b', ... unclosed group...
        """
        if not isinstance(pattern, str):
            raise ValueError(f"regex: got {_short(pattern)}, accepted is a string")
        return cls._checked("regex", pattern, llguidance.LLMatcher.grammar_from_regex, pattern)

    @classmethod
    def choice(cls, choices: Iterable[str]) -> Constraint:
        """One of some texts, to the letter.

        Raises:
          ValueError: no choices, or one that is not a text.
        """
        texts = [choices] if isinstance(choices, str) else list(choices)
        # A bare string is a sequence of strings too, and would be a choice between its letters.
        if isinstance(choices, str) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"choice: got {_short(choices)}, accepted is a sequence of strings")
        grammar = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return cls._checked("choice", texts, llguidance.LLMatcher.grammar_from_lark, grammar)

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Texts of a context-free grammar, in llguidance's dialect of Lark, from its rule ``start``.

        Raises:
          ValueError: not such a grammar; the message shows where.
        """
        if not isinstance(grammar, str):
            raise ValueError(f"lark: got {_short(grammar)}, accepted is a string")
        return cls._checked("lark", grammar, llguidance.LLMatcher.grammar_from_lark, grammar)

    @classmethod
    def _checked(
        cls, name: str, given: Any, compiler: Callable[[str], str], source: str
    ) -> Constraint:
        try:
            grammar = compiler(source)
            failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
        except ValueError as error:  # lone surrogates, which are no text
            failed, messages = True, [str(error)]
        if failed:
            raise ValueError(f"{name}: got {_short(given)}, refused: {messages[0].strip()}")
        return cls(grammar)


class Matcher:
    """Follows one row through a constraint.

    Args:
      constraint: what the row must match.
      tokenizer: whose tokens it is made of; the first constraint for a tokenizer builds the trie of its vocabulary.
      vocab_size: V, the width of the logits, at least the size of the tokenizer's vocabulary.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._matcher = _compiled(constraint, tokenizer).deep_copy()
        self._words = mask_words(vocab_size)

    def mask(self) -> np.ndarray:
        """uint32 ``[ceil(V / 32)]``: bit ``v % 32`` of word ``v // 32`` says whether token v may come next.

        Raises:
          ValueError: the grammar takes more work at this place than llguidance allows itself.
        """
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        self._check()
        mask = np.zeros((self._words,), np.uint32)
        mask[: len(found)] = found
        return mask

    def consume(self, token: int) -> None:
        """Goes on past a token.

        Raises:
          ValueError: `mask` does not allow it; the matcher is of no use afterwards.
        """
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> tuple[int, ...]:
        """The tokens that must come next: `mask` would allow the first alone, after it the second alone, and so on.

        Of the ways to spell a forced text only the tokenizer's own is allowed, as far as what follows cannot change it.
        """
        forced = tuple(self._matcher.compute_ff_tokens())
        self._check()
        return forced

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far matches."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow but an end-of-sequence token, if that has not come yet."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().split("\n")[0]
            raise ValueError(f"constraint: {reason}")


def mask_words(vocab_size: int) -> int:
    """How many uint32 hold a bit for each of `vocab_size` tokens."""
    return -(-vocab_size // 32)


class _Vocabulary:
    """A tokenizer as llguidance wants to see one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_ids[0]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
    return llguidance.LLTokenizer(wrapper, eos_token=list(tokenizer.eos_ids))


@functools.lru_cache(maxsize=64)
def _compiled(constraint: Constraint, tokenizer: Tokenizer) -> llguidance.LLMatcher:
    """A matcher at the beginning, to be copied: what it learns about the grammar's lexemes is shared."""
    return llguidance.LLMatcher(_vocabulary(tokenizer), constraint.grammar, log_level=0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
