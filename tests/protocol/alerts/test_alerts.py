"""The table of alerts agrees with the wire format, with the faults that are detected, and with its document."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from outstation.ml.drift.detectors.sampling_rate_watch import CAUSES
from outstation.ml.drift.reporting import alert_text
from outstation.protocol.alerts import kinds as alert_kinds
from outstation.protocol.alerts.alert import AlertKind
from outstation.protocol.alerts.kinds import KINDS
from outstation.protocol.wire.messages import AlertPayload
from scripts.alerts_reference import to_markdown

ROOT = Path(__file__).parents[3]
by_title = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)


def test_the_document_is_generated_from_the_table() -> None:
    command = "python -m scripts.alerts_reference > docs/reference/alerts.md"
    assert (ROOT / "docs/reference/alerts.md").read_text(encoding="utf-8") == to_markdown(), f"run {command}"


def test_titles_are_unique() -> None:
    assert len({kind.title for kind in KINDS}) == len(KINDS)


@by_title
def test_a_device_alert_has_a_name_that_the_wire_format_knows(kind: AlertKind) -> None:
    known = get_args(get_type_hints(AlertPayload)["alert"])
    assert kind.source == "collector" or kind.alert in known


@by_title
def test_an_alert_keeps_its_id_until_it_clears(kind: AlertKind) -> None:
    names = {name: f"a {name}" for name in re.findall(r"\{(\w+)\}", kind.subject + kind.id)}
    raised, cleared = kind.raised("Raised.", {"n": 1}, **names), kind.cleared("Cleared.", {}, **names)
    assert (raised.id, raised.subject) == (cleared.id, cleared.subject)
    assert (raised.state, raised.severity, cleared.state, cleared.severity) == (
        "raised",
        kind.severity,
        "cleared",
        "info",
    )
    assert "{" not in raised.id + raised.subject


def test_a_tasks_alert_has_the_tasks_name_in_its_id() -> None:
    alert = alert_kinds.DEADLINE_MISSED.raised("Late.", {"seconds": 2})
    assert alert.to_body("vibration", seq=7) == {
        "alert": "model",
        "subject": "deadline",
        "state": "raised",
        "severity": "warning",
        "id": "vibration/deadline",
        "summary": "Late.",
        "evidence": {"seq": 7, "seconds": 2},
    }
    assert alert_kinds.CLOCK.cleared("Set.").to_body()["id"] == "clock"


def test_every_fault_is_explained() -> None:
    assert set(alert_kinds.FIELD_FAULT.variants) == set(alert_text.CAUSES)
    assert set(alert_kinds.RATE_FAULT.variants) == set(CAUSES)
