"""`Engine`: what it answers is what `LanguageModel.generate` gives each prompt alone, whatever runs beside it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

import gemma_jax
from gemma_jax import Constraint, Engine, LanguageModel, Request, Result, Sampling, batch_programs

SLOTS, CONTEXT, CHUNK, PAGE = 3, 160, 32, 16
TEXT = "The people of the United States, in order to form a more perfect union, " * 12


@functools.cache
def loaded(name: str = "tiny-dense") -> LanguageModel:
    return gemma_jax.load(name, format="q4k")


@functools.cache
def engine(name: str = "tiny-dense", **options: Any) -> Engine:
    sizes = {"slots": SLOTS, "context": CONTEXT, "chunk": CHUNK, "page_size": PAGE}
    options = {"decode_steps": 4, "max_top_logprobs": 2} | sizes | options
    return Engine.from_language_model(loaded(name), **options)


def new_engine() -> Engine:
    """One that knows nothing yet and has the sizes of `engine()`: there is no new program to compile."""
    return engine.__wrapped__()


def cramped() -> Engine:
    """An engine with pages for one row of the whole context and two more: somebody else holds the others."""
    small = new_engine()
    pool = small._scheduler._pool
    pool.take(pool.free - CONTEXT // PAGE - 2)
    return small


def words(start: int, count: int) -> tuple[int, ...]:
    return tuple(loaded().tokenizer.encode(TEXT)[start : start + count])


@functools.cache
def workload() -> tuple[Request, ...]:
    """Ragged prompts, from one token to four chunks, and as many kinds of settings."""
    settings = [
        Sampling(),
        Sampling(temperature=0.9, seed=1),
        Sampling(temperature=1.1, top_p=0.9, top_k=50, seed=2),
        Sampling(repetition_penalty=1.3, presence_penalty=0.5),
        Sampling(temperature=0.7, min_p=0.05, frequency_penalty=0.3, seed=3, ignore_eos=True),
        Sampling(logit_bias={5: 2.0, 9: -1.0}, max_new_tokens=7),
        Sampling(stop_ids=tuple(range(100, 110))),
    ]
    lengths = (1, 33, 120, 8, 65, 32, 97)
    return tuple(
        Request(words(i, n), s, 20 + i, top_logprobs=1 if i % 2 else None, key=i)
        for i, (n, s) in enumerate(zip(lengths, settings, strict=True))
    )


def by_key(results: Iterable[Result]) -> dict[Any, Result]:
    return {result.request.key: result for result in results}


@functools.cache
def answers() -> dict[Any, Result]:
    return by_key(engine().run(workload()))


@pytest.mark.parametrize("name", ["tiny-dense", pytest.param("tiny-moe", marks=pytest.mark.heavy)])
def test_rows_are_what_generate_gives_alone(name: str) -> None:
    lm = loaded(name)
    results = by_key(engine(name).run(workload()))
    assert sorted(results) == list(range(len(workload())))
    # Rows of `generate` do not depend on each other either: one call is one program to compile.
    alone = lm.generate(
        [list(request.prompt) for request in workload()],
        [request.sampling for request in workload()],
        max_new_tokens=32,
        top_logprobs=1,
    )
    for request, want in zip(workload(), alone, strict=True):
        have = results[request.key].completion
        assert have is not None
        # There the row may go on for longer.
        assert have.tokens == want.tokens[: len(have.tokens)]
        assert len(have.tokens) == min(
            request.max_new_tokens, request.sampling.max_new_tokens or 99, len(want.tokens)
        )
        assert have.text == lm.tokenizer.decode(have.tokens)
        if request.top_logprobs is None:
            continue
        assert have.logprobs is not None
        assert want.logprobs is not None
        # Rows are prefilled in other chunks: the same sums of float32, added up in another order.
        np.testing.assert_allclose(have.logprobs, want.logprobs[: len(have.tokens)], atol=1e-4)


def same(results: dict[Any, Result]) -> bool:
    """Whether tokens, texts and, to the last bit, log-probabilities are those of `answers`."""
    return {k: r.completion for k, r in results.items()} == {
        k: r.completion for k, r in answers().items()
    }


def test_the_order_of_arrival_changes_nothing() -> None:
    assert same(by_key(engine().run(workload()[::-1])))


def test_eviction_changes_nothing() -> None:
    small = cramped()
    assert same(by_key(small.run(workload())))
    assert small.statistics.evictions > 0


@pytest.mark.heavy  # compiles programs for another number of slots
def test_the_number_of_slots_changes_nothing() -> None:
    single = engine(slots=1)
    tokens = {k: r.completion.tokens for k, r in by_key(single.run(workload())).items()}  # type: ignore[union-attr]
    assert tokens == {k: r.completion.tokens for k, r in answers().items()}  # type: ignore[union-attr]


def test_a_known_prefix_is_not_computed_again_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = words(40, 2 * CHUNK + 5)
    requests = [
        Request((*system, 50 + i), Sampling(temperature=0.8, seed=i), 12, top_logprobs=1, key=i)
        for i in range(5)
    ]
    cached, plain = new_engine(), new_engine()
    monkeypatch.setattr(plain._scheduler.prefixes, "find", lambda *_: None)
    have, want = by_key(cached.run(requests)), by_key(plain.run(requests))
    assert {k: r.completion for k, r in have.items()} == {k: r.completion for k, r in want.items()}
    assert [have[i].cached_tokens for i in range(5)] == [0] + [2 * CHUNK] * 4
    assert all(result.cached_tokens == 0 for result in want.values())
    assert cached.statistics.cached == 4 * 2 * CHUNK
    assert cached.statistics.prefilled == 2 * CHUNK + 5 * 5


def test_stop_strings_end_a_row_as_they_do_alone() -> None:
    [alone] = loaded().generate([list(words(0, 20))], max_new_tokens=32)
    stop = alone.text[8:12]
    sampling = Sampling(stop=(stop,))
    [want] = loaded().generate([list(words(0, 20))], sampling, max_new_tokens=32)
    neighbours = [Request(words(i, 20), max_new_tokens=30, key=i) for i in (1, 2, 3)]
    stopping = Request(words(0, 20), sampling, 32, key="stop")
    results = by_key(engine().run([stopping, *neighbours]))
    assert results["stop"].completion == want
    assert stop not in want.text
    assert want.finish_reason == "stop"
    plain = by_key(engine().run(neighbours))
    assert all(results[i].completion == plain[i].completion for i in (1, 2, 3))


def test_what_is_wrong_with_a_request_is_its_result_and_disturbs_no_other() -> None:
    vocabulary = loaded().config.vocab_size
    wrong = {
        "has no tokens": Request(()),
        f"the vocabulary has {vocabulary}": Request((vocabulary,)),
        "token id -1": Request((5, -1)),
        "exceeds the 160 positions": Request(words(0, 150), max_new_tokens=20),
        "max_new_tokens is 0": Request((5,), max_new_tokens=0),
        "top_logprobs is 99": Request((5,), max_new_tokens=4, top_logprobs=99),
        "stop_ids": Request((5,), Sampling(stop_ids=tuple(range(40))), 4),
        "logit_bias": Request((5,), Sampling(logit_bias={vocabulary: 1.0}), 4),
        "sampling.constraint is not": Request((5,), Sampling(constraint=Constraint.regex("a")), 4),
        "'str'": Request("text", max_new_tokens=4),  # type: ignore[arg-type]
    }
    mixed: list[Request] = []
    for i, (message, request) in enumerate(wrong.items()):
        mixed += [dataclasses.replace(request, key=message), *workload()[i : i + 1]]
    results = by_key(engine().run(mixed))
    for message in wrong:
        error = results.pop(message).error
        assert error is not None
        assert message in error
    assert same(results)


def test_requests_are_pulled_as_they_are_needed() -> None:
    pulled = answered = 0

    def requests() -> Iterator[Request]:
        nonlocal pulled
        for i in range(40):
            pulled += 1
            assert (
                pulled - answered <= 4 * SLOTS
            )  # some run, some wait, some are about to be handed out
            yield Request(words(i, 3), max_new_tokens=1 + i % 6)

    for result in engine().run(requests()):
        assert result.error is None
        answered += 1
    assert pulled == answered == 40


def test_a_closed_run_leaves_the_engine_ready_for_the_next() -> None:
    run = engine().run(workload())
    next(run)
    with pytest.raises(RuntimeError, match="another run"):
        next(engine().run(workload()))
    run.close()
    assert same(by_key(engine().run(workload())))


def test_the_number_of_programs_does_not_depend_on_the_work() -> None:
    ends = [Request(words(90, n), max_new_tokens=2) for n in (2, 8, 20)]  # of a prompt: 3 sizes
    for top in (None, 1):
        warm = [dataclasses.replace(r, top_logprobs=top) for r in (*workload(), *ends)]
        assert all(result.error is None for result in engine().run(warm))
    jitted = ("admit", "prefill_chunk", "save_snapshot", "decode")
    before = {name: getattr(batch_programs, name)._cache_size() for name in jitted}
    rng = np.random.default_rng(0)
    requests = [
        Request(
            words(int(rng.integers(100)), int(rng.integers(1, 120))),
            Sampling(temperature=float(rng.random()), stop_ids=tuple(range(100, 100 + i))),
            int(rng.integers(1, 9)),
            top_logprobs=1 if i % 2 else None,
        )
        for i in range(12)
    ]
    assert all(result.error is None for result in engine().run(requests))
    assert {name: getattr(batch_programs, name)._cache_size() for name in jitted} == before


def test_arun_answers_asynchronous_requests_and_waits_for_whoever_takes_the_results() -> None:
    pulled = answered = 0

    async def requests() -> AsyncIterator[Request]:
        nonlocal pulled
        for i in range(30):
            pulled += 1
            assert pulled - answered <= 5 * SLOTS
            await asyncio.sleep(0)
            yield Request(words(i, 4), max_new_tokens=2 + i % 3, key=i)

    async def consume() -> set[int]:
        nonlocal answered
        keys = set()
        async for result in engine().arun(requests()):
            answered += 1
            await asyncio.sleep(0.001)
            keys.add(result.request.key)
        return keys

    assert asyncio.run(consume()) == set(range(30))


def test_arun_raises_what_ends_the_requests() -> None:
    async def requests() -> AsyncIterator[Request]:
        yield Request(words(0, 4), max_new_tokens=2)
        raise OSError("the file ended")

    async def consume() -> None:
        async for _ in engine().arun(requests()):
            pass

    with pytest.raises(OSError, match="the file ended"):
        asyncio.run(consume())
    assert engine().is_idle


def test_generate_takes_texts() -> None:
    results = by_key(engine().generate(["The captain", "Call me"], max_new_tokens=5))
    alone = loaded().generate(["The captain", "Call me"], max_new_tokens=5)
    assert [results[0].completion, results[1].completion] == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"context": 1}, "context is 1"),
        ({"chunk": 24}, "chunk is 24; expected a multiple of page_size = 16"),
        ({"kv_bytes": 1000}, "kv_bytes is 1000"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    sizes = {"slots": SLOTS, "context": CONTEXT, "chunk": CHUNK, "page_size": PAGE} | options
    with pytest.raises(ValueError, match=message):
        Engine.from_language_model(loaded(), **sizes)
