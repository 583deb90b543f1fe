"""`LanguageModel` on the bundled checkpoints: equal to `transformers`, text in and text out, quality by format."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_jax
from gemma_jax import LanguageModel, Sampling
from gemma_jax.checkpoints import BUNDLED

bundled = pytest.mark.parametrize("name", BUNDLED)
HELD_OUT_TOKENS = 6144
WINDOW = 384


@functools.cache
def loaded(name: str, format: str | None = None) -> LanguageModel:
    return gemma_jax.load(name, format=format)


@bundled
def test_logits_equal_those_of_transformers(data: Path, name: str) -> None:
    """Computed by `tests/goldens/make_goldens.py --bundled` in float32 over a text of three windows."""
    golden = np.load(data / f"bundled_{name}.npz")
    lm = loaded(name)
    # The golden's multipliers are float32, as transformers has them when it runs a checkpoint in float32.
    model = lm.model.clone(config=lm.config.__class__(**{**vars(lm.config), "dtype": "float32"}))
    lm = LanguageModel(model, lm.params, lm.tokenizer)
    want = golden["logits"]
    have = np.asarray(lm.logits(golden["tokens"][None]))[0, -len(want) :]
    assert np.abs(have - want).max() <= 1e-4 * np.ptp(want)


@bundled
def test_greedy_text_equals_that_of_transformers(data: Path, name: str) -> None:
    golden = np.load(data / f"bundled_{name}.npz")
    [done] = loaded(name).generate([golden["prompt"].tolist()], max_new_tokens=32)
    assert list(done.tokens) == golden["greedy"].tolist()


def bits_lost(logits: jax.Array, reference: jax.Array, targets: np.ndarray) -> tuple[float, ...]:
    """Nats per token, KL divergence from the reference and top-1 agreement."""
    p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(q, targets[..., None], axis=-1).mean()
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean()
    agreement = jnp.mean(jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1))
    return float(loss), float(kl), float(agreement)


@pytest.mark.heavy
@bundled
def test_quantization_costs_little_on_held_out_text(data: Path, name: str) -> None:
    """Held-out perplexity, KL divergence and top-1 agreement of eQ8_0 and Q4K against bfloat16.

    eQ8_0 has 16 times the levels of Q4K, so its KL divergence, which is quadratic in the error, must be far smaller;
    the bounds are about three times what was measured when the models were trained, so a worse quantizer fails.
    """
    lm = loaded(name)
    text = (data / "held_out.txt").read_text(encoding="utf-8")
    ids = lm.tokenizer.encode(text, add_bos=False)[:HELD_OUT_TOKENS]
    rows = np.array(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)
    tokens = np.concatenate([np.full((len(rows), 1), lm.tokenizer.bos_id), rows[:, :-1]], axis=1)
    reference = lm.logits(tokens)
    loss, _, _ = bits_lost(reference, reference, rows)
    assert math.exp(loss) < 100  # a uniform guess would have perplexity 4096
    results = {}
    for format in ("eq8_0", "q4k"):
        results[format] = bits_lost(loaded(name, format).logits(tokens), reference, rows)
        print(f"{name} bf16 {loss:.4f} {format}: loss, KL, top-1 = {results[format]}")
    loss8, kl8, top8 = results["eq8_0"]
    loss4, kl4, top4 = results["q4k"]
    assert abs(loss8 - loss) < 0.002
    assert 0 < kl8 < 0.001
    assert top8 > 0.98
    assert -0.01 < loss4 - loss < 0.03
    assert kl8 < kl4 < 0.02
    assert top8 > top4 > 0.93


@bundled
def test_a_batch_gives_each_prompt_what_it_gets_alone(name: str) -> None:
    lm = loaded(name, "q4k")
    prompts = ["The captain looked at the sea", "We the people", "And he said unto them,"]
    sampling = [Sampling(temperature=0.8, seed=s) for s in (1, 2, 3)]
    together = lm.generate(prompts, sampling, max_new_tokens=12)
    for prompt, row, done in zip(prompts, sampling, together, strict=True):
        assert lm.generate(prompt, row, max_new_tokens=12) == [done]
        assert done.prompt_tokens == len(lm.tokenizer.encode(prompt))
        assert done.text == lm.tokenizer.decode(done.tokens)


def test_stream_yields_the_tokens_of_generate() -> None:
    lm = loaded("tiny-dense", "q4k")
    sampling = Sampling(temperature=1.0, seed=5)
    [done] = lm.generate("The captain", sampling, max_new_tokens=12)
    assert tuple(lm.stream("The captain", sampling, max_new_tokens=12)) == done.tokens


def test_a_stop_string_ends_a_row_and_is_left_out() -> None:
    lm = loaded("tiny-dense", "q4k")
    free, other = lm.generate(["The captain", "We the people"], max_new_tokens=12)
    stop = free.text[6:9]
    end = free.text.index(stop)
    rows = [Sampling(stop=(stop,)), Sampling()]
    stopped, same = lm.generate(["The captain", "We the people"], rows, max_new_tokens=12)
    assert stopped.text == free.text[:end]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert stop in lm.tokenizer.decode(stopped.tokens)
    assert same == other


def test_logprobs_come_with_stop_strings_and_without() -> None:
    lm = loaded("tiny-dense", "q4k")
    [plain] = lm.generate("The captain", max_new_tokens=6, top_logprobs=2)
    never = Sampling(stop=("\x00",))
    [read_along] = lm.generate("The captain", never, max_new_tokens=6, top_logprobs=2)
    assert plain.tokens == read_along.tokens
    np.testing.assert_allclose(plain.logprobs, read_along.logprobs, atol=1e-4)
    for token, logprob, top in zip(plain.tokens, plain.logprobs, plain.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())  # greedy


def test_chat_streams_what_it_answers() -> None:
    lm = loaded("tiny-dense", "q4k")
    messages = [{"role": "user", "content": "Continue: The whale"}]
    done = lm.chat(messages, max_new_tokens=12)
    assert done.text
    pieces = list(lm.stream_chat(messages, max_new_tokens=12))
    assert "".join(text for kind, text in pieces if kind == "answer") == done.text


def test_logits_of_several_chunks_equal_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = loaded("tiny-dense")
    tokens = np.random.default_rng(0).integers(300, 4096, (2, 200))
    want = lm.logits(tokens)
    monkeypatch.setattr("gemma_jax.lm._LOGITS_CHUNK", 64)
    have = lm.logits(tokens)
    assert have.shape == (2, 200, 4096)
    assert have.dtype == jnp.float32
    assert jnp.abs(have - want).max() <= 1e-4 * np.ptp(want)


def test_no_prompts_give_no_completions() -> None:
    assert loaded("tiny-dense", "q4k").generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 has no tokens"),
        (["fine", [5, 4096]], {}, "prompt 1 has token id 4096"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[5] * 200_000], {}, "prompt 0 has 200000 tokens"),
        (["a", "b"], {"sampling": [Sampling()]}, "1 entries for 2 prompts"),
    ],
)
def test_bad_requests_are_named(prompts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded("tiny-dense", "q4k").generate(prompts, **options)


@pytest.mark.parametrize("tokens", [[], [[1.5]], [[4096]], [[-1]]])
def test_bad_tokens_are_refused(tokens: list) -> None:
    with pytest.raises(ValueError, match="token"):
        loaded("tiny-dense").logits(tokens)


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gemma_jax.load("nowhere")
