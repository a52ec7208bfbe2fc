"""Transcript: each party of a fleet tries what it can, and the table in trust.md is the short form."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.attacks import transcript
from scripts.attacks.attempts import ATTEMPTS

pytestmark = pytest.mark.attack("parties")

TRUST = Path(__file__).parents[2] / "docs" / "concepts" / "trust.md"


@pytest.mark.process
@pytest.mark.broker
def test_each_party_can_do_what_the_table_says_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = transcript.run(tmp_path)
    assert [entry.happened for entry in entries if not entry.held] == []
    assert [entry.attempt for entry in entries] == ATTEMPTS
    printed = capsys.readouterr().out
    assert all(attempt.action in printed for attempt in ATTEMPTS)
    assert printed.count("could not ") >= sum(not attempt.may for attempt in ATTEMPTS)


def test_the_table_in_the_documentation_is_the_one_of_the_deeds() -> None:
    assert transcript.render_table() in TRUST.read_text(encoding="utf-8")


def test_a_promise_that_breaks_is_printed_and_ends_the_run_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [transcript.Entry(ATTEMPTS[0], not ATTEMPTS[0].may, "it happened")]
    monkeypatch.setattr(transcript, "run", lambda _: broken)
    assert transcript.main() == 1
    assert broken[0].verdict == "BROKEN"
    assert "1 broken promises" in capsys.readouterr().out
    failed = transcript.Entry(ATTEMPTS[1], ATTEMPTS[1].may, "RuntimeError", error=True)
    assert not failed.held
