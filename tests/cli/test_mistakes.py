"""Mistakes of the first hours: an answer of one line names what is wrong and what to do."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from scripts.fuzzing import site
from scripts.fuzzing.mistake_table import MISTAKES
from scripts.fuzzing.mistakes import make_mistakes


@pytest.mark.process
def test_a_mistake_is_named_with_what_to_do_about_it(tmp_path: Path) -> None:
    # `python -m scripts.fuzzing.mistakes` makes all.
    with contextlib.redirect_stdout(io.StringIO()):
        folder = site.build(tmp_path / "site")
    answers = [*make_mistakes(MISTAKES[::3], folder)]
    assert [(answer.mistake.command, answer.text, answer.faults) for answer in answers if answer.faults] == []
