"""One resolution for all ops: the first without an objection, a named one or its reason, never a silent fallback."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pallas_kernels.dispatch import Table, choose

WILLING = SimpleNamespace(why_not=lambda x: None)
PICKY = SimpleNamespace(why_not=lambda x: None if x > 3 else f"x = {x} is too small")
TABLE = {"picky": PICKY, "willing": WILLING}


def test_the_first_without_an_objection_is_taken() -> None:
    assert choose("op", TABLE, None, 5) is PICKY
    assert choose("op", TABLE, None, 1) is WILLING


def test_a_named_one_serves_or_raises_its_reason() -> None:
    assert choose("op", TABLE, "willing", 5) is WILLING
    with pytest.raises(ValueError, match="op: implementation 'picky' cannot serve this: x = 1"):
        choose("op", TABLE, "picky", 1)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"one .* of picky, willing"):
        choose("op", TABLE, "cuda", 5)


def test_when_all_object_all_reasons_are_given() -> None:
    with pytest.raises(ValueError, match="picky: x = 1 is too small"):
        choose("op", {"picky": PICKY}, None, 1)


def test_of_several_names_the_first_that_can_serves() -> None:
    table = {"xla": WILLING, "mosaic": PICKY}
    assert choose("op", table, ("mosaic", "xla"), 5) is PICKY
    assert choose("op", table, ("mosaic", "xla"), 1) is WILLING
    assert choose("op", {"xla": WILLING}, ("mosaic", "xla"), 5) is WILLING
    with pytest.raises(ValueError, match="mosaic: x = 1 is too small"):
        choose("op", table, ("mosaic",), 1)
    with pytest.raises(ValueError, match="'mosiac' is none of xla, mosaic, reference"):
        choose("op", table, ("mosiac", "xla"), 5)
    with pytest.raises(ValueError, match="none was named"):
        choose("op", {"xla": WILLING}, ("mosaic",), 5)


def test_an_op_does_not_import_what_it_does_not_use() -> None:
    script = "import sys, pallas_kernels; sys.exit('jax.experimental.mosaic.gpu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    table = Table("pallas_kernels.embedding_lookup", "xla", "reference")
    assert list(table) == ["xla", "reference"]
    assert table["reference"].__name__ == "pallas_kernels.embedding_lookup.reference"
    with pytest.raises(KeyError):
        table["mosaic"]
