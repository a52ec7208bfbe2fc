"""Compiled kernel under the address and undefined-behaviour sanitizers, briefly; `scripts/fuzz kernel` runs longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import fuzzing
from scripts.fuzzing import sanitized
from scripts.packaging.kernel import CompilerError

RUNS = 30


def test_hostile_numbers_stay_within_the_arrays(tmp_path: Path) -> None:
    target = fuzzing.load()["kernel"]
    try:
        summary, crashes = sanitized.run(target, 1, 100, tmp_path, runs=len(target.seeds()) + RUNS)
    except CompilerError as error:
        pytest.skip(f"no sanitizers: {error}")
    assert [crash.trace for crash in crashes] == []
    assert "0 crashes" in summary
