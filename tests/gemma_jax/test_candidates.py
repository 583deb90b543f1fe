"""The largest numbers without sorting, and draws from them: the same tokens as from the whole vocabulary."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import sampler
from gemma_jax.candidates import largest
from gemma_jax.sampler import CANDIDATES, _gumbel, process_logits, sample
from gemma_jax.sampling import Sampling, SamplingParams, TokenCounts, stack_sampling

V = 2**15 + 1001  # large enough to have candidates, and no multiple of a group
SEEDS = 16


def no_counts(batch: int) -> TokenCounts:
    return TokenCounts.from_prompt(jnp.zeros((batch, 1), jnp.int32), jnp.zeros(batch, jnp.int32), V)


def random_logits(batch: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 3, (batch, V)), jnp.float32)


@jax.jit
def from_all(
    logits: jax.Array, params: SamplingParams, counts: TokenCounts, step: jax.Array
) -> jax.Array:
    """What `sample` is to return, by its definition."""
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(params.seed, step, jnp.arange(V))
    noise = jnp.where(params.temperature[:, None] > 0, noise, 0)
    return jnp.argmax(process_logits(logits, params, counts) + noise, axis=-1)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (5, 8), (16, 1), (17, 1), (300, 2), (V, 128)])
def test_the_largest_are_those_of_a_sort_with_their_ids(n: int, count: int) -> None:
    x = np.asarray(random_logits(2))[:, :n]
    values, ids = map(np.asarray, jax.jit(largest, static_argnums=1)(x, count))
    there = min(n, count)
    assert np.array_equal(values[:, :there], -np.sort(-x, axis=1)[:, :there])
    assert np.array_equal(np.take_along_axis(x, ids[:, :there], axis=1), values[:, :there])
    assert np.all(values[:, there:] == -np.inf)
    assert np.all(ids[:, there:] >= n)


def test_among_equals_and_infinities_no_id_comes_twice() -> None:
    x = np.full((1, V), -np.inf, np.float32)
    x[0, 7::500] = 1.0
    x[0, 30000] = 2.0
    values, ids = map(np.asarray, largest(jnp.asarray(x), 100))
    assert len(np.unique(ids)) == 100
    assert ids[0, 0] == 30000
    assert np.array_equal(x[0, ids[0]], values[0])
    assert np.array_equal(values, -np.sort(-x, axis=1)[:, :100])


def test_noise_of_a_token_does_not_depend_on_which_others_are_asked_for() -> None:
    every = _gumbel(jnp.uint32(3), jnp.int32(5), jnp.arange(1000))
    ids = jnp.asarray([999, 0, 17])
    assert np.array_equal(_gumbel(jnp.uint32(3), jnp.int32(5), ids), every[ids])


SETTINGS = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k, top_p, min_p in itertools.product((1, 64, CANDIDATES - 1), (0, 0.95, 1), (0, 0.2))
]


def test_tokens_are_those_of_the_whole_vocabulary() -> None:
    rows = [Sampling(temperature=(0.7, 3.0)[i % 2], seed=i, **s) for i, s in enumerate(SETTINGS)]
    params = stack_sampling(rows, max_new_tokens=8, vocab_size=V)
    logits, counts = random_logits(len(rows)), no_counts(len(rows))
    draw, seen = jax.jit(sample), set()
    for step in range(3):
        steps = jnp.full(len(rows), step)
        tokens = np.asarray(draw(logits, params, counts, steps))
        assert np.array_equal(tokens, from_all(logits, params, counts, steps))
        seen.update(zip(range(len(rows)), tokens.tolist(), strict=True))
    assert len(seen) > len(rows)  # not each row the same token at every step


def test_ties_with_the_last_one_kept_are_drawn_even_if_they_are_no_candidates() -> None:
    logits = jnp.asarray(np.where(np.arange(V) % 9, 0.0, 1.0)[None], jnp.float32)  # 3752 equals
    logits = jnp.tile(logits, (SEEDS, 1))
    rows = [Sampling(temperature=1.0, top_k=4, seed=seed) for seed in range(SEEDS)]
    params = stack_sampling(rows, max_new_tokens=8, vocab_size=V)
    steps = jnp.zeros(SEEDS, jnp.int32)
    tokens = np.asarray(jax.jit(sample)(logits, params, no_counts(SEEDS), steps))
    assert np.array_equal(tokens, from_all(logits, params, no_counts(SEEDS), steps))
    assert len(np.unique(tokens)) > SEEDS // 2


def test_penalties_and_bias_come_before_the_candidates() -> None:
    logits = random_logits(2)
    first = int(jnp.argmax(logits[0]))
    rows = [
        Sampling(temperature=1.0, top_k=2, logit_bias={first: -np.inf, 5: 60.0}),
        Sampling(temperature=1.0, top_k=1, presence_penalty=60.0),
    ]
    params = stack_sampling(rows, max_new_tokens=8, vocab_size=V)
    second = jnp.argmax(logits[1]).astype(jnp.int32)
    counts = no_counts(2).add(jnp.stack([second, second]), jnp.ones(2, bool))
    tokens = np.asarray(jax.jit(sample)(logits, params, counts, jnp.zeros(2, jnp.int32)))
    assert tokens[0] == 5
    assert tokens[1] == np.asarray(logits[1]).argsort()[-2]


@pytest.mark.parametrize(
    ("settings", "all_of_it"),
    [
        ([Sampling(temperature=1.0, top_k=64), Sampling()], False),
        ([Sampling(temperature=1.0, top_k=64), Sampling(temperature=1.0, top_k=CANDIDATES)], True),
    ],
)
def test_bisection_runs_only_if_a_row_keeps_more_than_there_are_candidates(
    monkeypatch: pytest.MonkeyPatch, settings: list[Sampling], all_of_it: bool
) -> None:
    runs: list[bool] = []
    keep_top_k = sampler._keep_top_k

    def recorded(x: jax.Array, top_k: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: runs.append(True))
        return keep_top_k(x, top_k)

    monkeypatch.setattr(sampler, "_keep_top_k", recorded)
    params = stack_sampling(settings, max_new_tokens=8, vocab_size=V)
    fresh = jax.jit(lambda *args: sample(*args))
    fresh(random_logits(2), params, no_counts(2), jnp.zeros(2, jnp.int32)).block_until_ready()
    jax.effects_barrier()
    assert bool(runs) == all_of_it
