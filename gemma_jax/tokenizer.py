"""Text to token ids and back, from the files a checkpoint brings: `tokenizer.json` and friends."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from gemma_jax.chat_template import ChatTemplate, Message, find_template
from gemma_jax.streaming import StreamDecoder

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# With these decoders the text of a sequence is that of its tokens, one after the other.
_CONTEXT_FREE_DECODERS = frozenset({"Sequence", "Replace", "ByteFallback", "Fuse"})
_DEFAULT_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
_END_OF_TURN = "<turn|>"


class Tokenizer:
    """A checkpoint's tokenizer, its special tokens and its chat template.

    Attributes:
        bos_id: id that begins every sequence.
        eos_ids: ids that end a generation: end of text, end of turn.
        pad_id: id that fills rows of a batch.
        vocab_size: number of ids the tokenizer knows, added tokens included.
        special_ids: ids that stand for no text, such as BOS and end of turn.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wraps a `tokenizers.Tokenizer`; `from_folder` is the usual way.

        Args:
            tokenizer: its decoder must be made of Replace, ByteFallback and Fuse, as Gemma's is.
            special_tokens: {"bos_token": "<bos>", ...}; Gemma's names where absent.
            eos_ids: by default the eos token and, where there is one, `<turn|>`.
            chat_template: Jinja source, if there is one.

        Raises:
            ValueError: for another kind of decoder, or a special token the vocabulary lacks.
        """
        self._tokenizer = tokenizer
        self._check_decoder()
        tokens = _DEFAULT_TOKENS | dict(special_tokens or {})
        self.bos_id = self._id_of("bos_token", tokens["bos_token"])
        self.pad_id = self._id_of("pad_token", tokens["pad_token"])
        if eos_ids is None:
            end_of_turn = tokenizer.token_to_id(_END_OF_TURN)
            eos_ids = [self._id_of("eos_token", tokens["eos_token"])]
            eos_ids += [] if end_of_turn is None else [end_of_turn]
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._template = None if chat_template is None else ChatTemplate(chat_template, tokens)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        written = "|".join(re.escape(token.content) for token in added.values() if token.special)
        self._special_text = re.compile(written)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads a checkpoint's folder.

        `tokenizer.json` is required; `tokenizer_config.json` names the special tokens,
        `generation_config.json` (else `config.json`) the eos ids, `chat_template.jinja` (else
        `tokenizer_config.json`) brings the chat template.

        Raises:
            ValueError: for a missing or malformed file, naming it; as for the constructor.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no tokenizer.json in this folder")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{path}: not a tokenizer: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer,
            special_tokens=_special_tokens(settings),
            eos_ids=_eos_ids(folder),
            chat_template=find_template(folder, settings),
        )

    @property
    def chat_template(self) -> str | None:
        """The chat template's Jinja source, or None."""
        return None if self._template is None else self._template.source

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Returns the ids of `text`, BOS first unless told otherwise.

        Special tokens written out in the text (`<turn|>`) become those tokens.

        Raises:
            ValueError: for something that is no text, such as a string with lone surrogates.
        """
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"text: {text!r} given, a string of Unicode accepted") from error
        return [self.bos_id, *ids] if add_bos else ids

    def encode_plain(self, text: str) -> list[int]:
        """Returns the ids of `text` without BOS, special tokens written out in it taken as mere text."""
        # A special token is found only as a whole, so it is cut after its first character.
        cuts = [0, *(found.start() + 1 for found in self._special_text.finditer(text)), len(text)]
        parts = (text[begin:end] for begin, end in itertools.pairwise(cuts))
        return [token for part in parts for token in self.encode(part, add_bos=False)]

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token adds to the text; none for special tokens and unknown ids."""
        return b"" if token in self.special_ids else self._bytes_of(token)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`: what a `stream_decoder` gives for them, put together."""
        decoder = self.stream_decoder(skip_special_tokens)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def stream_decoder(
        self, skip_special_tokens: bool = True, keep: Iterable[str] = ()
    ) -> StreamDecoder:
        """Returns a decoder for one sequence of tokens as they come.

        Args:
            skip_special_tokens: leaves special tokens out of the text.
            keep: special tokens to leave in all the same, such as `THINKING_MARKERS`; those the
                vocabulary lacks are ignored.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        skipped = skipped.difference(map(self._tokenizer.token_to_id, keep))
        return StreamDecoder(lambda token: b"" if token in skipped else self._bytes_of(token))

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns the prompt text for `messages` (see `ChatTemplate.render`), BOS written out.

        Raises:
            ValueError: if the checkpoint has no chat template; as for `ChatTemplate.render`.
        """
        if self._template is None:
            raise ValueError("this checkpoint has no chat template: give it plain text instead")
        return self._template.render(
            messages,
            tools=tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Returns the ids of `apply_chat_template`'s text, with exactly one BOS in front."""
        text = self.apply_chat_template(
            messages,
            tools=tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
        )
        ids = self.encode(text, add_bos=False)
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _bytes_of(self, token: int) -> bytes:
        """The bytes a token stands for; none for an id outside the vocabulary."""
        token = int(token)
        if token not in self._bytes:
            piece = self._tokenizer.id_to_token(token)
            if piece is None:
                text = b""
            elif byte := _BYTE_TOKEN.fullmatch(piece):
                text = bytes.fromhex(byte[1])
            else:
                text = self._tokenizer.decode([token], skip_special_tokens=False).encode()
            self._bytes[token] = text
        return self._bytes[token]

    def _check_decoder(self) -> None:
        decoder: dict[str, Any] = {"type": None}
        if self._tokenizer.decoder is not None:
            decoder = json.loads(self._tokenizer.decoder.__getstate__())
        used = {d["type"] for d in [decoder, *decoder.get("decoders", ())]}
        if not used <= _CONTEXT_FREE_DECODERS:
            raise ValueError(
                f"tokenizer.json: decoder {decoder['type']} given, a Sequence of Replace, "
                "ByteFallback and Fuse accepted"
            )

    def _id_of(self, name: str, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"tokenizer: {name} {token!r} is not in the vocabulary")
        return token_id


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The `*_token` entries, which are strings or {"content": string, ...}."""
    found = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _eos_ids(folder: Path) -> list[int] | None:
    """eos ids in the order of authority: generation settings, model settings; None if absent."""
    for name in ("generation_config.json", "config.json"):
        settings = _read_json(folder / name)
        for section in (settings, settings.get("text_config") or {}):
            ids = section.get("eos_token_id")
            if isinstance(ids, int):
                return [ids]
            if ids:
                return list(ids)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if isinstance(content, dict):
        return content
    raise ValueError(f"{path}: a JSON object expected, {type(content).__name__} given")
