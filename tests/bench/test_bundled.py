"""The README's figures of the bundled models are those of the raw samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import bundled

ROOT = Path(__file__).parents[2]


def test_readme_gives_the_medians_of_the_raw_samples() -> None:
    report = json.loads((ROOT / "bench/results/bundled_cpu.json").read_text())
    [q4k] = [r for r in report["results"] if (r["model"], r["format"]) == ("tiny-dense", "q4k")]
    prefill, decode = bundled.rates(q4k["seconds"])
    device = report["environment"]["device"]
    sentence = f"`tiny-dense` in Q4K decodes {decode:.0f} and prefills {prefill:.0f} tokens/s"
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{sentence} on two cores of an {device}." in readme
    assert report["environment"]["cores"] == 2


def test_decoding_is_what_generating_takes_beyond_prefilling() -> None:
    seconds = {"prefill": [9.0, 1.0, 0.5], "generate": [2.0, 3.0, 99.0]}
    assert bundled.rates(seconds) == pytest.approx((bundled.PROMPT / 1.0, (bundled.NEW - 1) / 2.0))
