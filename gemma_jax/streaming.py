"""Text out of a stream of tokens: whole characters, stop strings, thoughts apart from the answer.

    tokens -> StreamDecoder -> StopStrings -> ThinkingSplitter -> (kind, text)

Each stage has `push` and `flush`. What comes out depends on the tokens alone, never on how they
were cut into pushes, so that streamed and whole generations read the same.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

THINKING_MARKERS = ("<|channel>", "<channel|>")
"""Special tokens around a thought: pass them to `Tokenizer.stream_decoder(keep=...)`."""

TOOL_MARKERS = ("<|tool_call>", "<tool_call|>", '<|"|>')
"""Special tokens of a tool call, to be kept by whoever wants to parse one."""

Kind = Literal["thought", "answer"]


class StreamDecoder:
    """Tokens to text, one at a time: never half a character.

    A token stands for bytes; bytes that end inside a UTF-8 sequence wait for the rest, and bytes
    that can never become a character turn into one U+FFFD per maximal broken part (Unicode 16,
    section 3.9), leaving their neighbours alone. `tokenizers.decoders.DecodeStream` is not used
    because it raises "Invalid prefix" on exactly such bytes: a byte-fallback run decodes as a
    whole there, so a broken byte takes back characters that were already emitted.

    Args:
        bytes_of: the bytes a token id stands for, empty for those to be skipped.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Returns the characters completed by `token`, possibly none."""
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Ends a text at the first stop string, of which nothing is ever emitted.

    The first is the one that is complete first; of two that end together the one that began
    first. A suffix that could still become a stop string is held back.

    Args:
        stops: stop strings, none of them empty.

    Raises:
        ValueError: for an empty stop string.

    >>> stop = StopStrings(["END"])
    >>> stop.push("the E"), stop.push("N"), stop.push("D of it")
    (('the ', False), ('', False), ('', True))
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop: {stops!r} given, a sequence of non-empty strings accepted")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (text safe to emit, whether a stop string was met)."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        safe = len(text) - _partial_suffix(text, self._stops)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Returns what was held back, at the end of a text that met no stop string."""
        held, self._held = self._held, ""
        return held


class ThinkingSplitter:
    r"""Splits a reply into thoughts and answer; the markers belong to neither.

    Gemma 4 thinks in `<|channel>thought\n ... \n<channel|>` (see the chat template). The decoder
    in front must let `THINKING_MARKERS` through.

    >>> splitter = ThinkingSplitter()
    >>> splitter.push("<|channel>thought\nHm.\n<chan") + splitter.push("nel|>Yes.")
    [('thought', 'Hm.'), ('answer', 'Yes.')]
    """

    _OPEN, _CLOSE = THINKING_MARKERS
    _HEADER = "thought\n"
    # The template writes a newline before the closing marker: it is not part of the thought.
    _CLOSES = ("\n" + _CLOSE, _CLOSE)

    def __init__(self) -> None:
        self._state: Literal["answer", "header", "thought"] = "answer"
        self._held = ""

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Returns the pieces that can be told apart so far, in order, none of them empty."""
        self._held += text
        pieces: list[tuple[Kind, str]] = []
        advancing = True
        while advancing:
            if self._state == "answer":
                advancing = self._emit_until((self._OPEN,), "answer", "header", pieces)
            elif self._state == "thought":
                advancing = self._emit_until(self._CLOSES, "thought", "answer", pieces)
            else:
                advancing = self._read_header()
        return pieces

    def flush(self) -> list[tuple[Kind, str]]:
        """Returns what was held back, at the end of the reply."""
        held, self._held = self._held, ""
        if self._state == "header" or not held:
            return []
        return [(self._state, held)]

    def _emit_until(
        self,
        markers: tuple[str, ...],
        kind: Kind,
        next_state: Literal["answer", "header"],
        pieces: list[tuple[Kind, str]],
    ) -> bool:
        """Emits up to the first marker or to a possible one; tells whether one was passed."""
        found = [(at, m) for m in markers if (at := self._held.find(m)) >= 0]
        if found:
            end, marker = min(found)
            rest = self._held[end + len(marker) :]
            self._state = next_state
        else:
            end = len(self._held) - _partial_suffix(self._held, markers)
            rest = self._held[end:]
        if end:
            pieces.append((kind, self._held[:end]))
        self._held = rest
        return bool(found)

    def _read_header(self) -> bool:
        """Drops the channel's name; a channel that does not begin with it is all thought."""
        if len(self._held) < len(self._HEADER) and self._HEADER.startswith(self._held):
            return False
        self._held = self._held.removeprefix(self._HEADER)
        self._state = "thought"
        return True


def stream_text(
    tokens: Iterable[int], decoder: StreamDecoder, stops: Sequence[str] = ()
) -> Iterator[str]:
    """Decodes `tokens` as they come, up to the first of `stops`; takes no token after that.

    Raises:
        ValueError: for an empty stop string.
    """
    stop = StopStrings(stops)
    for token in tokens:
        text, stopped = stop.push(decoder.push(token))
        if text:
            yield text
        if stopped:
            return
    text, stopped = stop.push(decoder.flush())
    text += "" if stopped else stop.flush()
    if text:
        yield text


def split_thinking(texts: Iterable[str]) -> Iterator[tuple[Kind, str]]:
    """Splits a stream of text into ("thought" | "answer", text) pieces as they come."""
    splitter = ThinkingSplitter()
    for text in texts:
        yield from splitter.push(text)
    yield from splitter.flush()


def _partial_suffix(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a marker without completing it."""
    longest = max((len(m) for m in markers), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[len(text) - length :]
        if any(len(m) > length and m.startswith(tail) for m in markers):
            return length
    return 0
