"""Structured output: grammars against the tokens that spell them, and texts of the bundled model under them."""

from __future__ import annotations

import functools
import json
import math
import re

import jax
import numpy as np
import pytest

import gemma_jax
from gemma_jax import Constraint, LanguageModel, Sampling, generation, stepwise
from gemma_jax.constraints import Matcher, mask_words

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "home address": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["flat", "Höhle 世界 🙂"]},
                "rented": {"type": "boolean"},
            },
            "required": ["kind", "rented"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "home address"],
    "additionalProperties": False,
}
PROMPT = "The captain"
LIMIT = 128  # of every batch, and batches have one row or four, so that few programs are compiled


@functools.cache
def model() -> LanguageModel:
    return gemma_jax.load("tiny-dense", format="q4k")


def matcher_of(constraint: Constraint) -> Matcher:
    return Matcher(constraint, model().tokenizer, model().config.vocab_size)


def allowed(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def run(
    prompts: list[str], settings: list[Sampling], *, jump_ahead: bool = True
) -> tuple[list[stepwise.Row], int]:
    """The rows of a batch after `stepwise.steps`, and how many steps that took."""
    lm = model()
    ids = [lm.tokenizer.encode(prompt) for prompt in prompts]
    tokens, lengths, params, room = lm._batch(ids, settings, LIMIT)
    rows = lm._rows(settings, LIMIT)
    capacity = tokens.shape[1] + room
    taken = stepwise.steps(
        lm.params,
        tokens,
        lengths,
        params,
        rows,
        model=lm.model,
        capacity=capacity,
        jump_ahead=jump_ahead,
    )
    return rows, sum(1 for _ in taken)


def is_person(text: str) -> bool:
    person = json.loads(text)
    home = person["home address"]
    return (
        list(person) == ["name", "age", "home address"]
        and isinstance(person["name"], str)
        and len(person["name"]) <= 8
        and type(person["age"]) is int
        and 0 <= person["age"] <= 150
        and list(home) == ["kind", "rented"]
        and home["kind"] in ("flat", "Höhle 世界 🙂")
        and type(home["rented"]) is bool
    )


# --- grammars ---------------------------------------------------------------------------------------------------------


def test_allowed_tokens_spell_exactly_what_the_grammar_allows() -> None:
    """Every token at every place that can be reached in a finite language, some of it in byte tokens."""
    tokenizer = model().tokenizer
    texts = ["red", "rot", "  red\tagain", "green and", "green", "🙂", "🙃 <turn|>", "世界"]
    language = [text.encode() for text in texts]
    pieces = {v: tokenizer.token_bytes(v) for v in range(model().config.vocab_size)}
    seen: set[bytes] = set()
    left: list[tuple[int, ...]] = [()]
    while left:
        prefix = left.pop()
        before = b"".join(pieces[v] for v in prefix)
        if before in seen:
            continue
        seen.add(before)
        matcher = matcher_of(Constraint.choice(texts))
        for token in prefix:
            matcher.consume(token)
        spelling = {
            v
            for v, piece in pieces.items()
            if piece and any(text.startswith(before + piece) for text in language)
        }
        ends = set(tokenizer.eos_ids) if before in language else set()
        found, forced = allowed(matcher.mask()), matcher.forced()
        assert matcher.is_accepting == (before in language)
        assert matcher.is_finished == (before in language and before != b"green")
        if forced:
            assert found == set(forced[:1])
            assert found <= spelling
        else:
            assert found == spelling | ends
        left += [(*prefix, v) for v in found - ends]
    assert {b"", b"re", b"green", *language} <= seen


@pytest.mark.parametrize(
    ("constraint", "matching", "other"),
    [
        (Constraint.regex(r"[0-9]{3}-(ä|🙂)+"), ["123-ä", "000-🙂ä"], ["12-ä", "123-", "123-a"]),
        (Constraint.regex("a?"), ["", "a"], ["aa"]),
        (Constraint.choice(['"\\\n\x01', "", "<eos>"]), ['"\\\n\x01', "", "<eos>"], ['"', "<"]),
        (
            Constraint.json_schema({"type": "object"}),
            ['{"a": [1, {}]}', "{\n  }"],
            ["[]", "{\n  \n}"],
        ),
        (Constraint.json_schema(True), ["[null, 1.5e3]", '"é\\n"'], ["nul", "{]"]),
        (Constraint.json_schema('{"const": [1, 2]}'), ["[1, 2]", "[1,2]"], ["[2, 1]"]),
        (Constraint.json_schema({"const": [1, 2]}, compact=True), ["[1,2]"], ["[1, 2]"]),
        (Constraint.lark('start: "(" start ")" | "x"'), ["x", "((x))"], ["((x)", "x)"]),
        (Constraint.json_schema(True), ["[" * 200 + "]" * 200], ["[" * 200 + "]" * 199]),
    ],
)
def test_a_constraint_accepts_its_texts_and_no_others(
    constraint: Constraint, matching: list[str], other: list[str]
) -> None:
    def accepts(text: str) -> bool:
        matcher = matcher_of(constraint)
        try:
            for byte in text.encode():  # however a text is cut into tokens, its bytes decide
                matcher._matcher.consume_token(byte_tokens[byte])
                matcher._check()
        except ValueError:
            return False
        return matcher.is_accepting

    byte_tokens = {
        int(piece[3:5], 16): token
        for token in range(model().tokenizer.vocab_size)
        if re.fullmatch("<0x..>", piece := model().tokenizer._tokenizer.id_to_token(token))
    }
    assert [text for text in matching if not accepts(text)] == []
    assert [text for text in other if accepts(text)] == []


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (Constraint.json_schema, '{"type":', "json_schema: got '{\"type\":', not JSON: Expecting"),
        (Constraint.json_schema, {"type": "objekt"}, "Invalid type: objekt"),
        (Constraint.json_schema, {"uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        (Constraint.json_schema, {"$ref": "#/$defs/x"}, "Pointer '/$defs/x' does not exist"),
        (Constraint.json_schema, False, "Unsatisfiable schema"),
        (Constraint.json_schema, [1], "accepted are an object, True and False"),
        (Constraint.json_schema, {"const": "\ud800"}, "json_schema: got {'const': '\\ud800'}"),
        (Constraint.regex, "a(b", "unclosed group"),
        (Constraint.regex, r"(?=a)b", "look-around"),
        (Constraint.regex, 3, "regex: got 3, accepted is a string"),
        (Constraint.choice, "ab", "choice: got 'ab', accepted is a sequence of strings"),
        (Constraint.choice, [], "choice: got [], accepted is a sequence of strings"),
        (Constraint.choice, ["\ud800"], "choice: got ['\\ud800'], refused"),
        (Constraint.lark, "rule: x", "no start rule"),
    ],
)
def test_a_bad_grammar_is_refused_where_it_is_written(make, given, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(given)


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    with pytest.raises(ValueError, match="constraint: "):
        matcher_of(Constraint.regex("a")).consume(model().tokenizer.bos_id)


def test_constraints_are_values() -> None:
    one, same = (Constraint.json_schema({"type": "object"}) for _ in range(2))
    assert Sampling(constraint=one) == Sampling(constraint=same)
    assert hash(Sampling(constraint=one)) == hash(Sampling(constraint=same))
    assert one != Constraint.json_schema({"type": "array"})


@pytest.mark.parametrize("vocab_size", [1, 32, 33, 4096])
def test_masks_have_a_bit_for_every_token(vocab_size: int) -> None:
    assert 32 * (mask_words(vocab_size) - 1) < vocab_size <= 32 * mask_words(vocab_size)


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
def test_json_of_any_seed_and_temperature_is_valid_under_its_schema(compact: bool) -> None:
    person = Constraint.json_schema(PERSON, compact=compact)
    settings = [
        Sampling(temperature=t, seed=seed, top_p=top_p, constraint=person)
        for seed, (t, top_p) in enumerate([(0, 1), (0.5, 1), (1, 0.9), (3, 1)])
    ]
    done = model().generate([PROMPT] * len(settings), settings, max_new_tokens=LIMIT)
    ended = [row for row in done if row.finish_reason == "stop"]
    # Up to 33 characters of whitespace at a place can take all tokens there are.
    assert len(ended) == len(done) if compact else ended
    assert all(is_person(row.text) for row in ended)
    assert len({row.text for row in done}) > 2


def test_a_regex_matches_the_whole_text_and_a_choice_is_one_of_its_list() -> None:
    pattern, choices = r"(ja|nein), [A-Zß]{2,5}[0-9]+(\.[0-9]{2})!", ["red", "green", "🙂 世界"]
    settings = [
        Sampling(temperature=2, seed=seed, constraint=constraint)
        for seed in range(2)
        for constraint in (Constraint.regex(pattern), Constraint.choice(choices))
    ]
    done = model().generate([PROMPT] * 4, settings, max_new_tokens=LIMIT)
    assert {row.finish_reason for row in done} == {"stop"}
    assert all(re.fullmatch(pattern, row.text) for row in done[::2])
    assert all(row.text in choices for row in done[1::2])


def test_where_only_the_end_is_allowed_a_row_ends_at_once() -> None:
    [done] = model().generate(
        PROMPT, Sampling(temperature=1, constraint=Constraint.regex("")), max_new_tokens=LIMIT
    )
    assert (done.text, done.finish_reason, len(done.tokens)) == ("", "stop", 1)
    assert done.tokens[0] in model().tokenizer.eos_ids


def test_the_token_limit_cuts_a_text_wherever_it_is_also_within_forced_tokens() -> None:
    person = Constraint.json_schema(PERSON, compact=True)
    [whole] = model().generate(PROMPT, Sampling(constraint=person), max_new_tokens=LIMIT)
    for limits in (range(1, 5), range(5, 9)):
        settings = [Sampling(constraint=person, max_new_tokens=limit) for limit in limits]
        cut = model().generate([PROMPT] * 4, settings, max_new_tokens=LIMIT)
        assert {row.finish_reason for row in cut} == {"length"}
        assert [row.tokens for row in cut] == [whole.tokens[:limit] for limit in limits]


def test_stop_strings_and_stop_ids_end_a_row_within_forced_tokens() -> None:
    text = "one two three four five"
    tokens = model().tokenizer.encode_plain(text)
    settings = [
        Sampling(constraint=Constraint.choice([text]), stop=(" four",)),
        Sampling(constraint=Constraint.choice([text]), stop_ids=(tokens[2],)),
        Sampling(constraint=Constraint.choice([text])),
    ]
    stopped, by_id, whole = model().generate([PROMPT] * 3, settings, max_new_tokens=LIMIT)
    assert {row.finish_reason for row in (stopped, by_id, whole)} == {"stop"}
    assert (stopped.text, whole.text) == ("one two three", text)
    assert by_id.tokens == tuple(tokens[: tokens.index(tokens[2]) + 1])


def test_a_bias_cannot_forbid_the_only_token_that_is_allowed() -> None:
    choice = Constraint.choice(["x"])
    forbidden = dict.fromkeys(model().tokenizer.encode_plain("x"), -math.inf)
    for temperature in (0.0, 1e-30, 1.0):
        sampling = Sampling(temperature=temperature, logit_bias=forbidden, constraint=choice)
        [done] = model().generate(PROMPT, sampling, max_new_tokens=LIMIT)
        assert (done.text, done.finish_reason) == ("x", "stop")


def test_rows_beside_constrained_ones_get_what_they_get_alone() -> None:
    person = Constraint.json_schema(PERSON)
    settings = [
        Sampling(temperature=0.9, seed=5),
        Sampling(temperature=0.9, seed=5, constraint=person),
        Sampling(repetition_penalty=1.2, frequency_penalty=0.1),
        Sampling(constraint=Constraint.choice(["a long text that is forced, twenty tokens of it or more"])),
    ]  # fmt: skip
    prompts = [PROMPT, "Call me", "It was a", "The people of the United States"]
    together = model().generate(prompts, settings, max_new_tokens=LIMIT)
    for row, prompt, sampling in zip(together, prompts, settings, strict=True):
        [alone] = model().generate(prompt, sampling, max_new_tokens=LIMIT)
        assert (row.tokens, row.text, row.finish_reason) == (
            alone.tokens, alone.text, alone.finish_reason
        )  # fmt: skip


def test_jumping_ahead_saves_steps_and_changes_no_token() -> None:
    """With penalties, which count forced tokens too, and a neighbour that the jumps must not touch."""
    person = Constraint.json_schema(PERSON, compact=True)
    sampling = Sampling(temperature=1, seed=2, constraint=person, frequency_penalty=0.5)
    settings = [sampling, Sampling(temperature=1, seed=1, max_new_tokens=12), sampling]
    prompts = [PROMPT, "It was", "Call me"]
    jumped, steps = run(prompts, settings)
    walked, all_steps = run(prompts, settings, jump_ahead=False)
    assert [row.tokens for row in jumped] == [row.tokens for row in walked]
    assert is_person(jumped[0].text)
    assert all_steps == max(len(row.tokens) for row in walked)
    assert steps < 0.7 * all_steps


def test_a_forced_text_of_any_length_takes_two_steps() -> None:
    text = "All of this is known before the model has said a word, so why should it be asked? " * 2
    [row], steps = run([PROMPT], [Sampling(constraint=Constraint.choice([text]))])
    assert row.text == text
    assert len(row.tokens) > 2 * stepwise._FORCED_CHUNK
    assert steps == 2  # the first token, and the end


def test_forcing_leaves_the_state_that_sampling_the_same_tokens_leaves() -> None:
    lm = model()
    tokens, lengths, params, room = lm._batch(
        lm._prompt_ids([PROMPT, "Call me"] * 2), [Sampling()] * 4, LIMIT
    )
    options = {"model": lm.model, "capacity": tokens.shape[1] + room}
    sampled = generation.start(lm.params, tokens, lengths, params, **options)
    taken = []
    for _ in range(3):
        sampled = generation.advance(lm.params, sampled, params, model=lm.model)
        taken.append(np.asarray(sampled.token))
    forced = generation.start(lm.params, tokens, lengths, params, **options)
    chunk = np.zeros((4, stepwise._FORCED_CHUNK), np.int32)
    chunk[:, :3] = np.stack(taken, axis=1)
    for lengths in ([3, 0, 0, 3], [0, 3, 3, 0]):
        lengths = np.array(lengths, np.int32)
        forced = generation.force(lm.params, forced, chunk, lengths, model=lm.model)
    # float32, and the largest activation is below 64: sums of 256 terms in another order differ by less than this.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=64 * 256 * 2.0**-24)
    jax.tree.map(close, forced.cache.layers, sampled.cache.layers)
    jax.tree.map(np.testing.assert_array_equal, forced.counts, sampled.counts)
    for name in ("token", "generated", "reason"):
        np.testing.assert_array_equal(getattr(forced, name), getattr(sampled, name))
    np.testing.assert_array_equal(forced.cache.lengths, sampled.cache.lengths)


def test_log_probabilities_are_those_of_the_unmodified_distribution() -> None:
    lm = model()
    sampling = Sampling(temperature=1, seed=4, constraint=Constraint.json_schema(PERSON))
    prompt = lm.tokenizer.encode(PROMPT)
    [done] = lm.generate([prompt], sampling, max_new_tokens=LIMIT, top_logprobs=2)
    [plain] = lm.generate([prompt], sampling, max_new_tokens=LIMIT)
    assert done.tokens == plain.tokens
    logits = lm.logits([*prompt, *done.tokens[:-1]])[0, len(prompt) - 1 :]
    expected = jax.nn.log_softmax(logits)[np.arange(len(done.tokens)), np.array(done.tokens)]
    assert done.logprobs is not None
    assert done.top_logprobs is not None
    # Below 2**5, in float32; a thousandth is far more than what the order of sums changes.
    np.testing.assert_allclose(done.logprobs, expected, atol=1e-3)
    # The most probable tokens of an old book are mostly not those of JSON.
    assert sum(t not in top for t, top in zip(done.tokens, done.top_logprobs, strict=True)) > 4


def test_another_constraint_compiles_nothing() -> None:
    settings = [Sampling(constraint=Constraint.choice(["a b c d e f g"])), *[Sampling()] * 2]
    prompts = [PROMPT, "Call me", "It was"]
    programs = (generation.choose, generation.force, generation.decode_step, generation.start)
    run(prompts, settings)
    compiled = [program._cache_size() for program in programs]
    run(
        prompts,
        [*settings[1:], Sampling(temperature=1, constraint=Constraint.regex("[a-z]{9} forced"))],
    )
    assert [program._cache_size() for program in programs] == compiled


def test_streams_and_chats_follow_constraints() -> None:
    lm = model()
    sampling = Sampling(constraint=Constraint.json_schema(PERSON))
    [done] = lm.generate(PROMPT, sampling, max_new_tokens=LIMIT)
    assert tuple(lm.stream(PROMPT, sampling, max_new_tokens=LIMIT)) == done.tokens
    messages = [{"role": "user", "content": "Who are you?"}]
    answer = lm.chat(messages, sampling, max_new_tokens=LIMIT)
    streamed = "".join(text for _, text in lm.stream_chat(messages, sampling, max_new_tokens=LIMIT))
    assert is_person(answer.text)
    assert streamed == answer.text
