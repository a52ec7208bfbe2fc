"""Fleet-wide drift: distinguished from drift of single devices, raised and cleared as an alert of the collector."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.fleet.database.drift_windows import load_observed_periods
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift import fleet_wide, polled_alerts
from outstation.fleet.drift.fleet_wide import ObservationPeriod, Onset
from outstation.fleet.drift.polled_alerts import POLL_INTERVAL_S, FleetWideAlerts
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from tests.fleet.test_drift import MINUTE_US, NOW_US, add, devices, field, filled, folder, run, seen, window

__all__ = ["folder"]
HOUR_US = 60 * MINUTE_US
WEEK_US = 7 * 24 * HOUR_US


def fleet_of(number: int, *, since: int = NOW_US - WEEK_US) -> dict[str, ObservationPeriod]:
    """Return observation periods until now, with a window every five minutes."""
    windows = (NOW_US - since) // (5 * MINUTE_US)
    return {f"pi-{i:02d}": ObservationPeriod(since, NOW_US, windows) for i in range(number)}


def moved(number: int, *, subject: str = "ax", within: int = HOUR_US, earlier: int = 0) -> list[Onset]:
    """Return alarms of the first devices, spread evenly over the last `within` µs."""
    return [
        Onset(f"pi-{i:02d}", subject, NOW_US - within * (number - i) // number, True, earlier) for i in range(number)
    ]


def alone(*names: str, subject: str = "ax") -> list[Onset]:
    """Return one ended alarm per device, on successive days."""
    return [Onset(name, subject, NOW_US - (i + 1) * 24 * HOUR_US, False) for i, name in enumerate(names)]


def test_drift_of_most_devices_within_an_hour_is_one_sentence() -> None:
    [result] = fleet_wide.detect(fleet_of(20), moved(14) + alone("pi-15", "pi-16", "pi-17"))
    assert (result.subject, len(result.devices), result.device_count) == ("ax", 14, 20)
    assert result.since == NOW_US - HOUR_US
    assert result.p_value < 1e-9
    began = clock.to_rfc3339(result.since)
    assert result.summary == (
        f"ax has drifted on 14 of 20 devices since {began[:10]} {began[11:16]} UTC (usually 0 of 20): "
        "the cause is in the fleet's environment or its models, not in single sensors"
    )


def test_the_usual_count_follows_from_the_fleets_history() -> None:
    often = [Onset(f"pi-{i:02d}", "ax", NOW_US - 30 * HOUR_US, False, 8) for i in range(14, 20)]
    [result] = fleet_wide.detect(fleet_of(20), moved(14, earlier=8) + often)
    # 14 x 8 + 6 x 9 alarms in 167 hours.
    assert result.usual_count == pytest.approx((14 * 8 + 6 * 9) / (20 * 167) * 20, rel=0.01)
    assert "(usually 1 of 20)" in result.summary


@pytest.mark.parametrize(
    ("watched", "onsets"),
    [
        (fleet_of(20), moved(2)),
        (fleet_of(20), moved(6)),
        (fleet_of(3), moved(3)),
        (fleet_of(20), moved(14, within=WEEK_US)),
        (fleet_of(20), [Onset(o.device, o.subject, o.alarmed, False) for o in moved(14)]),
        (fleet_of(20), moved(10, earlier=80)),
        (fleet_of(8, since=NOW_US - HOUR_US), moved(5)),
        ({}, moved(14)),
        (fleet_of(20), []),
    ],
    ids=[
        "two",
        "under a third",
        "a small fleet",
        "over a week",
        "over again",
        "as ever",
        "no history",
        "unknown",
        "none",
    ],
)
def test_independent_drift_of_devices_is_not_fleet_wide(
    watched: dict[str, ObservationPeriod], onsets: list[Onset]
) -> None:
    assert fleet_wide.detect(watched, onsets) == []


def test_devices_that_were_not_observed_at_the_time_do_not_count() -> None:
    departed = {f"old-{i}": ObservationPeriod(NOW_US - WEEK_US, NOW_US - 5 * 24 * HOUR_US, 500) for i in range(15)}
    [result] = fleet_wide.detect(fleet_of(20) | departed, moved(14))
    assert result.device_count == 20


def test_chance_alarms_raise_no_fleet_wide_drift_in_three_hundred_fleets() -> None:
    rng, report = np.random.default_rng(3), 0
    for _ in range(300):
        onsets = []
        for i in range(20):
            for subject in ("ax", "ay", "az", "wx", "wy", "wz"):
                # Every third device began to drift at some time of the week, independently, and still drifts.
                times = np.sort(rng.uniform(0, WEEK_US, rng.poisson(0.4)))
                if len(times):
                    at = int(NOW_US - WEEK_US + times[-1])
                    onsets.append(Onset(f"pi-{i:02d}", subject, at, True, len(times) - 1))
        report += len(fleet_wide.detect(fleet_of(20), onsets))
    assert report == 0


@given(st.integers(0, 40), st.integers(1, 40), st.floats(0, 1))
def test_the_binomials_tail_is_the_sum_of_its_terms(k: int, n: int, p: float) -> None:
    expected = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
    assert fleet_wide.binomial_tail(k, n, p) == pytest.approx(expected, rel=1e-9, abs=1e-300)


# --- alerts of the collector ---


def alert(sender: MessageSender, at: int, state: str = "raised", subject: str = "ax", number: int = 1) -> SignedMessage:
    """Return a drift alert at a time, epoch µs."""
    body = {"alert": "drift", "subject": subject, "state": state, "severity": "warning", "summary": f"{subject} moved."}
    identity = f"{sender.task}/{subject}/drift/{number}"
    return sender.append("alerts", task=sender.task, **body, id=identity, time=clock.to_rfc3339(at))


def watched_fleet(store: FleetStore, number: int = 12) -> list[MessageSender]:
    """Enrol devices with a tested window every two hours of the last three days."""
    senders = devices(number)
    for sender in senders:
        at = range(0, 72 * 60, 120)
        sent = [
            window(sender, 0, {"ax": field([0.0])}, window=_window(NOW_US - 72 * HOUR_US + m * MINUTE_US)) for m in at
        ]
        add(store, sender, *sent)
    return senders


def _window(end: int) -> dict[str, Any]:
    span = {"from": clock.to_rfc3339(end - 10 * MINUTE_US), "to": clock.to_rfc3339(end)}
    return {"index": 1, "rows": [end // MINUTE_US, end // MINUTE_US + 9], "n": 10, **span}


moments = count(1000)


def look(lookout: FleetWideAlerts) -> list[str]:
    """Poll a minute after the last time."""
    return lookout.poll(ClockReading(NOW_US, next(moments) * POLL_INTERVAL_S, "synced"))


def test_a_fleet_wide_alert_is_raised_once_and_cleared_when_most_recover(store: FleetStore) -> None:
    senders = watched_fleet(store)
    lookout = FleetWideAlerts(store)
    assert look(lookout) == []
    for i, sender in enumerate(senders[:8]):
        add(store, sender, alert(sender, NOW_US - HOUR_US + i * MINUTE_US))
    [summary] = look(FleetWideAlerts(store))
    assert summary.startswith("exercise: ax has drifted on 8 of 12 devices since ")
    assert summary.endswith("First on pi-00, pi-01, pi-02, pi-03, pi-04, pi-05, pi-06, pi-07.")
    # Another collector, or a restarted one, raises no second alert.
    assert look(FleetWideAlerts(store)) == []
    of_fleet = [a for a in store.alerts() if a["device"] == ""]
    assert [(a["alert"], a["task"], a["subject"], a["state"], a["open"]) for a in of_fleet] == [
        ("drift", "exercise", "ax", "raised", True)
    ]
    for sender in senders[:6]:
        add(store, sender, alert(sender, NOW_US, "cleared"))
    assert look(FleetWideAlerts(store)) == []
    assert [a for a in store.alerts() if a["device"] == ""] == []
    every = [(a["state"], a["open"]) for a in store.alerts(closed=True) if a["device"] == ""]
    assert every == [("raised", False), ("cleared", False)]
    assert look(FleetWideAlerts(store)) == []


def test_an_alert_that_is_raised_again_counts_once(store: FleetStore) -> None:
    [sender] = devices(1)
    raised = [alert(sender, NOW_US + minute * MINUTE_US) for minute in (0, 1)]
    ended = [alert(sender, NOW_US + 2 * MINUTE_US, "cleared"), alert(sender, NOW_US + 3 * MINUTE_US)]
    add(store, sender, *raised, *ended, alert(sender, NOW_US + 4 * MINUTE_US, number=2))
    span = clock.to_rfc3339(NOW_US), clock.to_rfc3339(NOW_US + HOUR_US)
    [(task, device, subject, time, is_open, number)] = store.drift_alerts(*span)
    assert (task, device, subject, is_open, number) == (sender.task, "pi-00", "ax", 1, 2)
    assert time == clock.to_rfc3339(NOW_US + 4 * MINUTE_US)


def test_alerts_are_polled_after_a_drift_alert_and_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    looks: list[int] = []
    real = load_observed_periods

    def watched(store: FleetStore, since: str, until: str) -> list[tuple[str, str, str, str, int]]:
        looks.append(1)
        return real(store, since, until)

    monkeypatch.setattr(polled_alerts, "load_observed_periods", watched)
    [sender] = watched_fleet(store, 1)
    lookout = FleetWideAlerts(store)
    report = ClockReading(NOW_US, 100.0, "synced")
    lookout.poll(report)
    lookout.poll(ClockReading(NOW_US, 1000.0, "synced"))
    assert len(looks) == 1
    lookout.record_batch([Arrival(sender.verify(alert(sender, NOW_US)))])
    lookout.poll(ClockReading(NOW_US, 100.0 + POLL_INTERVAL_S - 1, "synced"))
    assert len(looks) == 1
    lookout.poll(ClockReading(NOW_US, 100.0 + POLL_INTERVAL_S, "synced"))
    store.close()
    assert len(looks) == 2


def test_an_alert_stays_while_the_drift_goes_on_for_months(store: FleetStore) -> None:
    senders = watched_fleet(store)
    for sender in senders[:8]:
        add(store, sender, alert(sender, NOW_US - 2 * HOUR_US))
    assert len(look(FleetWideAlerts(store))) == 1
    later = NOW_US + 90 * 24 * HOUR_US
    for sender in senders:
        add(store, sender, window(sender, 0, {"ax": field([0.0], "drift")}, window=_window(later - HOUR_US)))
    assert FleetWideAlerts(store).poll(ClockReading(later, 1.0, "synced")) == []
    assert [a["open"] for a in store.alerts(closed=True) if a["device"] == ""] == [True]


def test_a_time_that_no_calendar_has_does_not_stop_the_collector(store: FleetStore) -> None:
    senders = watched_fleet(store)
    for sender in senders[:8]:
        add(store, sender, alert(sender, NOW_US - HOUR_US))
    sent = senders[9].append(
        "alerts", task="exercise", alert="drift", subject="ax", state="raised", severity="warning", summary="x",
        id="exercise/ax/drift/1", time=f"{clock.to_rfc3339(NOW_US)[:8]}00T12:00:00Z",
    )  # fmt: skip
    with pytest.raises(MessageRefused, match="time"):
        add(store, senders[9], sent)
    assert len(look(FleetWideAlerts(store))) == 1


def test_the_survey_and_the_command_report_the_same_fleet_wide_drift(folder: Path) -> None:
    store = FleetStore(folder / "fleet.db")
    rng = np.random.default_rng(1)
    for i, sender in enumerate(devices(10)):
        sent = []
        for minute in range(200):
            late = i < 7 and minute >= 180 + i
            sums = {"mean": [6.0 if late else 0.0, 0.0], "spread": [0, 0], "limit": 5.0}
            values = rng.normal(1.0 if late else 0.0, 1, 100)
            sent.append(window(sender, minute, {"ax": field(values, "drift" if late else "ok", cusum=sums)}))
        add(store, sender, *sent)
    [item] = seen(store).groups[0].detect_fleet_wide()
    store.close()
    assert (item.subject, len(item.devices), item.device_count) == ("ax", 7, 10)
    text = run("drift", "--dir", folder).stdout
    assert "  ax has drifted on 7 of 10 devices since " in text
    [task] = json.loads(run("drift", "--dir", folder, "--json").stdout)["tasks"]
    assert task["fleet_wide"][0]["devices"] == list(item.devices)
    assert task["recent"]["ax"]["against"] == "earlier windows"
    assert task["recent"]["ax"]["n"] == 10 * 6 * 100
    assert task["recent"]["ax"]["ks"] > 0.2


def test_a_fleet_in_which_one_device_drifts_has_no_fleet_wide_drift(folder: Path) -> None:
    filled(folder)
    [task] = json.loads(run("drift", "--dir", folder, "--json").stdout)["tasks"]
    assert task["fleet_wide"] == []
