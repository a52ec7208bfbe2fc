"""Schedules of tasks: an interval, a cron expression or a number of rows, on clocks that may be stepped.

Intervals use the boot-time clock. Cron needs wall time: APScheduler computes the next time, again after each step of
the wall clock. One run catches up on all missed times. For times that a cron expression missed while the daemon was
off, the time of the last run must be saved and passed to `CronSchedule`; of runs between two of its times, the first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Protocol

import msgspec

from outstation.foundation import clock
from outstation.foundation.clock import ClockReading

_STEP_US = 1_000_000
_MAX_WAIT_S = 60.0
# Least time between runs by row count, while a run pays more with more rows.
_GATHER_S = 0.1
_MAX_REPEATED_US = 3 * 3600 * 1_000_000
_TICK = timedelta(microseconds=1)
# A place that changes sides of the date line skips or repeats a day.
_LONGEST_CHANGE = timedelta(hours=25)
# crontab(5) counts from Sunday, APScheduler 3 from Monday: names are the same in both.
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_DAY_PATTERN = re.compile(
    rf"(\*|(?P<first>[0-7]|{'|'.join(_DAYS)})(-(?P<last>[0-7]|{'|'.join(_DAYS)}))?)(/(?P<step>[1-7]))?"
)


class Schedule(Protocol):
    @property
    def needs_last_run(self) -> bool:
        """True if the schedule that is made after a restart needs the wall time of the last run."""
        ...

    @property
    def counts_rows(self) -> bool:
        """True if rows that arrive can make the task due; otherwise time alone does."""
        ...

    def is_due(self, now: ClockReading, backlog: int, enough: int = 0) -> bool:
        """Return True if the task should run now, with `backlog` rows waiting.

        With fewer than `enough` rows, runs by row count keep a tenth of a second between them.
        """
        ...

    def record_run(self, now: ClockReading) -> bool:
        """Record that a run was started at `now`.

        Return True if its wall time must be saved: from the saved one, a restart would find another next time.
        """
        ...

    def wait_s(self, now: ClockReading) -> float:
        """Return how long `is_due` stays False unless rows arrive."""
        ...


class IntervalSchedule:
    """Schedule with a fixed interval in seconds; the first run is `delay_s` after the first look."""

    needs_last_run = counts_rows = False

    def __init__(self, seconds: float, delay_s: float = 0.0) -> None:
        self._seconds, self._delay_s = seconds, delay_s
        self._next: float | None = None

    def is_due(self, now: ClockReading, backlog: int, enough: int = 0) -> bool:
        if self._next is None and self._delay_s:
            self._next = now.boot_s + self._delay_s
        return self._next is None or now.boot_s >= self._next

    def record_run(self, now: ClockReading) -> bool:
        planned = now.boot_s if self._next is None else self._next
        missed = (now.boot_s - planned) // self._seconds
        self._next = planned + (missed + 1) * self._seconds
        return False

    def wait_s(self, now: ClockReading) -> float:
        return 0.0 if self._next is None else max(0.0, self._next - now.boot_s)


class RowCountSchedule:
    """Schedule that runs as soon as `rows` rows wait.

    Only a stream that fills `rows` more than ten times a second waits: runs of few rows then cost more than the rows.
    """

    needs_last_run, counts_rows = False, True

    def __init__(self, rows: int) -> None:
        """Raise ValueError for no rows, which wait at any time."""
        if rows < 1:
            raise ValueError("a number of rows must be positive")
        self._rows = rows
        self._last_run: float | None = None
        self._is_gathering = False

    def is_due(self, now: ClockReading, backlog: int, enough: int = 0) -> bool:
        is_reached = backlog >= self._rows
        self._is_gathering = is_reached and backlog < enough and self._gather_s(now) > 0
        return is_reached and not self._is_gathering

    def record_run(self, now: ClockReading) -> bool:
        self._last_run = now.boot_s
        return False

    def wait_s(self, now: ClockReading) -> float:
        return self._gather_s(now) if self._is_gathering else _MAX_WAIT_S

    def _gather_s(self, now: ClockReading) -> float:
        return 0.0 if self._last_run is None else max(0.0, self._last_run + _GATHER_S - now.boot_s)


class CronSchedule:
    """Schedule of a cron expression, in local time or in `zone`, as in crontab(5). Raises ValueError.

    When the clocks go back, a time with a fixed hour comes once; also when a wall clock is set back by less than three
    hours, as in Debian's cron(8). When they go forward, each time in the gap comes as if they had not, by the offset
    that was in force before (`fold=0` of PEP 495). No time is before `start` or at or after `end`; each run is
    `delay_us` after its time.
    """

    needs_last_run, counts_rows = True, False

    def __init__(
        self,
        expression: str,
        last_us: int | None = None,
        zone: tzinfo | None = None,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        delay_us: int = 0,
    ) -> None:
        # Imported here, 40 ms and several MB: only cron expressions need it.
        from apscheduler.triggers.cron import CronTrigger

        fields = expression.lower().split()
        if len(fields) != 5:
            raise ValueError(f"a cron expression has 5 fields, this has {len(fields)}")
        minute, hour, day, month, weekday = fields
        days = [(day, _parse_weekdays(weekday))]
        if not day.startswith("*") and not weekday.startswith("*"):
            # crontab(5): if both are given, either is enough.
            days = [(day, "*"), ("*", _parse_weekdays(weekday))]
        # APScheduler loses most times in a gap: the triggers compute local times without an offset, as UTC.
        self._triggers = [
            CronTrigger(minute=minute, hour=hour, day=d, month=month, day_of_week=w, timezone=UTC) for d, w in days
        ]
        self._zone: tzinfo = CronTrigger().timezone if zone is None else zone
        self._start: datetime | None = None
        self._has_fixed_hour = not hour.startswith("*")
        self._delay_us = delay_us
        self._end: datetime | None = None
        self._last = None if last_us is None else last_us - delay_us
        self._next: datetime | None = None
        self._last_now: ClockReading | None = None
        self._was_set_back = False
        if self._find_next(datetime(2024, 1, 1, tzinfo=UTC)) is None:
            raise ValueError("that time never comes")
        # After that check: a range that is over is no error, or a device could not start with it.
        self._start, self._end = start, end

    def is_due(self, now: ClockReading, backlog: int, enough: int = 0) -> bool:
        is_over = self.has_ended(now)
        now = self._shift(now)
        if is_over:
            # A time that nobody looked at before the end would else be waited for without a pause.
            self._next, self._last_now = None, now
            return False
        if self._next is None:
            self._next = self._find_next(self._search_start(now, catch_up=True))
        # Set back by less than the time since the last look, the clock repeats no time: the next time stays valid.
        elif self._last_now is not None and now.wall_us < self._last_now.wall_us - _STEP_US:
            self._next, self._was_set_back = self._find_next(self._search_start(now, catch_up=False)), True
        self._last_now = now
        return self._next is not None and clock.to_datetime(now.wall_us) >= self._next

    def record_run(self, now: ClockReading) -> bool:
        now = self._shift(now)
        # From a run saved before the clock was set back, a restart would find another time than this process.
        is_first, before = self._last is None or self._was_set_back, self._next
        self._was_set_back = False
        self._last = now.wall_us
        self._next = self._find_next(clock.to_datetime(now.wall_us + 1))
        return is_first or self._next != before

    def _search_start(self, now: ClockReading, *, catch_up: bool) -> datetime:
        """Return where the search for the next time starts: at the last run, to catch up on missed times."""
        if self._last is not None:
            ahead = self._last - now.wall_us
            # A last run far in the future was before a long step back: ignore it.
            if (ahead <= 0 and catch_up) or (self._has_fixed_hour and 0 < ahead < _MAX_REPEATED_US):
                return clock.to_datetime(self._last + 1)
        return clock.to_datetime(now.wall_us)

    def wait_s(self, now: ClockReading) -> float:
        if self._next is None:
            # No time is left before the end of the range; only a step of the clock can change that.
            return _MAX_WAIT_S if self._last_now is not None else 0.0
        now = self._shift(now)
        return min(_MAX_WAIT_S, max(0.0, (self._next - clock.to_datetime(now.wall_us)).total_seconds()))

    def has_ended(self, now: ClockReading) -> bool:
        return self._end is not None and clock.to_datetime(now.wall_us) >= self._end

    def _shift(self, now: ClockReading) -> ClockReading:
        """Return the reading as it was before the delay, so that each time comes later by it."""
        return msgspec.structs.replace(now, wall_us=now.wall_us - self._delay_us) if self._delay_us else now

    def _find_next(self, moment: datetime) -> datetime | None:
        """Return the first time at or after `moment`, UTC; None also within a day of where the calendar ends."""
        if self._start is not None:
            moment = max(moment, self._start)
        moment = moment.astimezone(UTC)
        try:
            times = [_next_fire_time(trigger, self._zone, moment, self._has_fixed_hour) for trigger in self._triggers]
        except OverflowError:
            # A broken hardware clock reads such years.
            return None
        return min(
            (time for time in times if time is not None and (self._end is None or time < self._end)), default=None
        )


class DateRangeSchedule:
    """Schedule that is due only from wall time `start` to before `end`; None leaves that side open."""

    def __init__(self, schedule: Schedule, start: datetime | None, end: datetime | None) -> None:
        self._schedule, self._start, self._end = schedule, start, end
        self.needs_last_run, self.counts_rows = schedule.needs_last_run, schedule.counts_rows

    def is_due(self, now: ClockReading, backlog: int, enough: int = 0) -> bool:
        return self._contains(now) and self._schedule.is_due(now, backlog, enough)

    def record_run(self, now: ClockReading) -> bool:
        return self._schedule.record_run(now)

    def wait_s(self, now: ClockReading) -> float:
        if self._contains(now):
            return self._schedule.wait_s(now)
        if self._start is None:
            return _MAX_WAIT_S
        until_start_s = (self._start - clock.to_datetime(now.wall_us)).total_seconds()
        return min(_MAX_WAIT_S, until_start_s) if until_start_s > 0 else _MAX_WAIT_S

    def _contains(self, now: ClockReading) -> bool:
        moment = clock.to_datetime(now.wall_us)
        return (self._start is None or moment >= self._start) and (self._end is None or moment < self._end)

    def has_ended(self, now: ClockReading) -> bool:
        return self._end is not None and clock.to_datetime(now.wall_us) >= self._end


class AnySchedule:
    """Schedule that is due when any of `schedules` is; a run counts for all of them."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = tuple(schedules)
        self.needs_last_run = any(schedule.needs_last_run for schedule in schedules)
        self.counts_rows = any(schedule.counts_rows for schedule in schedules)

    def is_due(self, now: ClockReading, backlog: int, enough: int = 0) -> bool:
        # Every schedule is queried: each keeps its last look for `wait_s`.
        due = [schedule.is_due(now, backlog, enough) for schedule in self._schedules]
        return any(due)

    def record_run(self, now: ClockReading) -> bool:
        # Every schedule records it.
        changed = [schedule.record_run(now) for schedule in self._schedules]
        return any(changed)

    def wait_s(self, now: ClockReading) -> float:
        return min(schedule.wait_s(now) for schedule in self._schedules)

    def has_ended(self, now: ClockReading) -> bool:
        return all(has_ended(schedule, now) for schedule in self._schedules)


