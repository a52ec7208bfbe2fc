"""Page of a simulation's report: names that are markup stay text, and spans are short."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from outstation.workbench.testing.simulation.page import render
from tests.kit import browsers

_HOSTILE = """</table></svg><script>alert(1)</script><img src=x onerror="alert('1')">"""


# Left and right ends of the names, bars, dots and times of the timeline.
_PLACES = """[...document.querySelectorAll('.event > span, .bar, .dot, .tick')].map(box => box.getBoundingClientRect())
    .filter(place => place.width).map(place => [place.left, place.right])"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from browsers.launched()


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def _report(name: str, **answer: Any) -> dict[str, Any]:
    alert = {"device": name, "alert": name, "subject": name, "by": name, "at": 65.0, "after": 5.0, "summary": name}
    events = [
        {
            "kind": "offset", "at": 60.0, "lasts": 600.0, "devices": [name] * 5, "expects": ["drift"],
            "settings": {"fields": [name], "stream": name, "over": 300.0}, "found": [{**alert, **answer}],
            "missed": [name],
        },
        {
            "kind": "outage", "at": 7200.0, "lasts": None, "devices": [name], "expects": [], "settings": {},
            "found": [], "missed": [],
        },
    ]  # fmt: skip
    invalid = [{"device": name, "seq": 1, "reason": name}]
    step = {"at": 1.0, "label": name, "devices": {name: [name]}, "why": name}
    device = {"device": name, "runs": name, "phases": [{"phase": name, "at": 2.0}], "why": name}
    rollout = {"name": name, "version": name, "outcome": name, "ends": name, "passed": False, "why": name}
    rollout |= {"steps": [step], "devices": [device]}
    return {
        "passed": False, "problems": [name], "warnings": [name], "seed": 1, "devices": 5, "simulated_seconds": 14400.0,
        "messages": 1, "rows": 1,
        "messages_per_second": 1.0, "messages_digest": name, "peak_bytes": 1, "undelivered": [name], "missed": 1,
        "events": events, "rollouts": [rollout], "false_alarms": {"n": 1, "budget": 0, "alerts": [alert]},
        "audit": {"passed": False, "messages": 1, "devices": 5, "invalid": invalid},
    }  # fmt: skip


def _parse(page: str) -> _Tags:
    parsed = _Tags()
    parsed.feed(page)
    return parsed


def test_names_that_are_markup_stay_text() -> None:
    harmless, hostile = _parse(render(_report("x"))), _parse(render(_report(_HOSTILE)))
    assert hostile.tags == harmless.tags
    assert hostile.attributes == harmless.attributes
    assert _HOSTILE in hostile.text


def test_a_page_names_the_event_that_shares_an_alert_and_devices_without_one() -> None:
    text = _parse(render(_report("hall-01", shared_with=3))).text
    assert "open since event 3" in text
    assert "missed at hall-01" in text
    assert "over 5 min" in text
    assert "nothing expected" in text


def test_devices_with_the_same_phases_of_a_rollout_share_a_row() -> None:
    report = _report("x")
    alike = [{"device": f"hall-{i:04}", "runs": "1.1.0", "phases": [{"phase": "active", "at": 60.0 * i}], "why": "done"}
             for i in range(1, 1001)]  # fmt: skip
    report["rollouts"][0]["devices"] = [*alike, {**alike[0], "device": "hall-1001", "runs": "1.0.0"}]
    text = _parse(render(report)).text
    assert "hall-0001, hall-0002, hall-0003 and 997 more" in text
    assert "active 1 min to 16 h 40 min" in text
    assert "hall-0004" not in text
    assert "hall-1001" in text


def test_a_report_of_roll_outs_alone_counts_them_and_names_each_phase_once() -> None:
    report = _report("x")
    report["events"] = report["events"][1:]
    phases = [{"phase": phase, "at": at} for phase, at in (("canary", 60.0), ("active", 120.0), ("active", 180.0))]
    report["rollouts"][0]["devices"] = [{"device": "x", "runs": "1.1.0", "phases": phases, "why": "done"}]
    text = _parse(render(report)).text
    assert "roll-outs as expected0 of 1" in text
    assert "expected and found" not in text
    assert "canary 1 min, active 2 min" in text
    assert "3 min" not in text


def test_the_outcome_of_a_rollout_is_a_warning_only_where_another_was_expected() -> None:
    report = _report("x")
    for ends, state in (("rolled-back", "ok"), ("completed", "warning")):
        report["events"][1] |= {"outcome": "rolled-back", "ends": ends}
        assert f'<span class="state {state}">rolled-back</span>' in render(report)


@pytest.mark.parametrize("width", [390, 1280])
def test_a_screen_shows_the_whole_timeline(tmp_path: Path, browser: Any, width: int) -> None:
    (tmp_path / "report.html").write_text(render(_report("workshop-north-017")))
    tab = browser.new_page(viewport={"width": width, "height": 844})
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    places = tab.evaluate(_PLACES)
    tab.close()
    assert len(places) > 10
    assert min(left for left, _ in places) >= 0
    assert max(right for _, right in places) <= width
