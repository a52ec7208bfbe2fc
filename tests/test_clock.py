"""Two clocks: what has passed since boot, and what time it is with how far that can be trusted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import clock

YEAR_1, YEAR_9999 = -62_135_596_800_000_000, 253_402_300_799_999_999


@given(st.integers(YEAR_1, YEAR_9999))
def test_a_time_survives_being_written_and_read(wall_us: int) -> None:
    assert clock.epoch_us(clock.rfc3339(wall_us)) == wall_us


def test_a_time_outside_the_calendar_is_written_all_the_same() -> None:
    assert clock.rfc3339(2**62).startswith("9999-12-31T23:59:59")
    assert clock.rfc3339(-(2**62)).startswith("0001-01-01T00:00:00")


def test_a_time_without_a_zone_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="time zone"):
        clock.epoch_us("2026-11-24T12:00:00")


def test_a_wall_clock_before_the_latest_time_known_to_have_passed_is_unsynced() -> None:
    assert clock.read(time.time_ns() // 1000 + 3_600_000_000).quality == "unsynced"
    assert clock.read(0).quality in ("synced", "restored")


def test_where_the_kernel_may_not_be_asked_timesyncds_marker_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clock, "_ADJTIMEX", lambda _: -1)
    monkeypatch.setattr(clock, "_TIMESYNCD", tmp_path / "synchronized")
    assert not clock.synced()
    (tmp_path / "synchronized").touch()
    assert clock.synced()


def test_the_boot_time_clock_goes_on_and_a_boot_has_an_id() -> None:
    before = clock.boot_seconds()
    assert clock.boot_seconds() >= before > 0
    assert len(clock.boot_id()) == 36
