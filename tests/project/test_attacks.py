"""Attack list: each area has attacks, and controls in which the attack succeeds without the defence."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TRUST = TESTS.parent / "docs" / "concepts" / "trust.md"
_MARK = re.compile(r'pytest\.mark\.attack\("(\w+)"(, control=True)?\)')
AREAS = {
    *("broker", "history", "clones", "files", "folders", "connections", "operators", "privacy", "values", "audit"),
    *("install", "confinement", "floods", "enrolment", "updates"),
}


def test_each_area_has_a_control_that_shows_the_attack() -> None:
    marks = [mark for path in TESTS.rglob("test_*.py") for mark in _MARK.findall(path.read_text(encoding="utf-8"))]
    controls = {area for area, control in marks if control}
    assert controls >= AREAS, AREAS - controls
    assert {area for area, control in marks if not control} >= controls


def test_every_test_that_the_threat_model_names_is_an_attack() -> None:
    named = sorted(set(re.findall(r"`(tests/[^`]+\.py)`", TRUST.read_text(encoding="utf-8"))))
    assert len(named) > 10
    for path in named:
        assert _MARK.search((TESTS.parent / path).read_text(encoding="utf-8")), path
