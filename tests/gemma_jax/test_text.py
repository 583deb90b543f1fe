"""Tokenizer, streaming text and chat template, on small tokenizers built here."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gemma_jax.streaming import (
    THINKING_MARKERS,
    StopStrings,
    ThinkingSplitter,
    split_thinking,
    stream_text,
)
from gemma_jax.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
GOLDENS = json.loads((DATA / "chat_template_goldens.json").read_text(encoding="utf-8"))["cases"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", *THINKING_MARKERS]
WORDS = ["▁", "▁Hello", "▁world", "thought", "\n", "é", "🦙", *"abcdefghijklmnopqrstuvwxyz.ETHN"]


def build_tokenizer(decoder=None):
    """A byte-fallback BPE tokenizer put together as Gemma's is, with merges for two words."""
    merges, pieces = [], []
    for word in ("▁Hello", "▁world", "thought"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            pieces += [word[:end], word[end - 1]]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    names = dict.fromkeys([*SPECIAL, *byte_tokens, *WORDS, *pieces, "H"])
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture(scope="module")
def raw():
    return build_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(raw):
    return Tokenizer(raw, chat_template=(DATA / "chat_template.jinja").read_text(encoding="utf-8"))


def byte_ids(raw, data):
    return [raw.token_to_id(f"<0x{byte:02X}>") for byte in data]


def write_folder(folder, raw, **files):
    raw.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# Encoding and decoding


def test_encode_puts_bos_first_unless_told_otherwise(tokenizer):
    ids = tokenizer.encode(" Hello", add_bos=False)
    assert tokenizer.encode(" Hello") == [tokenizer.bos_id, *ids]
    assert tokenizer.bos_id not in ids


@pytest.mark.parametrize(
    "text", ["<turn|>", "a<eos><eos> b", "<turn|<bos>turn|>", "", "é<|turn>🦙"]
)
def test_plain_text_has_no_special_tokens(tokenizer, text):
    ids = tokenizer.encode_plain(text)
    assert not set(ids) & tokenizer.special_ids
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_special_tokens_and_unknown_ids_add_no_bytes(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.eos_ids, tokenizer.vocab_size]
    assert [tokenizer.token_bytes(i) for i in ids] == [b""] * len(ids)


@pytest.mark.parametrize(
    "text", ["", " ", "Hello world", " Hello  world\n", "naïve 🦙 é", "日本語", "a\tb\x00c", "▲🏴‍☠️"]
)
def test_decode_inverts_encode_and_agrees_with_the_library(tokenizer, raw, text):
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids) == raw.decode(ids)


def test_special_tokens_are_skipped_only_on_request_and_kept_by_name(tokenizer):
    ids = tokenizer.encode("<|turn>a<|channel>b<channel|>c<turn|>")
    assert tokenizer.decode(ids) == "abc"
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<bos><|turn>a<|channel>b<channel|>c<turn|>"
    )
    decoder = tokenizer.stream_decoder(keep=THINKING_MARKERS)
    assert "".join(map(decoder.push, ids)) == "a<|channel>b<channel|>c"


def test_ids_outside_the_vocabulary_are_no_text(tokenizer):
    ids = tokenizer.encode("ab", add_bos=False)
    assert tokenizer.decode([ids[0], tokenizer.vocab_size + 7, ids[1]]) == "ab"


@pytest.mark.parametrize("text", ["lone \udcff surrogate", 3, None])
def test_what_is_no_text_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match=r"text: .* given, a string of Unicode accepted"):
        tokenizer.encode(text)


# Streaming: whole characters only


def test_stream_emits_a_character_with_its_last_byte(tokenizer, raw):
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(token) for token in byte_ids(raw, "é🦙".encode())]
    assert pieces == ["", "é", "", "", "", "🦙"]
    assert decoder.flush() == ""


def test_stream_keeps_good_neighbours_of_broken_bytes(tokenizer, raw):
    """The case in which `tokenizers.decoders.DecodeStream` raises "Invalid prefix"."""
    ids = [*byte_ids(raw, "é".encode()), *byte_ids(raw, b"\xc3"), raw.token_to_id("a")]
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(token) for token in ids] == ["", "é", "", "\ufffda"]


