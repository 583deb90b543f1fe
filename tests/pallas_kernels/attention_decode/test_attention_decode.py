"""``attention_decode``: every implementation against a float64 numpy definition, at the edges of blocks and rings.

Tolerance: keys and values in the cache are bfloat16 roundings of float32 numbers that may be a few roundings (2**-24)
off and so may round to the next bfloat16: 2**-8 of their size. The output averages values of at most ``max |v|`` with
weights and rounds three times at 2**-9 (queries, weights, result); queries that are off by 2**-9 in each of C products
of a score change it by 2**-9 |q| |k|, and the average by as much of ``max |v|`` again.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lanes
from pallas_kernels.attention_decode import IMPLEMENTATIONS, attention_decode
from pallas_kernels.attention_decode.cases import CASES, Case

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
EPS = 1e-6


class Call(NamedTuple):
    """What `attention_decode` takes."""

    qkv: np.ndarray
    norms: tuple[np.ndarray, np.ndarray | None]
    rope: tuple[np.ndarray, np.ndarray]
    cache: tuple[np.ndarray, np.ndarray]
    positions: np.ndarray


def draw(case: Case, positions: list[list[int]], slots: int, seed: int = 0) -> Call:
    """A cache full of numbers and the product of the next tokens: their heads' norms are 1, scores about as large."""
    rng = np.random.default_rng(seed)
    c = case.head_dim
    where = np.asarray(positions, np.int32)
    batch, queries = where.shape

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def bf16(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.bfloat16))

    q_norm, k_norm = (bf16(1 + 0.1 * normal(c)) * bf16(np.full(c, c**-0.25)) for _ in range(2))
    angles = normal(batch, queries, c // 2)
    cache = tuple(bf16(normal(batch, slots, case.kv_heads, c) * scale) for scale in (c**-0.25, 1))
    return Call(
        3 * normal(batch, queries, (case.heads + case.own) * c),
        (q_norm, k_norm if case.own else None),
        (np.cos(angles), np.sin(angles)),
        cache,
        where,
    )


def definition(
    call: Call, case: Case, window: int | None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Slot by slot and head by head, in float64; the cache in bfloat16."""
    keys, values = (np.array(x) for x in call.cache)
    batch, slots, kv_heads, c = keys.shape
    queries = call.positions.shape[1]

    def prepared(
        x: np.ndarray, weight: np.ndarray | None, at: tuple[int, int] | None
    ) -> np.ndarray:
        x = x.astype(np.float64)
        x = x / np.sqrt(np.mean(x * x) + EPS)
        if weight is not None:
            x = x * weight.astype(np.float64)
        if at is not None:
            cos, sin = (table[at].astype(np.float64) for table in call.rope)
            low, high = x[: c // 2], x[c // 2 :]
            x = np.concatenate([low * cos - high * sin, high * cos + low * sin])
        return x

    heads = call.qkv.reshape(batch, queries, -1, c)
    held = np.full((batch, slots), -1)
    for b in range(batch):
        last = call.positions[b].max()
        for position in range(max(0, last - slots + 1), last + 1):
            held[b, position % slots] = position
        for t in range(queries if case.own else 0):
            for k in range(kv_heads if call.positions[b, t] >= 0 else 0):
                slot = call.positions[b, t] % slots
                keys[b, slot, k] = prepared(heads[b, t, case.heads + k], call.norms[1], (b, t))
                values[b, slot, k] = prepared(heads[b, t, -kv_heads + k], None, None)
    out = np.zeros((batch, queries, case.heads, c))
    for b in range(batch):
        for t in range(queries):
            p = call.positions[b, t]
            seen = (held[b] >= 0) & (held[b] <= p)
            if window is not None:
                seen &= held[b] > p - window
            for h in range(case.heads if p >= 0 else 0):
                q = prepared(heads[b, t, h], call.norms[0], (b, t))
                k = h // (case.heads // kv_heads)
                scores = keys[b, seen, k].astype(np.float64) @ q
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ values[b, seen, k].astype(np.float64) / weights.sum()
    return out.reshape(batch, queries, -1), (keys, values)


def check(implementation: str, case: Case, positions: list[list[int]], slots: int) -> None:
    call = draw(case, positions, slots)
    arguments = jax.tree.map(jnp.asarray, call)
    with lanes.interpreted():
        out, cache = jax.jit(
            lambda call: attention_decode(
                *call, heads=case.heads, window=case.window, eps=EPS, implementation=implementation
            )
        )(arguments)
    agrees(call, case, out, cache)


def agrees(call: Call, case: Case, out: jax.Array, cache: tuple[jax.Array, jax.Array]) -> None:
    """`out` and `cache` are what the definition says."""
    want, want_cache = definition(call, case, case.window)
    for got, expected, old in zip(cache, want_cache, call.cache, strict=True):
        got = np.asarray(got)
        largest = float(np.abs(expected.astype(np.float32)).max())
        np.testing.assert_allclose(
            got.astype(np.float32), expected.astype(np.float32), rtol=0, atol=2.0**-8 * largest
        )
        unchanged = np.all(expected == old, axis=(2, 3))
        assert np.array_equal(got[unchanged], old[unchanged])
    assert out.dtype == jnp.bfloat16
    largest = np.abs(want_cache[1].astype(np.float64)).max()
    np.testing.assert_allclose(
        np.asarray(out, np.float64), want, rtol=0, atol=6 * 2.0**-9 * largest
    )


@implementations
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_gemma_layer(implementation: str, name: str) -> None:
    """Two rows of different lengths, one of which has wrapped around the 72 slots of a ring."""
    case = CASES[name]
    window = case.window and 72
    check(implementation, case._replace(window=window), [[100 if window else 70], [5]], 72)


@implementations
@pytest.mark.parametrize("position", [0, 1, 15, 16, 62, 63, 64, 65, 126, 127, 128, 159])
def test_lengths_around_the_edges_of_blocks_up_to_a_full_cache(
    implementation: str, position: int
) -> None:
    check(implementation, Case(4, 2, 128, None, 4), [[position]], 160)


@implementations
@pytest.mark.parametrize("position", [0, 78, 79, 80, 81, 143, 144, 159, 160, 1000])
def test_a_ring_wraps_around(implementation: str, position: int) -> None:
    """80 slots, a block and a quarter, that hold exactly the window."""
    check(implementation, Case(2, 1, 128, 80, 2), [[position]], 80)


@implementations
@pytest.mark.parametrize("window", [1, 16, 17, 63, 64, 65])
def test_a_window_shorter_than_the_ring_keeps_exactly_its_keys(
    implementation: str, window: int
) -> None:
    check(implementation, Case(2, 1, 128, window, 2), [[150]], 96)


@implementations
def test_rows_without_a_token_see_nothing_and_change_nothing(implementation: str) -> None:
    check(implementation, Case(4, 2, 128, None, 4), [[3], [-1], [99], [-1], [0]], 100)


@implementations
@pytest.mark.parametrize("queries", [2, 5, 8])
@pytest.mark.parametrize("own", [2, 1, 0])
def test_drafts_are_verified_together_each_seeing_up_to_itself(
    implementation: str, queries: int, own: int
) -> None:
    """4, 20 and 32 rows of queries that read a KV head; the second row of the batch has one draft only."""
    first = [60 + t for t in range(queries)]
    second = [7] + [-1] * (queries - 1)
    check(implementation, Case(4, 1, 128, None, own), [first, second], 128)


@implementations
def test_drafts_in_a_ring_with_room_for_them(implementation: str) -> None:
    check(implementation, Case(2, 1, 128, 69, 2), [[98, 99, 100, 101]], 72)


@implementations
@pytest.mark.parametrize(("page", "own"), [(64, 4), (128, 2), (64, 0)])
def test_a_cache_in_pages_is_that_of_rows_put_together(
    implementation: str, page: int, own: int
) -> None:
    """Pages lie in any order, two rows share their first, and names beyond a row's last position mean nothing."""
    case = Case(4, 2, 128, None, own)
    pages = np.arange(12)[::-1].reshape(3, 4)[:, : 256 // page].copy()
    call = draw(case, [[page + 7], [page], [-1]], 256)
    pages[1, 0] = pages[0, 0]
    beyond = np.arange(pages.shape[1]) * page > call.positions
    cache = [np.zeros((12, page, 2, 128), x.dtype) for x in call.cache]
    for paged, rows in zip(cache, call.cache, strict=True):
        rows = rows.copy()
        rows[1, :page] = rows[0, :page]
        paged[pages.reshape(-1)] = rows.reshape(-1, page, 2, 128)
    in_rows = [paged[pages].reshape(3, 256, 2, 128) for paged in cache]
    named = np.where(beyond, 10**6, pages)
    with lanes.interpreted():
        out, got = jax.jit(
            lambda call, named: attention_decode(
                *call, heads=4, pages=named, eps=EPS, implementation=implementation
            )
        )(jax.tree.map(jnp.asarray, call._replace(cache=tuple(cache))), jnp.asarray(named))
    held = tuple(np.asarray(paged)[pages].reshape(3, 256, 2, 128) for paged in got)
    agrees(call._replace(cache=tuple(in_rows)), case, out, held)
    unnamed = np.setdiff1d(np.arange(12), pages)
    for paged, old in zip(got, cache, strict=True):
        assert np.array_equal(np.asarray(paged)[unnamed], old[unnamed])


def test_what_lies_beyond_a_row_is_not_read() -> None:
    """It may be anything: even a weight of zero would let a NaN through."""
    case = Case(2, 1, 128, None, 2)
    call = draw(case, [[70], [3]], 192)
    beyond = np.arange(192) > call.positions
    poisoned = [np.where(beyond[..., None, None], np.nan, x) for x in call.cache]
    call = call._replace(cache=tuple(jnp.asarray(x, jnp.bfloat16) for x in poisoned))
    with lanes.interpreted():
        out, _ = jax.jit(
            lambda call: attention_decode(*call, heads=2, eps=EPS, implementation="mosaic")
        )(jax.tree.map(jnp.asarray, call))
    assert bool(jnp.all(jnp.isfinite(out)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": (1, 1, 5 * 128)}, "expected [1, T, N] with N one of 256, 384, 512"),
        ({"qkv": (2, 1, 4 * 128)}, "expected [1, T, N] with N one of"),
        ({"q_norm": (64,)}, "q_norm has shape (64,): expected (128,)"),
        ({"k_norm": None}, "k_norm is None, but the product has keys"),
        ({"qkv": (1, 1, 2 * 128)}, "k_norm is given without keys"),
        ({"cos": (1, 1, 128)}, "cosines has shape (1, 1, 128): expected (1, 1, 64)"),
        ({"positions": (1, 2)}, "positions has shape (1, 2): expected (1, 1)"),
        ({"values": (1, 16, 2, 128)}, "expected twice [B, S, K, C] of one type"),
        ({"window": 17}, "window is 17: expected None or 1 to 16 for 1 queries over 16 slots"),
        ({"pages": np.zeros(3, int)}, "pages is int64 (3,): expected integers [B, N]"),
        ({"pages": np.zeros((2, 1), int)}, "expected [2, T, N]"),
        ({"heads": 0}, "heads = 0: expected a multiple of 1 KV heads"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    shapes = {
        "qkv": (1, 1, 4 * 128),
        "q_norm": (128,),
        "k_norm": (128,),
        "cos": (1, 1, 64),
        "keys": (1, 16, 1, 128),
        "values": (1, 16, 1, 128),
        "positions": (1, 1),
    }
    options = {"heads": 2, "window": None, "pages": None}
    options |= {k: v for k, v in change.items() if k in options}
    shapes |= {k: v for k, v in change.items() if k in shapes}
    x = {name: None if shape is None else jnp.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_decode(
            x["qkv"],
            (x["q_norm"], x["k_norm"]),
            (x["cos"], x["cos"]),
            (x["keys"], x["values"]),
            x["positions"].astype(int),
            **options,
        )


def test_what_the_kernel_cannot_serve_it_says() -> None:
    def reason(
        t: int = 1,
        c: int = 256,
        cache: jnp.dtype = jnp.bfloat16,
        qkv: jnp.dtype = jnp.float32,
        page: int = 64,
        pages: jax.Array | None = None,
    ) -> str | None:
        table = jax.ShapeDtypeStruct((1, t, c // 2), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, page, 1, c), cache)
        return IMPLEMENTATIONS["mosaic"].why_not(
            jax.ShapeDtypeStruct((1, t, 4 * c), qkv),
            (table, table),
            (kv, kv),
            jax.ShapeDtypeStruct((1, t), jnp.int32),
            2,
            pages,
        )

    assert reason() is None
    assert reason(t=8, c=512) is None
    assert reason(pages=jnp.zeros((1, 1), int)) is None
    assert reason(page=80, pages=jnp.zeros((1, 1), int)) == (
        "a page has 80 slots: expected a multiple of 64"
    )
    assert reason(t=9) == "a row has 9 queries: expected 1 to 8"
    assert reason(c=64) == "the head size is 64: expected 128, 256 or 512"
    assert reason(cache=jnp.float32) == ("the cache has dtype float32: tensor cores take bfloat16")
    assert reason(qkv=jnp.bfloat16) == "qkv has dtype bfloat16: expected float32"
