"""Generation: the loop on the device does what a loop of plain calls would, row by row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoint import FAMILIES, write_checkpoint

import gemma_jax
from convert.load import load_checkpoint
from gemma_jax import Sampling, init_cache, stack_sampling
from gemma_jax.checkpoints import resolve
from gemma_jax.config import Gemma4Config
from gemma_jax.generation import FinishReason, advance, decode_step, generate, prefill, start
from gemma_jax.model import Gemma4, Params
from gemma_jax.sampling import SamplingParams

LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
HF_CONFIG = {**FAMILIES["moe"], **LAYERS}
CONFIG = Gemma4Config.from_hf(HF_CONFIG)
MODEL = Gemma4(CONFIG)
NEW = 12
LENGTHS = np.array([9, 3, 20, 1], np.int32)
TOKENS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (4, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    folder = tmp_path_factory.mktemp("generation") / "checkpoint"
    params = load_checkpoint(write_checkpoint(folder, HF_CONFIG))[1]
    # With tied embeddings a random model repeats its last token; louder layers make it move on.
    for layer in ("layers_0", "layers_1"):
        params[layer]["post_ffn_norm"] *= 8
    return params


def settings(*rows: Sampling) -> SamplingParams:
    return stack_sampling(rows, max_new_tokens=NEW, vocab_size=CONFIG.vocab_size)


def run(params: Params, sampling: SamplingParams, rows: Any = slice(None), **options: Any) -> Any:
    options = {"model": MODEL, "max_new_tokens": NEW, **options}
    return jax.device_get(generate(params, TOKENS[rows], LENGTHS[rows], sampling, **options))


VARIED = (
    Sampling(ignore_eos=True),
    Sampling(temperature=1.0, seed=7, ignore_eos=True),
    Sampling(temperature=0.7, top_k=20, seed=8, repetition_penalty=1.3, ignore_eos=True),
    Sampling(temperature=1.5, top_p=0.9, min_p=0.01, seed=9, presence_penalty=0.5, ignore_eos=True),
)


@functools.partial(jax.jit, static_argnames="model")
def full_logits(params: Params, tokens: jax.Array, *, model: Gemma4) -> jax.Array:
    positions = jnp.arange(tokens.shape[1])[None]
    cache = init_cache(model.config, 1, 64, jnp.float32)
    return model.apply({"params": params}, tokens, positions, cache)[0]


def test_greedy_equals_a_plain_loop_over_the_whole_sequence(params: Params) -> None:
    have = run(params, settings(*[Sampling(ignore_eos=True)] * 4))
    for row, length in enumerate(LENGTHS):
        sequence = TOKENS[row, :length].tolist()
        for _ in range(NEW):
            padded = np.zeros((1, 40), np.int32)  # what follows a position does not change it
            padded[0, : len(sequence)] = sequence
            logits = full_logits(params, padded, model=MODEL)
            sequence.append(int(jnp.argmax(logits[0, len(sequence) - 1])))
        assert have.tokens[row].tolist() == sequence[length:]
    assert len(set(have.tokens.ravel().tolist())) > 10  # a text worth comparing
    assert (have.lengths == NEW).all()
    assert (have.finish_reasons == FinishReason.LENGTH).all()


def test_generate_works_inside_the_callers_jit(params: Params) -> None:
    sampling = settings(*VARIED)

    @jax.jit
    def total(params: Params) -> jax.Array:
        out = generate(params, TOKENS, LENGTHS, sampling, model=MODEL, max_new_tokens=NEW)
        return jnp.sum(out.tokens, axis=1)

    np.testing.assert_array_equal(total(params), run(params, sampling).tokens.sum(axis=1))


def test_a_row_depends_on_its_own_seed_and_not_on_place_or_neighbours(params: Params) -> None:
    together = run(params, settings(*VARIED)).tokens
    order = [2, 0, 3, 1]
    shuffled = run(params, settings(*(VARIED[i] for i in order)), order).tokens
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(4):
        alone = run(params, settings(VARIED[row]), slice(row, row + 1)).tokens
        np.testing.assert_array_equal(alone[0], together[row])


def test_another_seed_gives_another_text(params: Params) -> None:
    rows = [Sampling(temperature=1.0, seed=s, ignore_eos=True) for s in (1, 2, 1)]
    tokens = np.repeat(TOKENS[:1], 3, axis=0)
    lengths = np.repeat(LENGTHS[:1], 3)
    out = generate(params, tokens, lengths, settings(*rows), model=MODEL, max_new_tokens=NEW)
    a, b, c = out.tokens.tolist()
    assert a == c
    assert a != b


def test_rows_with_different_settings_share_one_program(params: Params) -> None:
    run(params, settings(*VARIED))
    before = generate._cache_size()
    run(params, settings(*[Sampling(temperature=0.1, frequency_penalty=1.0, seed=3)] * 4))
    assert generate._cache_size() == before


def test_eos_ends_a_row_unless_ignored(params: Params) -> None:
    free = run(params, settings(*[Sampling(ignore_eos=True)] * 4)).tokens
    eos = int(free[0, 3])
    first = free[0].tolist().index(eos)
    model = Gemma4(dataclasses.replace(CONFIG, eos_ids=(eos,)))
    out = run(params, settings(Sampling(), *VARIED[1:]), model=model)
    assert out.lengths[0] == first + 1
    assert out.tokens[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (out.tokens[0, first + 1 :] == CONFIG.pad_id).all()
    assert out.finish_reasons.tolist()[:1] == [FinishReason.STOP]
    assert out.lengths[1:].tolist() == [NEW] * 3


def test_stop_ids_and_token_limits_are_per_row(params: Params) -> None:
    free = run(params, settings(*[Sampling(ignore_eos=True)] * 4)).tokens
    stop = int(free[1, 5])
    rows = (
        Sampling(ignore_eos=True, max_new_tokens=1),
        Sampling(ignore_eos=True, stop_ids=(stop,)),
        Sampling(ignore_eos=True, max_new_tokens=7),
        Sampling(ignore_eos=True),
    )
    out = run(params, settings(*rows))
    assert out.lengths.tolist() == [1, free[1].tolist().index(stop) + 1, 7, NEW]
    length, end = FinishReason.LENGTH, FinishReason.STOP
    assert out.finish_reasons.tolist() == [length, end, length, length]
    for row, count in enumerate(out.lengths):
        np.testing.assert_array_equal(out.tokens[row, :count], free[row, :count])
        assert (out.tokens[row, count:] == CONFIG.pad_id).all()


def test_logprobs_are_those_of_the_unmodified_distribution(params: Params) -> None:
    biased = Sampling(temperature=0.5, logit_bias={5: 100.0}, ignore_eos=True)
    out = run(params, settings(*[biased] * 4), top_logprobs=3)
    assert (out.tokens == 5).all()
    sequence = np.full((1, 40), 5, np.int32)
    sequence[0, :9] = TOKENS[0, :9]
    want = jax.nn.log_softmax(full_logits(params, sequence, model=MODEL)[0, 8 : 8 + NEW])
    np.testing.assert_allclose(out.logprobs[0], want[:, 5], atol=1e-3)
    values, ids = jax.lax.top_k(want, 3)
    np.testing.assert_array_equal(out.top_tokens[0], ids)
    np.testing.assert_allclose(out.top_logprobs[0], values, atol=1e-3)


def test_step_by_step_equals_the_loop(params: Params) -> None:
    sampling = settings(*VARIED)
    want = run(params, sampling).tokens
    state = start(params, TOKENS, LENGTHS, sampling, model=MODEL, capacity=20 + NEW)
    for column in range(NEW):
        np.testing.assert_array_equal(state.token, want[:, column])
        if column < NEW - 1:
            state = advance(params, state, sampling, model=MODEL)
    assert (state.reason == FinishReason.LENGTH).all()


def test_prefill_and_decode_step_are_enough_to_write_a_loop(params: Params) -> None:
    """The documented pure functions, as someone would use them from their own JAX code."""
    cache = init_cache(CONFIG, 4, 20 + NEW, jnp.float32)
    logits, cache = prefill(params, TOKENS, LENGTHS, cache, model=MODEL)
    tokens = []
    for _ in range(NEW):
        tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache = decode_step(params, tokens[-1], jnp.ones(4, bool), cache, model=MODEL)
    want = run(params, settings(*[Sampling(ignore_eos=True)] * 4)).tokens
    np.testing.assert_array_equal(jnp.stack(tokens, axis=1), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"capacity": 31}, "capacity is 31"),
        ({"max_new_tokens": 5000}, "capacity is 5020"),
    ],
)
def test_impossible_sizes_are_named(params: Params, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(params, settings(*VARIED), **options)


def test_fifty_prompt_lengths_need_at_most_four_programs(params: Params) -> None:
    tokenizer = gemma_jax.Tokenizer.from_folder(resolve("tiny-dense"))
    lm = gemma_jax.LanguageModel(MODEL, params, tokenizer)
    before = generate._cache_size()
    lengths = np.linspace(1, 1000, 50).astype(int)
    rng = np.random.default_rng(0)
    for length in lengths:
        prompt = rng.integers(3, CONFIG.vocab_size, length).tolist()
        [done] = lm.generate([prompt], Sampling(ignore_eos=True), max_new_tokens=2)
        assert (done.prompt_tokens, len(done.tokens)) == (length, 2)
    assert len(set(lengths.tolist())) == 50
    assert generate._cache_size() - before <= 4
