"""Flipped bits in stores and databases, briefly and reproducibly; `python -m scripts.fuzzing.flips` does 2,000."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from scripts.fuzzing import flips
from scripts.kit.stores import opened


@pytest.mark.parametrize(("run", "count"), [(flips.flip_stores, 36), (flips.flip_databases, 20)])
def test_a_flipped_bit_is_answered_in_one_line_and_loses_nothing_without_a_word(
    tmp_path: Path, run: flips.Run, count: int
) -> None:
    problems = [(str(flip), problem) for flip, problem in run(tmp_path, Random(5), count) if problem]
    assert problems == []


def test_a_loss_without_a_word_is_noticed(tmp_path: Path) -> None:
    """Control: rows and messages that vanish from an intact store fail the check."""
    [clean, *_] = flips.build_stores(tmp_path)
    assert flips.check_store(clean) == ""
    for table, key in (("outbox", "seq = 20"), ("chunks", "stream = 1 AND first_row = 51")):
        store, _ = opened(clean)
        store._db.execute(f"DELETE FROM {table} WHERE {key}")
        store.close()
        assert "lost without a word" in flips.check_store(clean)