def has_ended(schedule: Schedule, now: ClockReading) -> bool:
    """Return True if no run is left."""
    return isinstance(schedule, CronSchedule | DateRangeSchedule | AnySchedule) and schedule.has_ended(now)


def _next_fire_time(trigger: Any, zone: tzinfo, moment: datetime, fixed_hour: bool) -> datetime | None:
    """Return the first time of `trigger`, which computes local times as if they were UTC, at or after `moment`, UTC."""
    offsets = [
        _local_time(moment + days, zone) - moment - days for days in (-_LONGEST_CHANGE, timedelta(), _LONGEST_CHANGE)
    ]
    # Around a change of the clocks, local times are not in order: search as much earlier and later.
    change = max(offsets) - min(offsets)
    local, first = _local_time(moment, zone) - change, None
    while (local := trigger.get_next_fire_time(None, local)) is not None:
        if first is not None and local >= _local_time(first, zone) + change:
            break
        times = [time for time in _resolve(local, zone, fixed_hour) if time >= moment]
        first = min([*times, *([] if first is None else [first])], default=None)
        local += _TICK
    return first


def _resolve(local: datetime, zone: tzinfo, fixed_hour: bool) -> list[datetime]:
    """Return the times, UTC, of a local time: two where it comes twice, unless its hour is fixed."""
    times = [local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1)]
    comes_twice = times[0] < times[1]
    return times if comes_twice and not fixed_hour else times[:1]


def _local_time(time: datetime, zone: tzinfo) -> datetime:
    """Return the local time in `zone` as if it were UTC."""
    return time.astimezone(zone).replace(tzinfo=UTC, fold=0)


def _parse_weekdays(text: str) -> str:
    """Convert the weekday field of crontab(5), in which 0 and 7 are Sunday, to names. Raises ValueError."""
    if text == "*":
        return text
    days: list[int] = []
    for part in text.split(","):
        match = _DAY_PATTERN.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no weekday: 0-7, where 0 and 7 are Sunday, or mon, tue, …")
        first = _parse_day(match["first"] or "0")
        last = _parse_day(match["last"] or ("6" if "*" in part or match["step"] else match["first"]))
        if match["last"] == "7" or (last == 0 and first > 0):
            last = 7
        if last < first:
            raise ValueError(f"{part!r} runs backwards")
        days += range(first, last + 1, int(match["step"] or 1))
    return ",".join(_DAYS[day] for day in sorted({day % 7 for day in days}))


def _parse_day(text: str) -> int:
    return _DAYS.index(text) if text in _DAYS else int(text)
