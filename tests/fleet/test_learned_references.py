"""Learned references of a fleet: a device that learned a wrong sensor as normal is unlike the others, and reported."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.projection import FieldMoments
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.polled_alerts import POLL_INTERVAL_S, ReferenceAlerts
from outstation.fleet.drift.reference_outliers import find_reference_outliers, student_t_quantile
from outstation.foundation.clock import ClockReading
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from tests.fleet.test_drift import NOW_US, add, devices

moments = count(1000)


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def learned(sender: MessageSender, number: int, event: str = "learned", **fields: dict[str, Any]) -> SignedMessage:
    """Return the audit message about reference `number` of a device."""
    evidence = {"task": sender.task, "site": digest(number)} | ({"fields": fields} if fields else {})
    return sender.append("audit", event=event, summary="It learned.", evidence=evidence)


def site(mean: float, sd: float = 1.0, n: int = 4000) -> dict[str, Any]:
    return {"n": n, "mean": mean, "sd": sd}


def fleet(store: FleetStore, number: int = 12) -> list[MessageSender]:
    """Enrol devices whose sites differ by 0.1 sd and learned that."""
    rng, senders = np.random.default_rng(1), devices(number)
    for sender in senders:
        temp, flow = rng.normal(20, 0.1), float(np.exp(rng.normal(0, 0.05)))
        add(store, sender, learned(sender, 1, temp=site(temp), flow=site(0.0, flow)))
    return senders


def poll(alerts: ReferenceAlerts) -> list[str]:
    boot_s = next(moments) * POLL_INTERVAL_S
    return alerts.poll(ClockReading(NOW_US + int(boot_s * 1e6), boot_s, "synced"))


def states(store: FleetStore) -> list[tuple[str, str, str, bool]]:
    return [(a["device"], a["subject"], a["state"], a["open"]) for a in store.alerts(closed=True)]


def test_a_reference_unlike_the_fleets_is_reported_once_until_it_is_learned_again(store: FleetStore) -> None:
    senders = fleet(store)
    assert poll(ReferenceAlerts(store)) == []
    add(store, senders[3], learned(senders[3], 2, temp=site(22.5), flow=site(0.0, 2.5)))
    [summary] = poll(ReferenceAlerts(store))
    assert summary == (
        "pi-03: exercise: the reference that it learned deviates from those of 11 other devices: temp differs by +2.5 "
        "(2.5 sd); flow varies 2.5 times as much. Drift is tested against it all the same."
    )
    # Another collector, or a restarted one, raises no second alert.
    assert poll(ReferenceAlerts(store)) == []
    assert states(store) == [("pi-03", "reference", "raised", True)]
    assert audit(store).passed
    add(store, senders[3], learned(senders[3], 3, temp=site(20.1), flow=site(0.0)))
    assert poll(ReferenceAlerts(store)) == []
    assert states(store) == [("pi-03", "reference", "raised", False), ("pi-03", "reference", "cleared", False)]


def test_an_accepted_reference_is_reported_no_more(store: FleetStore) -> None:
    senders = fleet(store)
    add(store, senders[0], learned(senders[0], 2, temp=site(23.0), flow=site(0.0)))
    assert len(poll(ReferenceAlerts(store))) == 1
    add(store, senders[0], learned(senders[0], 1, event="reference accepted"))
    assert states(store)[-1][3], "another reference was accepted"
    assert poll(ReferenceAlerts(store)) == []
    assert len(store.alerts()) == 1
    add(store, senders[0], learned(senders[0], 2, event="reference accepted"))
    assert poll(ReferenceAlerts(store)) == []
    assert store.alerts() == []
    add(store, senders[0], learned(senders[0], 3, temp=site(24.0), flow=site(0.0)))
    assert len(poll(ReferenceAlerts(store))) == 1, "the next one was not"


def test_it_looks_after_a_device_learned_or_accepted_and_once_a_minute(store: FleetStore) -> None:
    senders = fleet(store)
    alerts, start_s = ReferenceAlerts(store), next(moments) * POLL_INTERVAL_S
    wrong = learned(senders[1], 2, temp=site(25.0), flow=site(0.0))
    assert alerts.poll(ClockReading(NOW_US, start_s, "synced")) == []
    add(store, senders[1], wrong)
    alerts.record_batch([Arrival(senders[1].verify(wrong))])
    assert alerts.poll(ClockReading(NOW_US, start_s + POLL_INTERVAL_S - 1, "synced")) == []
    assert len(alerts.poll(ClockReading(NOW_US, start_s + POLL_INTERVAL_S, "synced"))) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temp": {"withheld": 4}},
        {"temp": site(99.0, n=5)},
        {"temp": {"n": 4000, "mean": 1e308, "sd": 1.0}},
        {"temp": {"n": 4000, "mean": "warm", "sd": 1.0}},
        {"temp": {"n": 4000, "mean": 99.0, "sd": -1.0}},
        {f"f{i}": site(0.0) for i in range(300)},
    ],
)
def test_what_is_no_reference_or_has_few_rows_is_not_compared(store: FleetStore, fields: dict[str, Any]) -> None:
    senders = fleet(store)
    add(store, senders[2], learned(senders[2], 2, **fields))
    assert poll(ReferenceAlerts(store)) == []
    assert audit(store).passed


def test_few_devices_are_not_compared() -> None:
    four = {f"pi-{i}": {"temp": FieldMoments(1000, 20.0 + 0.01 * i, 1.0)} for i in range(4)}
    assert find_reference_outliers(four | {"pi-4": {"flow": FieldMoments(1000, 5.0, 1.0)}}) == []
    five = four | {"pi-4": {"temp": FieldMoments(1000, 50.0, 1.0)}}
    [outlier] = find_reference_outliers(five)
    assert (outlier.device, outlier.others) == ("pi-4", 4)


def test_sites_that_differ_normally_are_rarely_outliers() -> None:
    rng, fleets, count = np.random.default_rng(2), 400, 12
    false = 0
    for _ in range(fleets):
        # They differ by more than matters, so only the test decides.
        means, spreads = rng.normal(0, 2, (count, 6)), np.exp(rng.normal(0, 1, (count, 6)))
        sites = {
            f"pi-{i}": {f"f{j}": FieldMoments(1000, means[i, j], spreads[i, j]) for j in range(6)} for i in range(count)
        }
        false += bool(find_reference_outliers(sites))
    # At most 1 % are expected.
    assert false <= 12


def test_several_wrong_devices_do_not_hide_one_another() -> None:
    rng = np.random.default_rng(3)
    sites = {f"pi-{i:02d}": {"temp": FieldMoments(1000, rng.normal(20, 0.05), 1.0)} for i in range(20)}
    for name in ("pi-02", "pi-07", "pi-11"):
        sites[name] = {"temp": FieldMoments(1000, 21.0, 1.0)}
    assert [outlier.device for outlier in find_reference_outliers(sites)] == ["pi-02", "pi-07", "pi-11"]


def test_a_tight_fleet_reports_no_difference_that_does_not_matter() -> None:
    sites = {f"pi-{i:02d}": {"temp": FieldMoments(1000, 20.0 + 1e-4 * i, 1.0)} for i in range(12)}
    sites["pi-05"] = {"temp": FieldMoments(1000, 20.4, 1.3)}
    assert find_reference_outliers(sites) == []
    constant = {f"pi-{i:02d}": {"temp": FieldMoments(1000, 20.0, 0.0)} for i in range(12)}
    assert find_reference_outliers(constant) == []


@pytest.mark.parametrize(
    ("p", "degrees", "expected"), [(0.9995, 3, 12.924), (0.9995, 10, 4.587), (0.975, 30, 2.042), (0.995, 1, 63.657)]
)
def test_students_quantile_is_that_of_the_tables(p: float, degrees: int, expected: float) -> None:
    assert student_t_quantile(p, degrees) == pytest.approx(expected, rel=2e-4)
