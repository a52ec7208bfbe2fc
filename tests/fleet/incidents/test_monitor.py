"""The collector's own alerts: raised and cleared once, by stored data alone, in SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outstation.fleet.audit.audit import audit
from outstation.fleet.collector.leader import LeaderTasks
from outstation.fleet.database.incidents import device_status
from outstation.fleet.database.ingest import Arrival, Refusal
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents import incidents, outliers
from outstation.fleet.incidents.conditions import Certificate
from outstation.fleet.incidents.incidents import IncidentFilter
from outstation.fleet.incidents.monitor import IncidentMonitor
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from outstation.workbench.testing.patience import wait_until
from tests.fleet.test_drift import field, window

T0_US = clock.parse_rfc3339("2026-11-24T22:00:00.000000Z")
DAY_S = 86_400.0


class Fleet:
    """A fleet and its collector, on a clock of their own: `at` seconds since the beginning."""

    def __init__(self, store: FleetStore, devices: int = 1, **kwargs: Any) -> None:
        self.store, self.at_s = store, 0.0
        self.senders = [MessageSender(f"pi-{i:02d}") for i in range(devices)]
        for sender in self.senders:
            store.enrol(sender.device, sender.key.public, replace=False, now=self.time())
        self.monitor = IncidentMonitor(store, **kwargs)

    def time(self, at_s: float | None = None) -> str:
        return clock.to_rfc3339(T0_US + round((self.at_s if at_s is None else at_s) * 1e6))

    def arrive(self, *sent: tuple[MessageSender, SignedMessage]) -> None:
        self.store.ingest([Arrival(sender.verify(item)) for sender, item in sent], [], self.time())

    def health(self, index: int = 0, *, ahead_s: float = 0.0, **members: Any) -> None:
        sender = self.senders[index]
        body = {"outbox": 0, "interval_s": 60, "time": self.time(self.at_s + ahead_s), **members}
        self.arrive((sender, sender.append("health", streams={}, tasks={}, **body)))

    def run(self, seconds: float, *, wall_step_s: float = 0.0, monitor: IncidentMonitor | None = None) -> None:
        """Let the collector turn every ten seconds."""
        watcher = monitor or self.monitor
        for _ in range(round(seconds / 10)):
            self.at_s += 10
            now = ClockReading(T0_US + round((self.at_s + wall_step_s) * 1e6), self.at_s + 1000, "synced")
            watcher.watch(now)
            watcher.poll(now)

    def open(self) -> list[tuple[str, str, str]]:
        listed = incidents.list_incidents(self.store, now=self.time())
        return [(i.device, i.id.removeprefix("collector/"), i.severity) for i in listed]

    def messages(self) -> list[tuple[str, str]]:
        return [(row["id"].removeprefix("collector/"), row["state"]) for row in self.store.alerts(closed=True)]


def test_a_silent_device_is_sent_once_and_cleared_once(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.health()
    fleet.run(200)
    assert fleet.open() == []
    fleet.run(600)
    assert fleet.open() == [("pi-00", "silent", "critical")]
    [incident] = incidents.list_incidents(store, now=fleet.time())
    assert "since 2026-11-24 22:00:00 UTC" in incident.summary
    assert incident.kind is not None
    assert incident.kind.title == "Device silent"
    fleet.health()
    fleet.run(60)
    assert fleet.messages() == [("silent", "raised"), ("silent", "cleared")]
    assert audit(store).passed


def test_a_device_is_silent_by_the_interval_that_it_promises(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.health(interval_s=600)
    fleet.run(1800)
    assert fleet.open() == []
    fleet.run(120)
    assert fleet.open() == [("pi-00", "silent", "critical")]


@pytest.mark.parametrize("reason", ["stopped", "revoked", "retired", "never seen"])
def test_a_device_that_stopped_or_left_is_not_silent(store: FleetStore, reason: str) -> None:
    fleet = Fleet(store)
    if reason != "never seen":
        fleet.health()
    if reason == "stopped":
        fleet.arrive((fleet.senders[0], fleet.senders[0].state("stopped")))
    if reason == "retired":
        with store.transaction() as db:
            db.execute("INSERT INTO retired_devices VALUES (?, ?, ?)", ("pi-00", fleet.time(), "eva"))
    if reason == "revoked":
        store.revoke("pi-00", None, fleet.time())
    fleet.run(3600)
    assert "silent" not in [name for _, name, _ in fleet.open()]


def test_a_device_that_never_sent_anything_is_warned_of_after_a_day(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.at_s = DAY_S - 600
    fleet.run(590)
    assert fleet.open() == []
    fleet.run(60)
    assert fleet.open() == [("pi-00", "silent", "warning")]
    [incident] = incidents.list_incidents(store, now=fleet.time())
    assert "since it was enrolled on 2026-11-24 22:00:00 UTC" in incident.summary
    fleet.health()
    fleet.run(60)
    assert fleet.messages() == [("silent", "raised"), ("silent", "cleared")]


def test_a_device_that_is_enrolled_anew_has_a_day_from_then_on(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.at_s = DAY_S - 600
    store.revoke("pi-00", None, fleet.time())
    store.retire("pi-00", "eva", fleet.time())
    store.enrol("pi-00", MessageSender("pi-00").key.public, replace=False, now=fleet.time())
    fleet.run(1200)
    assert "silent" not in [name for _, name, _ in fleet.open()]
    fleet.at_s = 2 * DAY_S - 600
    fleet.run(300)
    assert ("pi-00", "silent", "warning") in fleet.open()
    summaries = [incident.summary for incident in incidents.list_incidents(store, now=fleet.time())]
    assert any("since it was enrolled on 2026-11-25 21:50:00 UTC" in summary for summary in summaries)


def test_silence_since_an_enrolment_without_a_set_clock_counts_from_the_start(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outstation.fleet.incidents.conditions.UNSEEN_LIMIT_S", 3600.0)
    fleet = Fleet(store)
    with store.transaction() as db:
        db.execute("UPDATE keys SET added = '1970-01-01T00:02:00.000000Z'")
    fleet.run(3300)
    assert fleet.open() == []
    fleet.run(600)
    assert fleet.open() == [("pi-00", "silent", "warning")]
    [incident] = incidents.list_incidents(store, now=fleet.time())
    assert "since it was enrolled on a day that a wrong clock gave. Run" in incident.summary


@pytest.mark.parametrize("stored", ["1970-01-01T00:02:00.000000Z", "2040-01-01T00:00:00.000000Z"])
@pytest.mark.parametrize("column", ["last_seen", "enrolled"])
def test_an_open_alert_of_silence_outlives_a_restart_of_the_collector(
    store: FleetStore, stored: str, column: str
) -> None:
    fleet = Fleet(store)
    if column == "last_seen":
        fleet.health()
    with store.transaction() as db:
        db.execute("UPDATE devices SET last_seen = ? WHERE last_seen IS NOT NULL", (stored,))
        db.execute("UPDATE keys SET added = ?", (stored,))
    fleet.run(DAY_S + 600 if column == "enrolled" else 600)
    assert fleet.messages() == [("silent", "raised")]
    fleet.run(600, monitor=IncidentMonitor(store))
    assert fleet.messages() == [("silent", "raised")]
    fleet.health()
    fleet.run(60)
    assert fleet.messages() == [("silent", "raised"), ("silent", "cleared")]


def test_a_device_that_never_sent_anything_is_warned_of_once_over_a_restart(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.at_s = DAY_S - 600
    fleet.run(1200)
    fleet.run(600, monitor=IncidentMonitor(store))
    assert fleet.messages() == [("silent", "raised")]


def test_a_collector_without_a_set_clock_calls_no_device_silent_that_sends(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(store)
    monkeypatch.setattr("tests.fleet.incidents.test_monitor.T0_US", 120_000_000)
    for _ in range(10):
        fleet.health(time="2026-11-24T22:00:00.000000Z")
        fleet.run(60)
    assert ("silent", "raised") not in fleet.messages()
    fleet.run(600)
    assert ("silent", "raised") in fleet.messages()


def test_devices_are_not_silent_because_the_collector_was_off(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.health()
    fleet.run(60)
    fleet.at_s += 8 * 3600
    fleet.run(200)
    assert fleet.open() == []
    fleet.at_s += 3600
    fleet.run(200, monitor=IncidentMonitor(store))
    assert fleet.open() == []


def test_devices_are_not_silent_because_the_collectors_clock_was_set(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.health()
    fleet.run(120)
    fleet.run(120, wall_step_s=30 * DAY_S)
    assert fleet.open() == []


def test_a_restarted_collector_raises_nothing_again_and_clears_what_is_over(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.health()
    fleet.run(600)
    fleet.run(900, monitor=IncidentMonitor(store))
    assert fleet.messages() == [("silent", "raised")]
    fleet.health()
    fleet.run(60, monitor=IncidentMonitor(store))
    assert fleet.messages() == [("silent", "raised"), ("silent", "cleared")]


def test_a_backlog_that_grows_is_reported_until_it_falls(store: FleetStore) -> None:
    fleet = Fleet(store)
    for i in range(12):
        fleet.health(outbox=200 + 20 * i)
        fleet.run(60)
    assert fleet.open() == [("pi-00", "backlog", "warning")]
    for i in range(12):
        fleet.health(outbox=400 - 20 * i)
        fleet.run(60)
    assert fleet.messages() == [("backlog", "raised"), ("backlog", "cleared")]


def test_a_large_backlog_that_shrinks_is_none(store: FleetStore) -> None:
    fleet = Fleet(store)
    for i in range(20):
        fleet.health(outbox=5000 - 100 * i)
        fleet.run(60)
    assert fleet.messages() == []


def test_a_backlog_from_before_a_device_joined_is_none_while_it_is_delivered(store: FleetStore) -> None:
    fleet = Fleet(store)
    for i in range(12):
        fleet.health(outbox=200 + 20 * i, ahead_s=-60.0 * (12 - i))
        fleet.run(1)
    fleet.run(60)
    assert "backlog" not in {
        incident.id.split("/")[-1] for incident in incidents.list_incidents(store, now=fleet.time())
    }


@pytest.mark.parametrize(("ahead_s", "words"), [(600.0, "ahead of"), (-7200.0, "behind")])
def test_a_wrong_clock_is_reported(store: FleetStore, ahead_s: float, words: str) -> None:
    fleet = Fleet(store)
    for _ in range(4):
        fleet.health(ahead_s=ahead_s)
        fleet.run(60)
    [incident] = incidents.list_incidents(store, now=fleet.time())
    assert incident.id == "collector/clock"
    assert words in incident.summary
    for _ in range(2):
        fleet.health()
        fleet.run(60)
    assert fleet.messages() == [("clock", "raised"), ("clock", "cleared")]


def test_messages_that_waited_do_not_make_the_clock_wrong(store: FleetStore) -> None:
    fleet = Fleet(store)
    fleet.at_s = 7200.0
    for i in range(10):
        # After an outage of two hours, ten health messages a minute arrive until none waits.
        fleet.health(ahead_s=-(7200.0 - 600.0 * i), outbox=1000 - 100 * i)
        fleet.run(60)
    assert fleet.messages() == []


def test_most_clocks_wrong_blame_the_collectors(store: FleetStore) -> None:
    fleet = Fleet(store, devices=5)
    for index in range(4):
        fleet.health(index, ahead_s=3600)
    fleet.health(4)
    fleet.run(60)
    assert fleet.open() == [("", "clock", "critical")]


def test_a_store_that_fills_up_becomes_critical_under_the_same_id(store: FleetStore) -> None:
    fleet = Fleet(store)
    for hours in (20.0, 30.0, 5.0, 40.0):
        fleet.health(store={"bytes": 1, "max": 2, "hours": hours})
        fleet.run(60)
        if hours == 30.0:
            assert fleet.open() == [("pi-00", "storage", "warning")]
    assert fleet.messages() == [("storage", "raised"), ("storage", "raised"), ("storage", "cleared")]
    [incident] = incidents.list_incidents(store, IncidentFilter(open=None), now=fleet.time())
    assert (incident.severity, incident.revision, incident.status) == ("critical", 2, "cleared")


def test_a_certificate_that_ends_is_reported(store: FleetStore) -> None:
    ends = [Certificate("pi-00", "device", Path("device.crt"), T0_US + round(20 * DAY_S * 1e6))]
    fleet = Fleet(store, certificates=lambda: list(ends))
    fleet.run(30)
    assert fleet.open() == [("pi-00", "certificate/device", "warning")]
    fleet.at_s += 15 * DAY_S
    fleet.run(30)
    assert fleet.open() == [("pi-00", "certificate/device", "critical")]
    ends.clear()
    fleet.at_s += DAY_S
    fleet.run(30)
    assert fleet.open() == []


def test_a_certificate_is_reported_soon_after_a_full_disk(store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [Certificate("pi-00", "device", Path("device.crt"), T0_US + round(20 * DAY_S * 1e6))]
    fleet = Fleet(store, certificates=lambda: ends)

    def refuse(*_: object) -> None:
        raise StorageFull("no space")

    with monkeypatch.context() as patch:
        patch.setattr(device_status, "add_collector_alerts", refuse)
        with pytest.raises(StorageFull):
            fleet.run(30)
    fleet.run(60)
    assert fleet.open() == [("pi-00", "certificate/device", "warning")]


def test_a_device_unlike_its_fleet_is_reported_after_two_surveys(
    store: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers, "SURVEY_INTERVAL_S", 300.0)
    fleet = Fleet(store, devices=8)

    def report(shift: float) -> None:
        span = {"from": fleet.time(fleet.at_s - 60), "to": fleet.time(), "index": 1, "rows": [1, 2000], "n": 2000}
        for i, sender in enumerate(fleet.senders):
            mean = (shift if i == 3 else 0.01 * i) + np.linspace(-1, 1, 2000)
            drift = window(sender, 0, {"ax": field(mean)}, window=span)
            fleet.arrive((sender, drift), (sender, sender.state("stopped")))

    report(3.0)
    fleet.run(200)
    assert fleet.open() == []
    fleet.run(400)
    [(device, name, severity)] = fleet.open()
    assert (device, name, severity) == ("pi-03", "outlier/exercise/ax", "warning")
    fleet.at_s += 7 * 3600
    report(0.03)
    fleet.run(900)
    assert fleet.messages() == [("outlier/exercise/ax", "raised"), ("outlier/exercise/ax", "cleared")]


def test_an_outlier_is_reported_soon_after_a_full_disk(store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(store, devices=8)
    span = {"from": fleet.time(-60), "to": fleet.time(), "index": 1, "rows": [1, 2000], "n": 2000}
    for i, sender in enumerate(fleet.senders):
        mean = (3.0 if i == 3 else 0.01 * i) + np.linspace(-1, 1, 2000)
        drift = window(sender, 0, {"ax": field(mean)}, window=span)
        fleet.arrive((sender, drift), (sender, sender.state("stopped")))

    def refuse(*_: object) -> None:
        raise StorageFull("no space")

    fleet.run(1700)
    with monkeypatch.context() as patch:
        patch.setattr(device_status, "add_collector_alerts", refuse)
        with pytest.raises(StorageFull):
            fleet.run(400)
    assert fleet.open() == []
    fleet.run(60)
    assert fleet.open() == [("pi-03", "outlier/exercise/ax", "warning")]


def test_a_survey_that_cannot_be_read_begins_again_soon(store: FleetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    survey, times = outliers.OutlierSurvey(store), list[float]()

    def refuse(_: FleetStore) -> None:
        times.append(at_s)
        raise StorageFull("no space")

    monkeypatch.setattr(outliers, "list_drift_tasks", refuse)
    for at_s in (0.0, 10.0, 31.0):
        with contextlib.suppress(StorageFull):
            survey.step(ClockReading(T0_US, at_s, "synced"))
    assert times == [0.0, 31.0]


def test_a_health_message_with_members_of_other_types_disturbs_nothing(store: FleetStore) -> None:
    fleet = Fleet(store, devices=2)
    fleet.health(0, outbox="many", store=[1])
    fleet.health(1)
    fleet.run(600)
    assert fleet.open() == [("pi-00", "silent", "critical"), ("pi-01", "silent", "critical")]


def test_the_newest_health_is_read_by_an_index(tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    with store.snapshot() as db:
        plan = " ".join(str(row[3]) for row in db.execute(f"EXPLAIN QUERY PLAN {device_status._STATUS}"))
    store.close()
    assert "health_messages" in plan
    assert "SCAN h" not in plan


def test_a_poll_of_a_thousand_devices_takes_a_fraction_of_a_second(tmp_path: Path) -> None:
    store = FleetStore(tmp_path / "fleet.db")
    fleet = Fleet(store, devices=1000)
    sent = [(s, s.append("health", streams={}, tasks={}, outbox=0, interval_s=60)) for s in fleet.senders]
    fleet.arrive(*sent)
    began = time.process_time()
    fleet.run(30)
    store.close()
    assert time.process_time() - began < 2.0


def test_refused_messages_are_raised_once_however_long_they_come_and_cleared_an_hour_later(store: FleetStore) -> None:
    fleet = Fleet(store)
    tasks = LeaderTasks(store, Keyring(store))
    refusal = Refusal("pi-00", "bad signature", "", "outstation/acme/pi-00/health", b"{}", "")

    def flood(seconds: float) -> None:
        end = fleet.at_s + seconds
        while fleet.at_s < end:
            store.ingest([], [refusal] * 30, fleet.time())
            tasks._refusal_alarm.add_count("pi-00", refusal.reason, 30, fleet.at_s + 1000)
            now = ClockReading(T0_US + round(fleet.at_s * 1e6), fleet.at_s + 1000, "synced")
            tasks._raise_alarms(now)
            fleet.run(300, monitor=tasks._incidents)

    flood(3 * 3600)
    assert [state for _, state in fleet.messages()] == ["raised"]
    fleet.run(3000, monitor=tasks._incidents)
    assert [state for _, state in fleet.messages()] == ["raised"]
    fleet.run(900, monitor=tasks._incidents)
    assert [state for _, state in fleet.messages()] == ["raised", "cleared"]
    assert fleet.open() == []


def test_of_two_collectors_the_leader_alone_raises_and_the_next_leader_clears(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [FleetStore(postgres_url), FleetStore(postgres_url)]
    fleet = Fleet(stores[0])
    both = [LeaderTasks(store, Keyring(store)) for store in stores]

    def turn(seconds: float, tasks: list[LeaderTasks]) -> None:
        for _ in range(round(seconds / 10)):
            fleet.at_s += 10
            now = ClockReading(T0_US + round(fleet.at_s * 1e6), fleet.at_s + 1000, "synced")
            monkeypatch.setattr(clock, "read", lambda moment=now: moment)
            for each in tasks:
                each.tick()

    fleet.health()
    turn(600, both)
    assert [each.is_leader for each in both] == [True, False]
    assert fleet.messages() == [("silent", "raised")]
    stores[0].close()
    fleet.store = stores[1]

    def takes_over() -> bool:
        both[1]._next_check_s = 0.0
        turn(10, both[1:])
        return both[1].is_leader

    # The server notices the end of a connection a moment later.
    wait_until("the other leads", takes_over)
    turn(60, both[1:])
    fleet.health()
    turn(60, both[1:])
    assert fleet.messages() == [("silent", "raised"), ("silent", "cleared")]
    stores[1].close()