def test_flush_gives_up_an_unfinished_character_once(tokenizer, raw):
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(token) for token in byte_ids(raw, b"\xf0\x9f")] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_a_special_token_inside_a_character_does_not_break_it(tokenizer, raw):
    first, second = byte_ids(raw, "é".encode())
    assert tokenizer.decode([first, raw.token_to_id("<turn|>"), second]) == "é"


def test_leading_spaces_survive_streaming(tokenizer):
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(t) for t in tokenizer.encode(" Hello world", add_bos=False)]
    assert "".join(pieces) == " Hello world"
    assert pieces[0].startswith(" ")


def test_random_bytes_decode_as_python_decodes_them(tokenizer, raw):
    rng = random.Random(0)
    alphabet = [*"é🦙a日".encode(), 0xFF, 0xC3, 0x80]
    for _ in range(300):
        data = bytes(rng.choices(alphabet, k=rng.randrange(12)))
        decoder = tokenizer.stream_decoder()
        text = "".join(map(decoder.push, byte_ids(raw, data))) + decoder.flush()
        assert text == data.decode("utf-8", errors="replace")


# Stop strings


def run_stops(stops, pushes):
    stop, out = StopStrings(stops), ""
    for text in pushes:
        piece, stopped = stop.push(text)
        out += piece
        if stopped:
            return out, True
    return out + stop.flush(), False


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "the END of", ("the ", True)),
        (["END"], "the EN", ("the EN", False)),
        (["END"], "EENEND", ("EEN", True)),
        (["aab"], "aaab", ("a", True)),
        (["abc", "b"], "abc", ("a", True)),
        (["bc", "abc"], "abc", ("", True)),
        (["\n\n"], "one\ntwo\n\nthree", ("one\ntwo", True)),
        ([], "anything", ("anything", False)),
    ],
)
def test_stop_string_ends_the_text_wherever_pushes_are_cut(stops, text, expected):
    for size in range(1, len(text) + 1):
        pushes = [text[i : i + size] for i in range(0, len(text), size)]
        assert run_stops(stops, pushes) == expected


def test_random_texts_stop_alike_however_they_are_cut():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=12))
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 4))) for _ in range(2)]
        pushes, rest = [], text
        while rest:
            size = rng.randint(1, 5)
            pushes, rest = [*pushes, rest[:size]], rest[size:]
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        expected = (text[: min(ends)[1]], True) if ends else (text, False)
        assert run_stops(stops, pushes) == expected


def test_only_a_possible_stop_string_is_held_back():
    stop = StopStrings(["STOP"])
    assert stop.push("go S") == ("go ", False)
    assert stop.push("lowly") == ("Slowly", False)


def test_nothing_is_emitted_after_a_stop_string():
    stop = StopStrings(["x"])
    assert stop.push("axb") == ("a", True)
    assert stop.push("more") == ("", True)
    assert stop.flush() == ""


@pytest.mark.parametrize("stops", [[""], "abc", [3]])
def test_a_malformed_stop_string_is_refused(stops):
    with pytest.raises(ValueError, match=r"stop: .* given, a sequence of non-empty strings"):
        StopStrings(stops)


def test_stream_text_takes_no_token_after_the_stop_string(tokenizer):
    tokens = iter(tokenizer.encode("abcEND def", add_bos=False))
    assert "".join(stream_text(tokens, tokenizer.stream_decoder(), ["END"])) == "abc"
    assert tokenizer.decode(tokens) == " def"


def test_stream_text_emits_what_was_held_back_at_the_end(tokenizer, raw):
    tokens = [*tokenizer.encode("abEN", add_bos=False), *byte_ids(raw, b"\xf0")]
    assert list(stream_text(tokens, tokenizer.stream_decoder(), ["END"])) == [
        "a",
        "b",
        "EN\ufffd",
    ]


# Thoughts


def merged(pieces):
    out = {"thought": "", "answer": ""}
    for kind, text in pieces:
        assert text
        out[kind] += text
    return out["thought"], out["answer"]


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<|channel>thought\nHm\nso.\n<channel|>Yes.", "Hm\nso.", "Yes."),
        ("Plain answer.", "", "Plain answer."),
        ("<|channel>thought\n<channel|>Yes.", "", "Yes."),
        ("<|channel>thought\nnever closed\n", "never closed\n", ""),
        ("<|channel>thought\n1<channel|>a<|channel>thought\n2\n<channel|>b", "12", "ab"),
        ("<|channel>no name\n<channel|>a", "no name", "a"),
        ("a <|chan", "", "a <|chan"),
        ("<|channel>thou", "", ""),
    ],
)
def test_thoughts_are_split_off_wherever_pushes_are_cut(text, thought, answer):
    for size in range(1, len(text) + 1):
        pushes = [text[i : i + size] for i in range(0, len(text), size)]
        assert merged(split_thinking(pushes)) == (thought, answer)


