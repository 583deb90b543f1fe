"""`Scheduler`, `PagePool` and `PrefixCache`: no workload gets stuck, no page is lost or given out twice."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_jax.page_pool import PagePool, PrefixCache
from gemma_jax.paged_cache import Plan
from gemma_jax.scheduler import Row, Scheduler

PAGE, CHUNK = 4, 8


def test_a_page_is_free_when_its_last_holder_is_done() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert pool.free == 2
    pool.release(pages[:1])
    assert pool.free == 3


def test_the_longest_prefix_of_whole_chunks_is_found() -> None:
    pool = PagePool(8)
    prefixes = PrefixCache(pool, CHUNK, snapshots=4)
    prompt = list(range(20))
    pages = pool.take(4)
    assert prefixes.add(prompt, 8, pages[:2]) is not None
    assert prefixes.add(prompt, 16, pages) is not None
    assert prefixes.add(prompt, 16, pages) is None
    found = prefixes.find(prompt, 19)
    assert found is not None
    assert (found.tokens, found.pages) == (16, tuple(pages))
    found = prefixes.find(prompt, 15)
    assert found is not None
    assert found.tokens == 8
    assert prefixes.find([99, *prompt[1:]], 19) is None
    assert prefixes.find(prompt, 7) is None


def test_the_prefix_not_asked_for_longest_gives_way_with_its_pages() -> None:
    pool = PagePool(6)
    prefixes = PrefixCache(pool, CHUNK, snapshots=2)
    prompts = [[i] * CHUNK for i in range(3)]
    snapshots = []
    for prompt in prompts[:2]:
        pages = pool.take(2)
        snapshots.append(prefixes.add(prompt, CHUNK, pages))
        pool.release(pages)  # the row ended; the prefix still holds them
    assert pool.free == 2
    assert prefixes.find(prompts[0], CHUNK) is not None
    pages = pool.take(2)
    assert prefixes.add(prompts[2], CHUNK, pages) == snapshots[1]
    assert prefixes.find(prompts[1], CHUNK) is None
    assert prefixes.find(prompts[0], CHUNK) is not None
    assert pool.free == 2


@pytest.mark.parametrize("seed", range(20))
def test_every_workload_ends_and_gives_all_pages_back(seed: int) -> None:
    """Plays rounds as the engine does, with rows that end when they have all their positions."""
    rng = np.random.default_rng(seed)
    slots, context, steps = int(rng.integers(1, 6)), 64, int(rng.integers(1, 7))
    plan = Plan(int(rng.integers(context // PAGE, 40)), PAGE, int(rng.integers(0, 4)))
    scheduler = Scheduler(slots, context, CHUNK, plan)
    shared = rng.integers(0, 9, 2 * CHUNK).tolist()
    for order in range(40):
        own = rng.integers(0, 9, int(rng.integers(1, 30))).tolist()
        prompt = tuple(shared + own if rng.random() < 0.5 else own)
        positions = int(rng.integers(len(prompt), context + 1))
        scheduler.waiting.append(Row(order, prompt, positions))
    ended = rounds = 0
    while scheduler.waiting or scheduler.running:
        rounds += 1
        assert rounds < 40 * context  # at least one position a round
        while (admitted := scheduler.admit()) is not None:
            row, prefix = admitted
            assert row.length == (prefix.tokens if prefix is not None else 0) < len(row.prompt)
            for end in range(row.length + CHUNK, len(row.prompt), CHUNK):
                scheduler.prefixes.add(row.prompt, end, row.pages[: end // PAGE])
            row.length = len(row.prompt) - 1
        oldest = scheduler.running[0]
        for row in scheduler.running:
            while row.slot >= 0 and not scheduler.reserve(
                row, min(row.length + steps, row.positions)
            ):
                scheduler.evict_youngest()
        assert oldest.slot >= 0
        check_pages(scheduler)
        for row in scheduler.running:
            row.length = min(row.length + steps, row.positions)
            if row.length == row.positions:
                scheduler.release(row)
                ended += 1
    assert ended == 40
    while scheduler.prefixes.drop_oldest():
        pass
    assert scheduler._pool.free == plan.pages


def check_pages(scheduler: Scheduler) -> None:
    """Rows share pages only where their prompts are the same up to the end of the page."""
    owners: dict[int, tuple[int, ...]] = {}
    for row in scheduler.running:
        assert scheduler.table[row.slot, : len(row.pages)].tolist() == row.pages
        assert len(set(row.pages)) == len(row.pages)
        for i, page in enumerate(row.pages):
            end = (i + 1) * PAGE
            whole = row.prompt[:end] if end < len(row.prompt) else (row.order, i)
            assert owners.setdefault(page, whole) == whole
