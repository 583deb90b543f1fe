"""Penalties, filters and draws of the sampler, against sorting in numpy and exact probabilities."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from gemma_jax.sampler import _gumbel, is_plain, log_probabilities, process_logits, sample
from gemma_jax.sampling import Sampling, SamplingParams, TokenCounts, stack_sampling

V = 19
DRAWS = 8192
# Seeds are fixed, so a test passes always or never; the level is what a right sampler would fail
# with, were the seeds changed: one in a million per test.
LEVEL = 1e-6

process = jax.jit(process_logits)
draw = jax.jit(sample)


def params_of(*rows: Sampling, vocab_size: int = V, limit: int = 64) -> SamplingParams:
    return stack_sampling(rows, max_new_tokens=limit, vocab_size=vocab_size)


def no_counts(batch: int, vocab_size: int = V) -> TokenCounts:
    empty = jnp.zeros((batch, 1), jnp.int32)
    return TokenCounts.from_prompt(empty, jnp.zeros(batch, jnp.int32), vocab_size)


def random_logits(seed: int, batch: int, vocab_size: int = V, spread: float = 3.0) -> np.ndarray:
    draws = np.random.default_rng(seed).normal(size=(batch, vocab_size))
    return (spread * draws).astype(np.float32)


def filtered(logits: np.ndarray, settings: Sampling) -> np.ndarray:
    """One row in float64 with a sort: what temperature, top_k, top_p and min_p must leave."""
    x = logits.astype(np.float64) / settings.temperature
    if settings.top_k:
        x[x < np.sort(x)[-min(settings.top_k, len(x))]] = -np.inf
    if settings.top_p < 1:
        p = special.softmax(x)
        order = np.argsort(-p, kind="stable")
        mass_above = np.cumsum(p[order]) - p[order]
        last = order[mass_above < max(settings.top_p, 1e-300)][-1]
        x[p < p[last]] = -np.inf
    x[special.softmax(x) < settings.min_p * special.softmax(x).max()] = -np.inf
    return x


# --- counts and penalties -----------------------------------------------------------------------


def test_counts_ignore_padding_and_finished_rows() -> None:
    tokens = jnp.array([[1, 2, 2, 0], [3, 0, 0, 0]])
    counts = TokenCounts.from_prompt(tokens, jnp.array([3, 1]), 5)
    np.testing.assert_array_equal(counts.prompt, [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])
    for step_tokens, active in (([2, 4], [True, True]), ([2, 4], [True, False])):
        counts = counts.add(jnp.array(step_tokens), jnp.array(active))
    np.testing.assert_array_equal(counts.output, [[0, 0, 2, 0, 0], [0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(counts.prompt, [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])


def test_a_row_is_plain_only_if_nothing_changes_its_logits() -> None:
    changed = [
        Sampling(temperature=0.1),
        Sampling(repetition_penalty=1.1),
        Sampling(presence_penalty=-0.5),
        Sampling(frequency_penalty=0.5),
        Sampling(logit_bias={3: -1.0}),
    ]
    plain = [Sampling(), Sampling(top_k=4, top_p=0.5, seed=7, stop_ids=(5,), ignore_eos=True)]
    assert is_plain(params_of(*plain, *changed)).tolist() == [True] * 2 + [False] * 5


def test_penalties_and_bias_follow_their_equations() -> None:
    rows = [
        Sampling(repetition_penalty=1.7),
        Sampling(presence_penalty=0.9),
        Sampling(frequency_penalty=-0.4),
        Sampling(logit_bias={0: 5.0, 3: -2.5, 7: -math.inf}),
        Sampling(
            repetition_penalty=0.6, presence_penalty=-1.1, frequency_penalty=0.3, logit_bias={2: 1}
        ),
    ]
    random = np.random.default_rng(1)
    logits = random_logits(2, len(rows))
    prompt = random.random((len(rows), V)) < 0.4
    output = random.integers(0, 4, (len(rows), V)).astype(np.int32)
    got = process(
        logits, params_of(*rows), TokenCounts(prompt=jnp.array(prompt), output=jnp.array(output))
    )
    for b, row in enumerate(rows):
        expected = logits[b].astype(np.float64)
        for v in range(V):
            if prompt[b, v] or output[b, v]:
                factor = row.repetition_penalty
                expected[v] = expected[v] / factor if expected[v] > 0 else expected[v] * factor
            expected[v] -= row.presence_penalty * (output[b, v] > 0)
            expected[v] -= row.frequency_penalty * output[b, v]
            expected[v] += row.logit_bias.get(v, 0.0)
        # Six roundings of numbers below 2 * 16, each by at most half a unit in the last place.
        np.testing.assert_allclose(got[b], expected - expected.max(), rtol=0, atol=6 * 32 * 2**-24)


# --- filters ------------------------------------------------------------------------------------

FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=1),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_k=10_000),
    Sampling(temperature=1.5, top_p=0.6),
    Sampling(temperature=1.0, top_p=0.0),
    Sampling(temperature=2.0, top_p=0.999),
    Sampling(temperature=1.5, min_p=0.07),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.6, top_k=9, top_p=0.8, min_p=0.06),
]


@pytest.mark.parametrize("vocab_size", [1, 2, V, 4096])
def test_filters_keep_exactly_what_sorting_keeps(vocab_size: int) -> None:
    logits = random_logits(3, len(FILTERS), vocab_size)
    params = params_of(*FILTERS, vocab_size=vocab_size)
    got = np.asarray(process(logits, params, no_counts(len(FILTERS), vocab_size)))
    for b, settings in enumerate(FILTERS):
        expected = filtered(logits[b], settings)
        np.testing.assert_array_equal(np.isfinite(got[b]), np.isfinite(expected), str(settings))
        kept = np.isfinite(expected)
        # Two roundings (the difference to the maximum, the division) of numbers below 64.
        expected = (expected - expected.max())[kept]
        np.testing.assert_allclose(got[b][kept], expected, rtol=0, atol=2 * 64 * 2**-24)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 6, 7, 8])
def test_top_k_threshold_is_exact_among_ties_zeros_infinities_and_neighbours(top_k: int) -> None:
    one = np.float32(1.0)
    # With 0 as the maximum, subtracting it changes no value: these bits reach the bisection.
    above, below = -np.nextafter(one, 0 * one), -np.nextafter(one, 2 * one)
    values = np.array([-one, -0.0, 0.0, below, above, -3e38, -np.inf, -one], np.float32)
    params = params_of(Sampling(temperature=1.0, top_k=top_k), vocab_size=len(values))
    got = process(values[None], params, no_counts(1, len(values)))[0]
    kept = values >= np.sort(values)[-top_k]
    np.testing.assert_array_equal(got, np.where(kept, values, -np.inf))


def test_top_p_keeps_all_tokens_that_tie_at_the_threshold() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.125, 0.125, 0.125, 0.125]]))
    params = params_of(Sampling(temperature=1.0, top_p=0.6), vocab_size=5)
    assert np.isfinite(process(logits, params, no_counts(1, 5))).all()
    # Just within the first token's mass, nothing else is needed.
    params = params_of(Sampling(temperature=1.0, top_p=0.499), vocab_size=5)
    np.testing.assert_array_equal(
        np.isfinite(process(logits, params, no_counts(1, 5)))[0], [True] + [False] * 4
    )


def test_top_p_over_a_whole_vocabulary_counts_a_flat_tail_right() -> None:
    size = 262144
    logits = np.zeros((1, size), np.float32)
    logits[0, : size // 4] = 1.0
    head = math.e * (size // 4) / (math.e * (size // 4) + size * 3 // 4)
    # Float32 additions of 2**18 terms in the worst order lose 2**18 * 2**-24 of the sum = 1.6 %.
    for top_p, kept in ((head * 0.98, size // 4), (head * 1.02, size)):
        params = params_of(Sampling(temperature=1.0, top_p=top_p), vocab_size=size)
        got = process(logits, params, no_counts(1, size))
        assert np.isfinite(got).sum() == kept


@pytest.mark.parametrize("temperature", [1e-44, 1e-38, 1e-6, 1e6, 3e38])
def test_extreme_temperatures_leave_no_nan(temperature: float) -> None:
    settings = Sampling(temperature=temperature, top_k=7, top_p=0.9)
    logits = random_logits(4, 1)
    params = params_of(settings)
    got = np.asarray(process(logits, params, no_counts(1)))
    assert not np.isnan(got).any()
    assert got.max() == 0
    if temperature < 1e-5:
        assert draw(logits, params, no_counts(1), jnp.zeros(1, jnp.int32)) == logits.argmax()


# --- draws --------------------------------------------------------------------------------------


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """P-value of the draws under the probabilities; 0 if a removed token was drawn.

    Tokens expected fewer than 5 times are pooled: below that the statistic is not chi-square.
    """
    observed = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    expected = probabilities * len(tokens)
    if observed[probabilities == 0].any():
        return 0.0
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue if keep.sum() > 1 else 1.0


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("varied", ["seed", "step"])
def test_draws_follow_the_exact_probabilities(settings: Sampling, varied: str) -> None:
    logits = random_logits(5, 1, spread=1.5)
    params = params_of(settings)
    params = jax.tree.map(lambda a: jnp.broadcast_to(a, (DRAWS, *a.shape[1:])), params)
    numbers = jnp.arange(DRAWS)
    if varied == "seed":
        params = params.replace(seed=numbers.astype(jnp.uint32))
    step = jnp.full(DRAWS, 3, jnp.int32) if varied == "seed" else numbers.astype(jnp.int32)
    tokens = draw(jnp.broadcast_to(logits, (DRAWS, V)), params, no_counts(DRAWS), step)
    probabilities = special.softmax(filtered(logits[0], settings))
    assert chi_square(np.asarray(tokens), probabilities) > LEVEL
    # The test has teeth: half as much temperature again, or no filter, would not pass.
    if len(np.flatnonzero(probabilities)) > 1:
        warmer = np.where(probabilities > 0, logits[0] / (1.5 * settings.temperature), -np.inf)
        assert chi_square(np.asarray(tokens), special.softmax(warmer.astype(np.float64))) < LEVEL
    unfiltered = special.softmax(logits[0].astype(np.float64) / settings.temperature)
    if unfiltered[probabilities == 0].sum() > 0.01:
        assert chi_square(np.asarray(tokens), unfiltered) < LEVEL


def test_consecutive_draws_of_one_seed_are_independent() -> None:
    logits = jnp.zeros((DRAWS, 4))
    params = params_of(Sampling(temperature=1.0, seed=11), vocab_size=4)
    params = jax.tree.map(lambda a: jnp.broadcast_to(a, (DRAWS, *a.shape[1:])), params)
    tokens = np.asarray(draw(logits, params, no_counts(DRAWS, 4), jnp.arange(DRAWS)))
    pairs = tokens[0::2] * 4 + tokens[1::2]
    assert chi_square(pairs, np.full(16, 1 / 16)) > LEVEL


def test_noise_is_continuous_in_the_tail_that_decides_improbable_tokens() -> None:
    # A token of probability p wins with noise above about -log p. Noise made of 24 random bits
    # has some 2**24 e**-10 = 760 values above 10: of 190 draws there, 24 pairs would coincide.
    # Float32 itself has 3 million values in the same range.
    noise = np.asarray(jax.jit(_gumbel)(jnp.uint32(1), jnp.int32(0), jnp.arange(2**22)))
    tail = noise[noise > 10]
    assert len(np.unique(tail)) >= len(tail) - 1
    expected = -np.expm1(-np.exp(-10.0))
    assert stats.binomtest(len(tail), len(noise), expected).pvalue > LEVEL
    assert stats.kstest(noise[: 2**18], "gumbel_r").pvalue > LEVEL


def test_greedy_rows_take_the_arg_max_after_penalties_whatever_the_filters() -> None:
    logits = random_logits(6, 3)
    best = logits.argmax(axis=-1)
    rows = [
        Sampling(),
        Sampling(top_k=3, top_p=0.1, min_p=0.9, seed=5),
        Sampling(logit_bias={int(best[2]): -math.inf}),
    ]
    expected = best.copy()
    expected[2] = np.argsort(logits[2])[-2]
    for extra in ([], [Sampling(temperature=5.0, top_k=3)]):  # alone, and beside a random row
        batch = np.concatenate([logits, random_logits(7, len(extra))])
        counts = no_counts(len(batch))
        tokens = draw(batch, params_of(*rows, *extra), counts, jnp.zeros(len(batch), jnp.int32))
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens[:3], expected)


def test_a_row_depends_neither_on_its_neighbours_nor_on_its_place() -> None:
    batch, size = 12, 517
    random = np.random.default_rng(8)
    logits = random_logits(9, batch, size, spread=1.0)
    rows = [
        dataclasses.replace(
            FILTERS[b % len(FILTERS)], temperature=2.0, seed=b // 2, repetition_penalty=1.1
        )
        for b in range(batch)
    ]
    prompt = jnp.array(random.integers(0, size, (batch, 20)))
    counts = TokenCounts.from_prompt(prompt, jnp.full(batch, 20), size)
    step = jnp.array(random.integers(0, 50, batch), jnp.int32)
    together = np.asarray(draw(logits, params_of(*rows, vocab_size=size), counts, step))
    order = random.permutation(batch)
    moved = draw(
        logits[order],
        params_of(*[rows[b] for b in order], vocab_size=size),
        jax.tree.map(lambda a: a[order], counts),
        step[order],
    )
    np.testing.assert_array_equal(moved, together[order])
    for b in range(batch):
        alone = draw(
            logits[b : b + 1],
            params_of(rows[b], vocab_size=size),
            jax.tree.map(lambda a, b=b: a[b : b + 1], counts),
            step[b : b + 1],
        )
        assert alone[0] == together[b]


def test_the_same_seed_repeats_and_another_seed_or_step_differs() -> None:
    logits = jnp.zeros((1, 4096))
    counts = no_counts(1, 4096)

    def tokens(seed: int, first_step: int) -> list[int]:
        params = params_of(Sampling(temperature=1.0, seed=seed), vocab_size=4096)
        steps = range(first_step, first_step + 8)
        return [int(draw(logits, params, counts, jnp.array([step]))[0]) for step in steps]

    first = tokens(1, 0)
    assert tokens(1, 0) == first
    assert len(set(first)) > 1
    assert tokens(2, 0) != first
    assert tokens(1, 8) != first


def test_the_default_generator_of_the_caller_does_not_matter() -> None:
    logits = jnp.zeros((2, V))
    params = params_of(*[Sampling(temperature=1.0, seed=seed) for seed in (3, 4)])
    arguments = (logits, params, no_counts(2), jnp.array([5, 6], jnp.int32))
    expected = draw(*arguments)
    # A function of its own: `sample` itself would be found in the cache of traces.
    fresh = jax.jit(lambda *arguments: sample(*arguments))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(fresh(*arguments), expected)


# --- programs -----------------------------------------------------------------------------------


def test_rows_with_different_settings_share_one_program() -> None:
    traces = 0

    @jax.jit
    def counted(
        logits: jax.Array, params: SamplingParams, counts: TokenCounts, step: jax.Array
    ) -> jax.Array:
        nonlocal traces
        traces += 1
        return sample(logits, params, counts, step)

    rows = [
        *FILTERS,
        Sampling(),
        Sampling(presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=2.0),
        Sampling(temperature=1.0, logit_bias={1: 4.0}, stop_ids=(1,), ignore_eos=True),
        Sampling(seed=9, max_new_tokens=3, stop=("x",)),
    ]
    for first in rows:
        for second in (rows[0], rows[-1]):
            counted(random_logits(10, 2), params_of(first, second), no_counts(2), jnp.array([0, 1]))
    assert traces == 1
    counted(random_logits(10, 3), params_of(*rows[:3]), no_counts(3), jnp.arange(3))
    assert traces == 2  # the counter does see a new program


SORTING = re.compile(r'hlo\.(sort|top_k)\b|@TopK|"TopK"|[= ](sort|topk)\(')


def test_no_program_sorts_the_vocabulary() -> None:
    arguments = (
        jnp.zeros((2, 4096)),
        params_of(FILTERS[-1], FILTERS[-1], vocab_size=4096),
        no_counts(2, 4096),
        jnp.arange(2),
    )
    sampling = draw.lower(*arguments)
    reporting = jax.jit(log_probabilities, static_argnums=2).lower(
        arguments[0], jnp.zeros(2, jnp.int32), 5
    )
    for lowered in (sampling, reporting):
        assert not SORTING.search(lowered.as_text())
        assert not SORTING.search(lowered.compile().as_text())
    for function in (jnp.sort, lambda x: jax.lax.top_k(x, 5)):  # the search does find them
        lowered = jax.jit(function).lower(arguments[0])
        assert SORTING.search(lowered.as_text())
        assert SORTING.search(lowered.compile().as_text())


def test_filters_run_only_where_a_row_asks() -> None:
    arguments = (jnp.zeros((2, V)), params_of(FILTERS[-1], FILTERS[-1]), no_counts(2))
    equations = jax.make_jaxpr(process_logits)(*arguments).eqns
    loops = {"scan", "while"}
    assert not loops & {equation.primitive.name for equation in equations}
    conditionals = [e.params["branches"] for e in equations if e.primitive.name == "cond"]
    assert len(conditionals) == 2
    for unused, used in conditionals:
        assert not unused.eqns
        assert loops & {equation.primitive.name for equation in used.eqns}


def test_sampling_runs_inside_a_device_loop() -> None:
    settings = Sampling(temperature=1.0, top_p=0.9, frequency_penalty=0.5, seed=4)
    logits = jnp.asarray(random_logits(11, 1))
    params, steps = params_of(settings), 9

    def advance(step: jax.Array, counts: TokenCounts) -> TokenCounts:
        token = sample(logits, params, counts, jnp.full(1, step, jnp.int32))
        return counts.add(token, jnp.ones(1, bool))

    looped = jax.jit(lambda counts: jax.lax.fori_loop(0, steps, advance, counts))(no_counts(1))
    counts = no_counts(1)
    for step in range(steps):
        counts = counts.add(
            draw(logits, params, counts, jnp.full(1, step, jnp.int32)), jnp.ones(1, bool)
        )
    np.testing.assert_array_equal(looped.output, counts.output)
    assert int(looped.output.sum()) == steps


# --- log-probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("top_n", [0, 1, 5, V])
def test_log_probabilities_are_those_of_the_untouched_logits(top_n: int) -> None:
    logits = random_logits(12, 3)
    logits[2, 4:8] = logits[2].max() + 1  # ties: the lower id comes first
    tokens = jnp.array([0, 7, 18], jnp.int32)
    chosen, ids, values = jax.jit(log_probabilities, static_argnums=2)(logits, tokens, top_n)
    expected = special.log_softmax(logits.astype(np.float64), axis=-1)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_n]
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, order)
    # Four roundings (shift, sum of 19 terms in its logarithm, difference) of numbers below 32.
    bound = 4 * 32 * 2**-24
    np.testing.assert_allclose(chosen, expected[np.arange(3), tokens], rtol=0, atol=bound)
    np.testing.assert_allclose(
        values, np.take_along_axis(expected, order, axis=-1), rtol=0, atol=bound
    )


@pytest.mark.parametrize("top_n", [-1, V + 1])
def test_log_probabilities_refuse_more_tokens_than_there_are(top_n: int) -> None:
    with pytest.raises(ValueError, match=rf"top_n: got {top_n}, accepted are .* 0 to {V}"):
        log_probabilities(jnp.zeros((1, V)), jnp.zeros(1, jnp.int32), top_n)


# --- masks --------------------------------------------------------------------------------------


def mask_of(allowed: np.ndarray) -> jax.Array:
    """uint32 [B, ceil(V / 32)] of bool [B, V]: bit v % 32 of word v // 32."""
    words = np.zeros((len(allowed), -(-allowed.shape[1] // 32)), np.uint32)
    for row, token in np.argwhere(allowed):
        words[row, token // 32] |= np.uint32(1 << (token % 32))
    return jnp.asarray(words)


@pytest.mark.parametrize("vocab_size", [19, 32, 70])
def test_a_mask_leaves_what_the_settings_would_make_of_the_allowed_tokens_alone(vocab_size):
    settings = Sampling(temperature=0.7, top_k=6, top_p=0.8)
    logits = random_logits(3, 4, vocab_size)
    allowed = np.random.default_rng(4).random((4, vocab_size)) < 0.4
    params = params_of(*[settings] * 4, vocab_size=vocab_size)
    counts = no_counts(4, vocab_size)
    got = process(logits, params, counts, mask_of(allowed))
    forbidden = np.where(allowed, logits, -np.inf).astype(np.float32)
    for row, expected in zip(np.asarray(got), forbidden, strict=True):
        assert set(np.flatnonzero(row > -np.inf)) == set(
            np.flatnonzero(filtered(expected, settings) > -np.inf)
        )


def test_a_mask_of_ones_changes_nothing_beside_rows_that_have_one():
    logits, params = random_logits(5, 2), params_of(*[Sampling(temperature=1, seed=3)] * 2)
    allowed = np.ones((2, V), bool)
    allowed[1, logits[1].argsort()[3:]] = False
    got = process(logits, params, no_counts(2), mask_of(allowed))
    plain = process(logits, params, no_counts(2))
    np.testing.assert_array_equal(got[0], plain[0])
    assert (np.asarray(got)[1] > -np.inf).sum() == 3


@pytest.mark.parametrize("vocab_size", [V, 2**15 + 5])
@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=1, top_k=3, seed=2)])
def test_only_allowed_tokens_are_drawn_even_where_a_bias_forbids_them(vocab_size, settings):
    """In a large vocabulary, too, where a small top_k is drawn from the largest logits alone."""
    only = 7
    banned = dataclasses.replace(settings, logit_bias={only: -math.inf})
    logits = random_logits(6, 2, vocab_size)
    allowed = np.zeros((2, vocab_size), bool)
    allowed[0, only] = allowed[1, only] = allowed[1, 11] = True
    params, counts = params_of(banned, banned, vocab_size=vocab_size), no_counts(2, vocab_size)
    for step in range(8):
        got = draw(logits, params, counts, jnp.full(2, step), mask_of(allowed))
        assert got.tolist() == [only, 11]
