"""Refusal alarm: refusals are counted by enrolled device, and an alert is due at most once an hour."""

from __future__ import annotations

from outstation.fleet.collector.refusal_alarm import ALERT_COOLDOWN_S, MAX_REFUSALS, UNENROLLED, WINDOW_S, RefusalAlarm
from outstation.fleet.database.ingest import Refusal

ENROLLED = frozenset({"pi-07", "pi-08"})


def refused(device: str = "pi-07", reason: str = "bad signature") -> Refusal:
    return Refusal(device, reason, "", "", b"", "")


def names(alarm: RefusalAlarm, boot_s: float) -> list[str]:
    return [name for name, _ in alarm.due_alerts(boot_s)]


def test_more_than_many_within_ten_minutes_are_due_and_no_fewer() -> None:
    alarm = RefusalAlarm()
    alarm.add_refusals([refused()] * MAX_REFUSALS, ENROLLED, 100.0)
    assert names(alarm, 100.0) == []
    alarm.add_refusals([refused(reason="unsigned"), refused("pi-08")], ENROLLED, 100.0 + WINDOW_S)
    [(name, count)] = alarm.due_alerts(100.0 + WINDOW_S)
    assert (name, count.n, count.last_reason, count.since_s) == ("pi-07", MAX_REFUSALS + 1, "unsigned", 100.0)


def test_what_comes_slowly_is_counted_anew() -> None:
    alarm = RefusalAlarm()
    for minute in range(1000):
        alarm.add_refusals([refused()], ENROLLED, 60.0 * minute)
        assert names(alarm, 60.0 * minute) == []


def test_names_that_nobody_enrolled_share_one_count() -> None:
    alarm = RefusalAlarm()
    alarm.add_refusals([refused(f"made-up-{i}") for i in range(10_000)], ENROLLED, 0.0)
    assert [(name, count.n) for name, count in alarm.due_alerts(0.0)] == [(UNENROLLED, 10_000)]
    assert len(alarm._counts) == 1


def test_after_an_alert_only_its_device_is_quiet_for_an_hour() -> None:
    alarm = RefusalAlarm()
    alarm.add_refusals([refused()] * 50, ENROLLED, 0.0)
    alarm.mark_raised("pi-07", 0.0)
    alarm.add_refusals([refused()] * 50 + [refused("pi-08")] * 50, ENROLLED, ALERT_COOLDOWN_S - 1)
    assert names(alarm, ALERT_COOLDOWN_S - 1) == ["pi-08"]
    assert names(alarm, ALERT_COOLDOWN_S) == ["pi-07", "pi-08"]
