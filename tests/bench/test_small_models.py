"""The small models' corpus and tokenizer: cleaning, splitting, and exact round trips."""

import random
import struct
import zlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.small_models import corpus, tokenizer

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "tests/data/held_out.txt"


def test_osis_markup_loses_notes_and_titles_and_keeps_paragraphs():
    markup = (
        '<title>Gen</title><div sID="a" type="x-p"/><w lemma="G1">In</w> the beginning'
        '<note>or: <hi>once</hi></note>, God &amp; light.<div eID="a" type="x-p"/>'
        '<div sID="b" type="x-p"/>The second paragraph is here.<div eID="b" type="x-p"/>'
    )
    paragraphs = "\n".join(corpus._osis(markup)).split("\n")
    assert paragraphs == ["In the beginning, God & light.", "The second paragraph is here."]


def test_sword_blocks_are_read_through_their_index(tmp_path):
    blocks = [b"first block", b"second block"]
    packed = [zlib.compress(block) for block in blocks]
    index = struct.pack("<III", 0, len(packed[0]), 11)
    index += struct.pack("<III", 0, 0, 0) + struct.pack("<III", len(packed[0]), len(packed[1]), 12)
    for testament in ("ot", "nt"):
        (tmp_path / f"{testament}.bzs").write_bytes(index)
        (tmp_path / f"{testament}.bzz").write_bytes(b"".join(packed))
    expected = ["first block", "second block"] * 2
    assert list(corpus._sword_books(tmp_path, "b")) == expected


@pytest.mark.parametrize("count", [2, 40, 1000])
def test_held_out_documents_are_the_last_and_never_trained_on(count):
    text = corpus.Text("t", "a", 1.0, [[f"document {i:04d}"] for i in range(count)])
    train, held = text.split()
    assert train + held == text.documents
    assert len(held) == max(1, round(corpus.HELD_OUT_FRACTION * count))


def test_passages_keep_every_paragraph_in_order():
    rng = random.Random(0)
    document = ["x" * rng.randint(1, 900) for _ in range(50)]
    pieces = corpus.passages(document, 1000)
    assert "\n\n".join(pieces) == "\n\n".join(document)
    assert max(map(len, pieces)) <= 1000 + 2


def test_conversations_alternate_and_end_with_the_model():
    text = corpus.Text("t", "an Author", 1.0, [])
    document = [" ".join(f"This is the sentence numbered {i}." for i in range(20))]
    for seed in range(20):
        turns = corpus.chat(text, document, random.Random(seed))
        assert [t["role"] for t in turns] == ["user", "assistant"] * (len(turns) // 2)


def test_a_learned_tokenizer_keeps_gemmas_ids_and_round_trips():
    learned = tokenizer.train([HELD_OUT.read_text(encoding="utf-8")], size=1000)
    tokenizer.check(learned, HELD_OUT.read_text(encoding="utf-8").split("\n\n\n"))
    assert learned.token_to_id("<|turn>") == 105
    assert learned.token_to_id("<turn|>") == 106
    assert learned.encode("").ids == [tokenizer.SPECIAL["<bos>"]]


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_the_bundled_tokenizer_round_trips_the_held_out_text(name):
    path = ROOT / "gemma_jax/checkpoints" / name / "tokenizer.json"
    tokenizer.check(Tokenizer.from_file(str(path)), [HELD_OUT.read_text(encoding="utf-8")])
