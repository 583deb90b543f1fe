"""A 4096-token vocabulary in the shape of Gemma's: ids 0-106 are Gemma's own, then bytes, then BPE.

The saved tokenizer has Gemma's normalizer (space becomes "▁"), its pre-tokenizer, byte fallback
and decoder. While the merges are learned a stricter pre-tokenizer keeps every token inside one
word, number digit or run of punctuation, so tokens look like "▁the". Needs `tokenizers`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

VOCAB_SIZE = 4096
SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
WORDS = r"▁?\p{L}+(?:'\p{L}+)*|▁?\p{N}|\n+|▁+(?=▁)|▁?[^\p{L}\p{N}\n▁]+|▁"


def _reserved() -> list[str]:
    """Names of ids 0..362: Gemma's first 107, with `<unusedN>` between, and the 256 bytes."""
    by_id = {i: name for name, i in SPECIAL.items()}
    free = iter(range(107))
    names = [by_id.get(i) or f"<unused{next(free)}>" for i in range(107)]
    return names + [f"<0x{byte:02X}>" for byte in range(256)]


def train(texts: Iterable[str], size: int = VOCAB_SIZE) -> Tokenizer:
    """Learns the merges and returns the tokenizer; encode(x) starts with <bos>."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    reserved = _reserved()
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=reserved,
            limit_alphabet=110,
            initial_alphabet=[chr(c) for c in range(33, 127)],
            min_frequency=2,
            max_token_length=16,
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    vocab = learned["vocab"]
    if len(vocab) != size or any(vocab[n] != i for i, n in enumerate(reserved)):
        raise ValueError(f"learned {len(vocab)} tokens of {size}, or moved a reserved id")
    merges = [tuple(pair) for pair in learned["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return tokenizer


def check(tokenizer: Tokenizer, samples: Iterable[str]) -> None:
    """Raises ValueError unless every sample survives encoding and decoding unchanged."""
    odd = ["naïve café — 中文字, русский 🙂👩‍🚀", "  two  spaces\n\n\ttab ", " lead", "ﷺ\u200b"]
    for text in (*odd, *samples):
        back = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True)
        if back != text:
            raise ValueError(f"the tokenizer does not round-trip {text[:80]!r}: {back[:80]!r}")


def save(tokenizer: Tokenizer, folder: Path, chat_template: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(chat_template, folder / "chat_template.jinja")
