"""The table that deals a step's slots out to CTAs: every block in use once, and no CTA with more than its share."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention_decode import schedule as s
from pallas_kernels.attention_decode.schedule import Grid, schedule

LENGTHS = {
    "one": [1],
    "short": [60, 64, 65],
    "one long": [16384],
    "ragged": [5, 16000, 1, 700, 64, 0, 8000, 129],
    "many": list(range(1, 16384, 64)),
    "full and beyond": [16384, 20000],
    "none": [0, 0],
}


def table_of(lengths: list[int], grid: Grid) -> np.ndarray:
    return np.asarray(schedule(jnp.asarray(lengths)[:, None] - 1, grid))


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("pairs_per_row", "tiles"), [(1, 1), (8, 1), (4, 4)])
def test_every_block_in_use_is_visited_once(name: str, pairs_per_row: int, tiles: int) -> None:
    lengths = LENGTHS[name]
    grid = Grid(len(lengths), pairs_per_row, tiles, 16384, 264)
    table = table_of(lengths, grid)
    assert table.shape == (grid.ctas, grid.columns)
    visits: dict[tuple[int, int, int], list[int]] = {}
    for cta in table[table[:, s.ROW] >= 0]:
        pair = (cta[s.ROW], cta[s.HEAD], cta[s.TILE])
        visits.setdefault(pair, []).extend(range(cta[s.FIRST], cta[s.END]))
    heads = pairs_per_row // tiles
    for row, length in enumerate(lengths):
        blocks = -(-min(length, 16384) // s.BLOCK)
        for head in range(heads):
            for tile in range(tiles):
                assert visits.pop((row, head, tile)) == list(range(blocks))
    assert not visits


@pytest.mark.parametrize("name", LENGTHS)
def test_no_cta_has_more_than_its_share_and_one_run_of_rounding(name: str) -> None:
    lengths = LENGTHS[name]
    grid = Grid(len(lengths), 2, 1, 16384, 264)
    table = table_of(lengths, grid)
    blocks = [2 * -(-min(length, 16384) // s.BLOCK) for length in lengths]
    longest = int(np.max(table[:, s.END] - table[:, s.FIRST]))
    assert longest <= max(1, -(-sum(blocks) // (grid.ctas - grid.pairs)))


def test_runs_of_a_pair_are_neighbours_and_know_their_places() -> None:
    table = table_of(LENGTHS["ragged"], Grid(8, 2, 1, 16384, 264))
    for n, cta in enumerate(table[table[:, s.ROW] >= 0]):
        first = n - cta[s.INDEX]
        runs = cta[s.RUNS]
        assert np.array_equal(table[first : first + runs, s.INDEX], np.arange(runs))
        assert len(np.unique(table[first : first + runs, s.ROW : s.TILE + 1], axis=0)) == 1
        assert cta[s.LAST] == LENGTHS["ragged"][cta[s.ROW]] - 1


@pytest.mark.parametrize(
    ("slots", "batch", "levels"), [(64, 1, 1), (512, 1, 1), (4096, 1, 2), (16384, 1, 3)]
)
def test_the_tree_of_partial_results_has_room_for_all_runs(
    slots: int, batch: int, levels: int
) -> None:
    grid = Grid(batch, 1, 1, slots, 264)
    assert grid.levels == levels
    table = table_of([slots], grid)
    assert table[:, s.RUNS].max() <= s.FAN**levels
    assert np.all(table[:, s.ARRIVALS :] == 0)
