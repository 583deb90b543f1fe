"""Which parameter gets which format."""

from __future__ import annotations

import pytest

from convert.policy import AS_STORED, BF16, FORMATS, format_of


@pytest.mark.parametrize("format", [*FORMATS, None])
@pytest.mark.parametrize(
    ("path", "shape"),
    [("final_norm", (64,)), ("layers_0/layer_scalar", (1,)), ("layers_3/moe/router", (8, 64))],
)
def test_norms_scalars_and_routers_stay_as_they_are(
    path: str, shape: tuple[int, ...], format: str | None
) -> None:
    assert format_of(path, shape, format) == AS_STORED


@pytest.mark.parametrize("path", ["embed/weight", "ple/embedding"])
def test_embeddings_are_q6k_under_q4k(path: str) -> None:
    assert [format_of(path, (9, 64), f) for f in ("q4k", "eq8_0", BF16, None)] == [
        "q6k", "eq8_0", BF16, AS_STORED,
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["layers_0/ffn/down", "ple/projection", "layers_0/moe/gate_up"])
def test_other_matrices_get_the_format_asked_for(path: str) -> None:
    assert [format_of(path, (9, 64), f) for f in FORMATS] == list(FORMATS)


def test_rows_that_blocks_do_not_divide_are_refused_by_name() -> None:
    assert format_of("layers_0/ffn/down", (64, 48), BF16) == BF16
    with pytest.raises(ValueError, match=r"layers_0/ffn/down.*\(64, 48\).*q4k"):
        format_of("layers_0/ffn/down", (64, 48), "q4k")


def test_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"q4k, eq8_0, bf16.*'q5k'"):
        format_of("final_norm", (64,), "q5k")
