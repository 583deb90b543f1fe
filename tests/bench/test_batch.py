"""`bench.batch`: the work it gives and what it writes down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import batch


def test_requests_are_ragged_and_share_what_they_should() -> None:
    plain, shared = batch.requests(16, 4096), batch.requests(16, 4096, shared=batch.SHARED)
    assert len({len(request.prompt) for request in plain}) > 8
    assert len({request.max_new_tokens for request in plain}) > 8
    assert len({request.prompt[: batch.SHARED] for request in shared}) == 1
    assert len({request.prompt[batch.SHARED :] for request in shared}) == 16
    longest = batch.SHARED + batch.LONGEST_PROMPT + batch.LONGEST_CONTINUATION
    assert longest <= batch.CONTEXT


@pytest.mark.heavy
def test_every_case_has_its_samples_and_a_known_prefix_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "batch.json", tmp_path / "batch.svg"]
    options = ["--slots", "2", "--requests", "4", "--samples", "1"]
    command = ["batch", *options, "--json", str(files[0]), "--plot", str(files[1])]
    monkeypatch.setattr(sys, "argv", command)
    batch.main()
    results = json.loads(files[0].read_text())["results"]
    samples = {(r["case"], r["slots"]): r["samples"] for r in results}
    assert set(samples) == {
        ("continuous", 2),
        ("static", 2),
        ("static", 1),
        ("shared, no prefix cache", 2),
        ("shared, prefix cache", 2),
    }
    assert all(len(s) == 1 and len(s[0]["latencies"]) == 4 for s in samples.values())
    assert len({samples[case, 2][0]["generated"] for case in ("continuous", "static")}) == 1
    without, [known] = samples["shared, no prefix cache", 2], samples["shared, prefix cache", 2]
    assert known["cached"] >= batch.SHARED
    assert known["cached"] + known["prefilled"] == without[0]["prefilled"]
    assert "<svg" in files[1].read_text()