def test_thought_streams_before_it_is_finished():
    splitter = ThinkingSplitter()
    assert splitter.push("<|channel>thought\nHm") == [("thought", "Hm")]
    assert splitter.push("\n") == []
    assert splitter.push("so") == [("thought", "\nso")]


def test_thoughts_come_apart_from_tokens(tokenizer):
    ids = tokenizer.encode("<|channel>thought\nhm\n<channel|>abc<turn|>", add_bos=False)
    texts = stream_text(ids, tokenizer.stream_decoder(keep=THINKING_MARKERS))
    assert merged(split_thinking(texts)) == ("hm", "abc")


# Chat template


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case["name"])
def test_chat_template_renders_as_transformers_does(tokenizer, case):
    assert tokenizer.apply_chat_template(case["messages"], **case["settings"]) == case["text"]


def test_encode_chat_has_exactly_one_bos(raw, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    ids = tokenizer.encode_chat(messages)
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids, False) == tokenizer.apply_chat_template(messages)
    without = Tokenizer(raw, chat_template="{{ messages[0].content }}")
    assert without.encode_chat(messages) == [raw.token_to_id("<bos>"), *raw.encode("hi").ids]


def test_template_cannot_leave_the_sandbox(raw):
    messages = [{"role": "user", "content": "hi"}]
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ):
        with pytest.raises(ValueError, match="chat template: cannot render"):
            Tokenizer(raw, chat_template=source).apply_chat_template(messages)


def test_template_errors_are_told(raw, tokenizer):
    with pytest.raises(ValueError, match="unknown role critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "hi"}])
    broken = Tokenizer(raw, chat_template="a\n{% if %}")
    with pytest.raises(ValueError, match="chat template: line 2: "):
        broken.apply_chat_template([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(raw).apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("messages", [[], "hi", [{"content": "hi"}], ["hi"]])
def test_malformed_messages_are_refused(tokenizer, messages):
    with pytest.raises(ValueError, match="messages"):
        tokenizer.apply_chat_template(messages)


# The checkpoint's folder


def test_folder_settings_are_read(tmp_path, raw):
    folder = write_folder(
        tmp_path,
        raw,
        tokenizer_config={"bos_token": {"content": "<|turn>"}, "chat_template": "{{ bos_token }}!"},
        config={"text_config": {"eos_token_id": 1}},
        generation_config={"eos_token_id": [1, raw.token_to_id("<turn|>")]},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_id == raw.token_to_id("<|turn>")
    assert tokenizer.pad_id == raw.token_to_id("<pad>")
    assert tokenizer.eos_ids == (1, raw.token_to_id("<turn|>"))
    assert tokenizer.vocab_size == raw.get_vocab_size()
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}]) == "<|turn>!"


def test_eos_ids_fall_back_to_the_config_then_to_the_vocabulary(tmp_path, raw):
    folder = write_folder(tmp_path, raw, config={"text_config": {"eos_token_id": 7}})
    assert Tokenizer.from_folder(folder).eos_ids == (7,)
    (folder / "config.json").unlink()
    expected = (raw.token_to_id("<eos>"), raw.token_to_id("<turn|>"))
    assert Tokenizer.from_folder(folder).eos_ids == expected


def test_template_file_goes_before_the_one_in_the_settings(tmp_path, raw):
    named = [{"name": "default", "template": "settings"}, {"name": "rag", "template": "other"}]
    folder = write_folder(tmp_path, raw, tokenizer_config={"chat_template": named})
    assert Tokenizer.from_folder(folder).chat_template == "settings"
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "file"


def test_missing_or_broken_files_are_named(tmp_path, raw):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, raw, tokenizer_config={"bos_token": "<nowhere>"})
    with pytest.raises(ValueError, match="bos_token '<nowhere>' is not in the vocabulary"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.ByteLevel()])
def test_decoders_that_need_context_are_refused(decoder):
    with pytest.raises(ValueError, match=r"decoder (Metaspace|ByteLevel) given"):
        Tokenizer(build_tokenizer(decoder))
