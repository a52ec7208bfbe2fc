"""Timekeeping: anchors for everything the clocks do, one alert, and a floor that no error raises for good."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.machine import timekeeping
from outstation.device.machine.timekeeping import FLOOR, SYNCED, is_plausible_time, make_clock
from outstation.device.store import clock_segments
from outstation.device.store.clock_segments import ANCHORED_LOG, ClockSegments, ClockStamp
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.protocol.wire.messages import AlertPayload, AuditPayload
from tests.kit.clocks import TRUE_START_US, Station

S = 1_000_000
HOUR, DAY = 3600 * S, 86_400 * S


@pytest.fixture
def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Station]:
    made = Station(tmp_path, monkeypatch)
    yield made
    made.stop()


def anchors(station: Station) -> list[dict[str, Any]]:
    return [item.body.evidence for item in station.messages() if isinstance(item.body, AuditPayload)]


def alerts(station: Station) -> list[tuple[str, str]]:
    return [(item.body.state, item.body.summary) for item in station.messages() if isinstance(item.body, AlertPayload)]


def turns(station: Station, seconds: float, each_s: float = 5.0) -> None:
    """The main loop goes round for a while."""
    for _ in range(round(seconds / each_s)):
        station.machine.true_us += each_s * S
        station.turn()


def test_anchors_at_start_step_synchronization_and_daily(station: Station) -> None:
    turns(station, 60)
    station.machine.set(-HOUR)
    turns(station, 60)
    station.machine.set(60 * DAY)
    turns(station, 60)
    station.machine.sync(0)
    turns(station, 60)
    turns(station, 90_000, 300.0)
    result = anchors(station)
    assert [item["why"] for item in result] == ["start", "step", "step", "step", "daily"]
    assert [item["segment"] for item in result] == [1, 2, 3, 1, 1]
    assert [round(item["step_us"] / S) for item in result] == [0, -3600, 60 * 86_400, -60 * 86_400 + 3600, 0]
    assert [item["quality"] for item in result] == ["synced", "restored", "restored", "synced", "synced"]
    assert timekeeping.count_steps(station.store) == 3


def test_what_is_slewed_is_no_step(station: Station) -> None:
    turns(station, 10)
    station.machine.set(400_000, "synced")
    turns(station, 10)
    assert len(anchors(station)) == 1


def test_a_flapping_time_service_does_not_fill_the_log(station: Station) -> None:
    for second in range(1800):
        station.machine.true_us += S
        station.machine.quality = "synced" if second % 2 else "restored"
        station.turn()
    assert len(anchors(station)) <= 1 + 1800 / 60


def test_a_clock_set_just_before_its_synchronization_gets_an_anchor(station: Station) -> None:
    station.machine.quality = "unsynced"
    turns(station, 10)
    station.machine.set(3_600_000_000, "unsynced")
    turns(station, 1, each_s=0.5)
    station.machine.quality = "synced"
    turns(station, 1, each_s=0.5)
    assert [item["quality"] for item in anchors(station)] == ["unsynced", "unsynced", "synced"]


def test_a_clock_pulled_to_and_fro_makes_two_segments(station: Station) -> None:
    for second in range(100):
        station.machine.true_us += S
        station.machine.set(HOUR if second % 2 else -HOUR)
        station.turn()
    assert {item["segment"] for item in anchors(station)} == {1, 2}


def test_a_restart_continues_its_segment_and_a_boot_begins_at_one(station: Station) -> None:
    station.turn()
    station.machine.set(-HOUR)
    station.turn()
    station.stop()
    station.machine.true_us += 60 * S
    station.start()
    station.turn()
    station.stop()
    station.machine.reboot(60, 0)
    station.start()
    station.turn()
    assert [(item["boot"], item["segment"], item["step_us"]) for item in anchors(station)] == [
        (1, 1, 0),
        (1, 2, -HOUR),
        (1, 2, 0),
        (2, 1, 0),
    ]


def test_a_step_while_the_daemon_was_down_is_seen_at_its_start(station: Station) -> None:
    station.turn()
    station.stop()
    station.machine.set(2 * HOUR)
    station.start()
    station.turn()
    assert anchors(station)[-1]["step_us"] == 2 * HOUR


def test_the_first_anchor_of_a_boot_says_how_far_the_last_one_got(station: Station) -> None:
    station.turn()
    station.machine.true_us += 500 * S
    station.stamp()
    station.commit()
    last = station.machine.boot_us
    station.stop()
    station.machine.reboot(60, 0)
    station.start()
    station.turn()
    assert anchors(station)[-1]["before"] == {"boot": 1, "boot_us": last}


def test_segments_of_boots_without_rows_are_deleted(station: Station) -> None:
    for _ in range(5):
        station.turn()
        station.stop()
        station.machine.reboot(60, 0)
        station.start()
    station.turn()
    with contextlib.closing(sqlite3.connect(f"file:{station.store.path}?mode=ro", uri=True)) as db:
        boots = [row[0] for row in db.execute("SELECT boot FROM clock_segments ORDER BY boot")]
    db.close()
    assert boots == [5, 6]


def test_a_new_log_gets_anchors_of_all_stored_segments(station: Station) -> None:
    station.machine.set(-HOUR)
    station.turn()
    station.stamp()
    station.commit()
    with station.store.transaction() as tx:
        tx.set_meta(ANCHORED_LOG, "another")
    station.stop()
    station.start()
    station.machine.sync(0)
    station.turn()
    assert [item["segment"] for item in anchors(station)] == [1, 1, 2]


def test_an_unsynced_clock_raises_one_alert_until_synchronized(station: Station) -> None:
    station.machine.reboot(60, 0)
    station.stop()
    station.start()
    turns(station, 100)
    assert alerts(station) == []
    turns(station, 3600)
    [(state, summary)] = alerts(station)
    assert state == "raised"
    assert "no time service has set it" in summary
    station.stop()
    station.start()
    turns(station, 600)
    station.machine.sync(0)
    turns(station, 600)
    assert [state for state, _ in alerts(station)] == ["raised", "cleared"]


def test_a_step_of_a_synchronized_clock_raises_an_alert_for_a_while(station: Station) -> None:
    turns(station, 20)
    station.machine.set(60 * DAY, "synced")
    turns(station, 20)
    [(state, summary)] = alerts(station)
    assert (state, "+5184000.0 s" in summary) == ("raised", True)
    turns(station, 900)
    assert [state for state, _ in alerts(station)] == ["raised", "cleared"]


def test_a_step_says_if_the_clock_was_and_is_synchronized(station: Station, caplog: pytest.LogCaptureFixture) -> None:
    turns(station, 20)
    station.machine.set(HOUR, "restored")
    turns(station, 5)
    station.machine.sync(0)
    turns(station, 20)
    station.machine.quality = "restored"
    turns(station, 10)
    caplog.clear()
    station.machine.set(HOUR, "synced")
    turns(station, 5)
    station.machine.set(HOUR, "synced")
    turns(station, 5)
    assert [text for text in caplog.messages if "synchroni" in text] == [
        "The clock was set by +3600.0 s although it was synchronized."
    ]
    [(_, lost), *_] = alerts(station)
    assert lost == "The clock was set by +3600.0 s and lost its synchronization."


def test_a_clock_that_is_stepped_all_day_raises_an_alert_an_hour_at_most(station: Station) -> None:
    for _ in range(12 * 4):
        station.machine.set(HOUR, "synced")
        turns(station, 900, 60.0)
    assert 1 < len([state for state, _ in alerts(station) if state == "raised"]) <= 13


def test_a_full_store_delays_the_anchor(monkeypatch: pytest.MonkeyPatch, station: Station) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("full")

    with monkeypatch.context() as patch:
        patch.setattr(station.store, "transaction", full)
        station.keeper.tick(station.machine.now)
    turns(station, 20)
    assert [item["why"] for item in anchors(station)] == ["start"]


# --- floors


def reading(monkeypatch: pytest.MonkeyPatch, wall_us: int, error_us: int | None) -> None:
    monkeypatch.setattr(clock, "_read_both_clocks", lambda: (wall_us, 1000.0))
    monkeypatch.setattr(clock, "sync_error_us", lambda: error_us)


def test_an_error_of_two_years_ends_with_the_next_synchronization(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    station.machine.sync(0)
    station.machine.offset_us += 730 * DAY
    station.turn()
    assert int(station.store.get_meta(SYNCED, "0")) > TRUE_START_US + 700 * DAY
    reading(monkeypatch, TRUE_START_US, None)
    assert make_clock(station.store)().quality == "unsynced"
    reading(monkeypatch, TRUE_START_US, 10)
    assert make_clock(station.store)().quality == "synced"
    station.machine.sync(0)
    station.turn()
    reading(monkeypatch, TRUE_START_US + DAY, None)
    assert make_clock(station.store)().quality == "restored"


def test_a_time_before_the_floor_is_unsynced_unless_synchronized(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    with station.store.transaction() as tx:
        tx.raise_time_floor(TRUE_START_US)
    reading(monkeypatch, TRUE_START_US - 1, None)
    assert make_clock(station.store)().quality == "unsynced"
    reading(monkeypatch, TRUE_START_US - 1, 10)
    assert make_clock(station.store)().quality == "synced"
    assert int(station.store.get_meta(FLOOR, "0")) == TRUE_START_US


def test_a_time_before_the_build_is_unsynced_even_if_synchronized(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wall_us in (0, clock.BUILD_FLOOR_US - 1):
        reading(monkeypatch, wall_us, 10)
        assert make_clock(station.store)().quality == "unsynced"


def test_a_synchronization_undoes_a_floor_ten_years_ahead(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    station.machine.quality = "restored"
    turns(station, 60)
    with station.store.transaction() as tx:
        tx.raise_time_floor(TRUE_START_US + 3650 * DAY)
    reading(monkeypatch, round(station.machine.true_us), None)
    assert make_clock(station.store)().quality == "unsynced"
    station.machine.quality = "unsynced"
    turns(station, 70)
    reading(monkeypatch, round(station.machine.true_us), 10)
    assert make_clock(station.store)().quality == "synced"
    station.machine.sync(0)
    turns(station, 10)
    [(state, summary)] = alerts(station)
    assert (state, "The collector's time was" in summary) == ("raised", True)
    turns(station, 900)
    assert [state for state, _ in alerts(station)] == ["raised", "cleared"]
    # The time service falls silent again, and the floor is no longer in the way.
    reading(monkeypatch, round(station.machine.true_us), None)
    assert make_clock(station.store)().quality == "restored"


def test_a_floor_less_than_a_day_ahead_stays(station: Station) -> None:
    with station.store.transaction() as tx:
        tx.raise_time_floor(TRUE_START_US + HOUR)
    station.machine.sync(0)
    turns(station, 60)
    assert int(station.store.get_meta(FLOOR, "0")) == TRUE_START_US + HOUR
    assert alerts(station) == []


def test_a_collector_a_day_ahead_does_not_raise_the_floor() -> None:
    synced, restored = ClockReading(TRUE_START_US, 1.0, "synced", 10), ClockReading(TRUE_START_US, 1.0, "restored")
    assert not is_plausible_time(TRUE_START_US + 2 * DAY, synced)
    assert is_plausible_time(TRUE_START_US + HOUR, synced)
    assert is_plausible_time(TRUE_START_US + 2 * DAY, restored)


def test_a_floor_raised_while_the_daemon_runs_counts_within_a_minute(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(clock, "_read_both_clocks", lambda: (TRUE_START_US, now_s))
    monkeypatch.setattr(clock, "boot_seconds", lambda: now_s)
    monkeypatch.setattr(clock, "sync_error_us", lambda: None)
    now = make_clock(station.store)
    assert now().quality == "restored"
    with station.store.transaction() as tx:
        tx.raise_time_floor(TRUE_START_US + DAY)
    now_s += 61
    assert now().quality == "unsynced"


# --- which rows


RUNS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=8)


@given(RUNS, st.integers(1, 40), st.integers(1, 40))
def test_clipped_stamps_agree_with_all_stamps(runs: list[tuple[int, int]], first: int, last: int) -> None:
    stamps: list[ClockStamp] = []
    of_row: dict[int, int] = {}
    row = 1
    for n, segment in runs:
        stamps.append(ClockStamp(row, 1, segment, 0))
        of_row |= dict.fromkeys(range(row, row + n), segment)
        row += n
    first = min(first, row - 1)
    last = max(first, min(last, row - 1))
    inside = clock_segments.clip_stamps(clock_segments.merge_stamps(stamps), first, last)
    assert inside[0].first == first
    for number in range(first, last + 1):
        [*_, result] = [stamp for stamp in inside if stamp.first <= number]
        assert result.segment == of_row[number]
    assert all(a.segment != b.segment for a, b in pairwise(inside))


def test_a_producer_that_mixes_times_at_will_gets_no_chunk_for_each_row(station: Station) -> None:
    station.turn()
    for i in range(1000):
        station.machine.true_us += 1000
        station.stamp(None if i % 2 else 1_700_000_000.0)
    station.commit()
    with contextlib.closing(sqlite3.connect(f"file:{station.store.path}?mode=ro", uri=True)) as db:
        [(chunks, rows)] = db.execute("SELECT count(*), sum(n) FROM chunks").fetchall()
        given_too = db.execute("SELECT segment FROM chunks ORDER BY id DESC LIMIT 1").fetchone()
    db.close()
    assert (chunks, rows, given_too) == (64, 1000, (0,))


def test_rows_stamped_before_a_step_keep_their_segment(
    station: Station,
) -> None:
    station.turn()
    station.stamp()
    station.machine.set(-HOUR)
    station.machine.true_us += S
    station.turn()
    station.commit()
    batch = station.store.read_rows("watch", station.conf.streams["watch"].fields, 0, 10)
    assert batch is not None
    assert [(stamp.segment, stamp.quality) for stamp in batch.stamps] == [(1, 0)]
    with station.store.transaction() as tx:
        assert isinstance(tx.segments, ClockSegments)
        assert tx.segments.observe(station.machine.now).number == 2


def test_health_and_status_report_the_clock(station: Station) -> None:
    station.turn()
    station.machine.set(-HOUR)
    station.machine.true_us += S
    station.turn()
    text = timekeeping.build_report(station.store, station.machine.now)
    assert (text["boot"], text["boot_us"], text["steps"], text["error_us"]) == (1, station.machine.boot_us, 1, None)
    assert text["synced"] == clock.to_rfc3339(TRUE_START_US)
    assert text["floor"] == clock.to_rfc3339(clock.BUILD_FLOOR_US)
