"""Clock readings and their quality."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation import clock

YEAR_1, YEAR_9999 = -62_135_596_800_000_000, 253_402_300_799_999_999


@given(st.integers(YEAR_1, YEAR_9999))
def test_a_time_survives_being_written_and_read(wall_us: int) -> None:
    assert clock.parse_rfc3339(clock.to_rfc3339(wall_us)) == wall_us


def test_a_time_outside_the_calendar_is_written_all_the_same() -> None:
    assert clock.to_rfc3339(2**62).startswith("9999-12-31T23:59:59")
    assert clock.to_rfc3339(-(2**62)).startswith("0001-01-01T00:00:00")


def test_a_time_without_a_zone_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="time zone"):
        clock.parse_rfc3339("2026-11-24T12:00:00")


def test_a_wall_clock_before_a_known_time_is_unsynced() -> None:
    assert clock.read(time.time_ns() // 1000 + 3_600_000_000).quality == "unsynced"
    assert clock.read(0).quality in ("synced", "restored")


def test_timesyncds_marker_replaces_a_forbidden_adjtimex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clock, "_ADJTIMEX", lambda _: -1)
    monkeypatch.setattr(clock, "_TIMESYNCD_MARKER", tmp_path / "synchronized")
    assert clock.sync_error_us() is None
    (tmp_path / "synchronized").touch()
    assert clock.sync_error_us() is not None


def test_the_error_of_a_marker_grows_until_it_expires(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marker = tmp_path / "synchronized"
    marker.touch()
    monkeypatch.setattr(clock, "_ADJTIMEX", None)
    monkeypatch.setattr(clock, "_TIMESYNCD_MARKER", marker)
    now = time.time()
    for age_s, error_s in ((3600, 1.8), (-3600, 1.8), (12 * 3600, None)):
        os.utime(marker, (now - age_s, now - age_s))
        error = clock.sync_error_us()
        assert (error is None) == (error_s is None)
        assert error is None or error_s is None or abs(error / 1e6 - error_s) < 0.1


def test_a_clock_set_during_the_reading_is_not_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [None, 10]
    monkeypatch.setattr(clock, "sync_error_us", lambda: answers.pop(0))
    assert clock.read().quality == "restored"
    answers = [10, None]
    assert clock.read().quality == "restored"
    answers = [10, 20]
    assert (clock.read().quality, answers) == ("synced", [])


def test_the_boot_time_clock_goes_on_and_a_boot_has_an_id() -> None:
    before = clock.boot_seconds()
    assert clock.boot_seconds() >= before > 0
    assert len(clock.boot_id()) == 36
