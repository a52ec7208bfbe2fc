"""Text form of schedules: alternatives joined by `or`, each with a time zone, a date range and a jitter.

    "every 60 s"   "when 500 rows"   "30 3 * * *"   "every 10 min or when 500 rows"
    "30 3 * * * in Europe/Vienna from 2026-12-01 until 2027-02-28 jitter 20 min"

The jitter is a delay that a device draws once from its id, as FixedRandomDelay= of systemd.timer(5): a fleet is spread
over it, and each device keeps its beat.
"""

from __future__ import annotations

import hashlib
import re
from datetime import date, datetime, timedelta, tzinfo

from outstation.device import config
from outstation.device.machine.schedule import (
    AnySchedule,
    CronSchedule,
    DateRangeSchedule,
    IntervalSchedule,
    RowCountSchedule,
    Schedule,
)
from outstation.foundation.errors import ConfigError

_CLAUSE = re.compile(r"\s+(in|from|until|jitter)\s+")
_HINT = 'write "every 60 s", "when 500 rows" or a cron expression such as "30 3 * * *"'


def parse(file: str, task: str, text: str, last_us: int | None = None, device: str = "") -> Schedule:
    """Parse the text form of a schedule; cron and dates are in local time without a zone. Raises ConfigError.

    `last_us` is the wall time of the last run before this start, epoch µs, if known. `device` and `task` choose the
    delay within a jitter.
    """
    seed = f"{device}/{task}"
    try:
        schedules = [_parse_alternative(part, last_us, seed) for part in re.split(r"\s+or\s+", text)]
    except ValueError as error:
        raise ConfigError(file, f"tasks.{task}.schedule", f"{text!r}: {error}; {_HINT}") from None
    return schedules[0] if len(schedules) == 1 else AnySchedule(schedules)


def _parse_alternative(text: str, last_us: int | None, seed: str) -> Schedule:
    """Parse one trigger with its clauses. Raises ValueError."""
    trigger, *rest = _CLAUSE.split(text)
    clauses = dict(zip(rest[::2], rest[1::2], strict=True))
    if len(clauses) < len(rest) // 2:
        raise ValueError("in, from, until and jitter may each come once")
    zone = _parse_zone(clauses["in"]) if "in" in clauses else None
    start = _parse_moment(clauses["from"], zone, timedelta(0)) if "from" in clauses else None
    end = _parse_moment(clauses["until"], zone, timedelta(days=1)) if "until" in clauses else None
    if start is not None and end is not None and start >= end:
        raise ValueError("the range from … until … ends before it begins")
    delay_s = _draw_delay(config.parse_duration(clauses["jitter"]), seed) if "jitter" in clauses else 0.0
    is_interval, row_count = trigger.startswith("every "), re.fullmatch(r"when (\d+) rows?", trigger)
    if not is_interval and row_count is None:
        delay_us = round(delay_s * 1e6)
        return CronSchedule(trigger, last_us, zone, start=start, end=end, delay_us=delay_us)
    if row_count is not None and "jitter" in clauses:
        raise ValueError("a number of rows has no time that a jitter could delay")
    if zone is not None and start is None and end is None:
        raise ValueError("a time zone belongs to a cron expression or to dates")
    schedule: Schedule
    if row_count is not None:
        schedule = RowCountSchedule(int(row_count[1]))
    else:
        seconds = config.parse_duration(trigger.removeprefix("every "))
        if seconds <= 0:
            raise ValueError("an interval must be positive")
        schedule = IntervalSchedule(seconds, delay_s)
    if start is None and end is None:
        return schedule
    return DateRangeSchedule(schedule, start, end)


def _parse_zone(name: str) -> tzinfo:
    # Imported here: only schedules with a zone need the time zone database.
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{name!r} is no time zone here; write one as Europe/Vienna, or install tzdata") from None


def _parse_moment(text: str, zone: tzinfo | None, whole_day: timedelta) -> datetime:
    """Parse a date or `2026-12-01T18:00`, in `zone` or local time; a date alone is its start plus `whole_day`."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            day = date.fromisoformat(text) + whole_day
            moment = datetime(day.year, day.month, day.day)
        elif re.fullmatch(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?", text):
            moment = datetime.fromisoformat(text)
        else:
            raise ValueError
        # Local time is what the machine's zone says of that day, not its offset of today.
        return moment.replace(tzinfo=zone) if zone is not None else moment.astimezone()
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text!r} is no date: write 2026-12-01 or 2026-12-01T18:00") from None


def _draw_delay(most_s: float, seed: str) -> float:
    """Return a delay below `most_s` seconds, the same each time for `seed`."""
    drawn = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6], "big")
    return most_s * drawn / 2**48
