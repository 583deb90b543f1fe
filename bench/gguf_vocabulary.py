"""The vocabulary of a GGUF file: a checkpoint's own, or one without meaning for random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from gemma_jax.config import Gemma4Config

_MODEL = "gemma4"  # llama.cpp's name for byte-pair encoding with spaces as ▁ and bytes as <0x00>
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def add_vocabulary(
    writer: gguf.GGUFWriter, config: Gemma4Config, tokenizer: Path | None = None
) -> None:
    """Adds ``config.vocab_size`` tokens, their types, the merges and the special ids.

    Args:
      writer: the file's writer, not yet opened.
      config: names the special ids.
      tokenizer: a ``tokenizer.json`` with a BPE model, whose tokens are padded to the size of the embedding; None makes
        up tokens, with the special ones and the bytes where the vocabulary has room for them.

    Raises:
      ValueError: the file is not such a tokenizer, or has more tokens than the embedding has rows.
    """
    if tokenizer is None:
        tokens, types, merges = _synthetic(config)
    else:
        tokens, types, merges = _read(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(_MODEL)
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_id)
    writer.add_eos_token_id(config.eos_ids[0])
    if len(config.eos_ids) > 1:
        writer.add_eot_token_id(config.eos_ids[-1])
    writer.add_pad_token_id(config.pad_id)
    if "<unk>" in tokens:
        writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _synthetic(config: Gemma4Config) -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges: ``<pad>``, ``<bos>``, ``<eos>``, bytes if they leave half of the rest, then words."""
    special = {config.pad_id: "<pad>", config.bos_id: "<bos>", config.eos_ids[0]: "<eos>"}
    free = [i for i in range(config.vocab_size) if i not in special]
    tokens = {i: f"▁{i}" for i in free} | special
    if len(free) >= 2 * len(_BYTES):
        tokens.update(zip(free, sorted(_BYTES), strict=False))
    ordered = [tokens[i] for i in range(config.vocab_size)]
    # A loader wants at least one merge.
    return ordered, [_type(token, set(special.values())) for token in ordered], ["▁ ▁"]


def _read(tokenizer: Path, size: int) -> tuple[list[str], list[int], list[str]]:
    try:
        data: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8"))
        kind = data["model"]["type"]
        by_id = {i: token for token, i in data["model"]["vocab"].items()}
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
        added = data.get("added_tokens", [])
        control = {token["content"] for token in added if token["special"]}
        by_id |= {token["id"]: token["content"] for token in added}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{tokenizer}: not a tokenizer.json with a BPE model: {error!r}") from None
    if kind != "BPE":
        raise ValueError(f"{tokenizer}: the model is {kind!r}; expected 'BPE'")
    if max(by_id) >= size:
        raise ValueError(f"{tokenizer}: token {max(by_id)}, but the embedding has {size} rows")
    tokens = [by_id.get(i, f"<unused_row_{i}>") for i in range(size)]
    types = [
        _type(token, control) if i in by_id else int(TokenType.UNUSED)
        for i, token in enumerate(tokens)
    ]
    return tokens, types, merges


def _type(token: str, control: set[str]) -> int:
    if token == "<unk>":
        return int(TokenType.UNKNOWN)
    if token in control:
        return int(TokenType.CONTROL)
    return int(TokenType.BYTE if token in _BYTES else TokenType.NORMAL)
