"""Schedules: one run for each due time, whatever the wall clock does and however long nobody looks."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.machine.schedule import CronSchedule, IntervalSchedule, RowCountSchedule, Schedule
from outstation.device.machine.schedule_text import parse
from outstation.foundation.clock import ClockReading, parse_rfc3339
from outstation.foundation.errors import ConfigError

VIENNA = ZoneInfo("Europe/Vienna")
HOUR, DAY, YEAR = 3600.0, 86_400.0, 365 * 86_400.0
START = datetime(2026, 3, 10, 12, 0, 0, 1, VIENNA)  # a Tuesday


class Machine:
    """Both clocks of a machine; `run` queries the schedule as often as `wait_s` says, and returns when it ran."""

    def __init__(self, wall: datetime = START, zone: ZoneInfo = VIENNA) -> None:
        self.wall, self.zone = wall.astimezone(UTC), zone
        self.boot_s = 1000.0
        self.query_count = 0

    @property
    def now(self) -> ClockReading:
        return ClockReading(round(self.wall.timestamp() * 1e6), self.boot_s, "synced")

    def local(self) -> str:
        return f"{self.wall.astimezone(self.zone):%a %m-%d %H:%M%z}"

    def sleep(self, seconds: float) -> None:
        self.boot_s += seconds
        self.wall += timedelta(seconds=seconds)

    def step(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self.wall += timedelta(seconds=seconds)

    def run(self, task: Schedule, seconds: float, backlog: int = 0) -> list[str]:
        """`seconds` of the daemon's loop: like it, look again at least every 5 minutes."""
        ran, end = [], self.boot_s + seconds
        while self.boot_s <= end:
            self.query_count += 1
            if task.is_due(self.now, backlog):
                task.record_run(self.now)
                ran.append(self.local())
            self.sleep(max(0.001, min(300.0, task.wait_s(self.now))))
        return ran


def test_an_interval_runs_at_once_and_then_once_each_time() -> None:
    machine = Machine()
    assert len(machine.run(IntervalSchedule(60), 600)) == 11
    assert machine.query_count <= 24


@pytest.mark.parametrize("step", [-HOUR, 60 * DAY, 2 * YEAR, -50 * YEAR])
def test_a_step_of_the_wall_clock_does_not_affect_an_interval(step: float) -> None:
    task, machine = IntervalSchedule(60), Machine()
    assert len(machine.run(task, 299)) == 5
    machine.step(step)
    machine.query_count = 0
    assert len(machine.run(task, 299)) == 5
    assert machine.query_count <= 12


@pytest.mark.parametrize(("back_s", "again"), [(2.0, 0), (HOUR, 0), (4 * HOUR, 1)])
def test_a_clock_set_back_repeats_a_nightly_run_only_after_hours(back_s: float, again: int) -> None:
    machine = Machine(datetime(2026, 11, 25, 3, 29, tzinfo=VIENNA))
    task = CronSchedule("30 3 * * *", zone=VIENNA)
    assert machine.run(task, 120) == ["Wed 11-25 03:30+0100"]
    machine.step(-back_s)
    assert len(machine.run(task, 8 * HOUR)) == again
    machine.run(task, 24 * HOUR)
    restarted = CronSchedule("30 3 * * *", round(machine.wall.timestamp() * 1e6), VIENNA)
    machine.step(-back_s)
    assert len(machine.run(restarted, 60)) == 0


def test_a_clock_set_back_just_before_a_due_time_misses_no_run() -> None:
    machine = Machine(datetime(2026, 11, 25, 3, 29, 59, tzinfo=VIENNA))
    task = CronSchedule("30 3 * * *", zone=VIENNA)
    assert not task.is_due(machine.now, 0)
    machine.step(-4.0)
    machine.sleep(6.0)
    assert len(machine.run(task, 60)) == 1


def test_a_clock_set_back_repeats_the_runs_of_an_hourly_task() -> None:
    machine = Machine(datetime(2026, 11, 25, 3, 29, tzinfo=VIENNA))
    task = CronSchedule("30 * * * *", zone=VIENNA)
    assert len(machine.run(task, 120)) == 1
    machine.step(-HOUR)
    assert machine.run(task, 2 * HOUR) == ["Wed 11-25 03:30+0100", "Wed 11-25 04:30+0100"]


def test_a_missed_interval_is_caught_up_once_and_keeps_its_phase() -> None:
    task, machine = IntervalSchedule(60), Machine()
    machine.run(task, 0)
    machine.boot_s = 1000.0 + 60_030
    assert task.is_due(machine.now, 0)
    task.record_run(machine.now)
    assert not task.is_due(machine.now, 0)
    assert task.wait_s(machine.now) == 30


@given(st.integers(1, 1000), st.lists(st.integers(0, 10_000), min_size=1, max_size=30))
def test_an_interval_runs_at_most_once_between_two_of_its_beats(seconds: int, pauses: list[int]) -> None:
    task, boot, beats = IntervalSchedule(seconds), 0, []
    for pause in pauses:
        boot += pause
        now = ClockReading(0, float(boot), "unsynced")
        if task.is_due(now, 0):
            task.record_run(now)
            beats.append((boot - pauses[0]) // seconds)
    assert beats == sorted(set(beats))
    assert beats[0] == 0


def test_a_number_of_rows_is_due_while_that_many_wait() -> None:
    task, now = RowCountSchedule(500), Machine().now
    assert [task.is_due(now, backlog) for backlog in (0, 499, 500, 10_000)] == [False, False, True, True]
    task.record_run(now)
    assert task.is_due(now, 500)
    assert not task.is_due(now, 3)
    assert task.wait_s(now) > 0


def test_a_cron_expression_does_not_run_before_its_first_time() -> None:
    task = CronSchedule("30 12 * * *", zone=VIENNA)
    assert Machine().run(task, 1700) == []
    assert Machine().run(CronSchedule("30 12 * * *", zone=VIENNA), 2 * DAY) == [
        "Tue 03-10 12:30+0100",
        "Wed 03-11 12:30+0100",
    ]


@pytest.mark.parametrize("wall", [datetime.min, datetime(1, 1, 2), datetime(9999, 12, 31), datetime.max])
@pytest.mark.parametrize("fields", ["30 12 * * *", "*/5 * * * *", "0 3 29 2 *"])
def test_a_broken_clock_at_either_end_of_the_calendar_starts_no_run_and_no_error(fields: str, wall: datetime) -> None:
    broken = ClockReading(parse_rfc3339(f"{wall.isoformat()}+00:00"), 1.0, "unsynced")
    task = CronSchedule(fields, zone=VIENNA)
    assert not task.is_due(broken, 0)
    task.record_run(broken)
    assert not task.is_due(broken, 0)
    assert task.wait_s(broken) > 0
    restarted = CronSchedule(fields, broken.wall_us, VIENNA)
    assert not restarted.is_due(broken, 0)


def test_a_clock_that_returns_from_the_end_of_the_calendar_misses_no_later_run() -> None:
    task, machine = CronSchedule("30 12 * * *", zone=VIENNA), Machine()
    assert not task.is_due(ClockReading(parse_rfc3339("9999-12-31T23:59:59.999999Z"), 1.0, "unsynced"), 0)
    assert machine.run(task, 2 * DAY) == ["Tue 03-10 12:30+0100", "Wed 03-11 12:30+0100"]


@pytest.mark.parametrize(
    ("weekday", "days"),
    [
        ("0", "Sun Sun"),
        ("7", "Sun Sun"),
        ("sun", "Sun Sun"),
        ("1", "Mon Mon"),
        ("1-5", "Tue Wed Thu Fri Mon Tue Wed Thu Fri Mon"),
        ("mon-fri", "Tue Wed Thu Fri Mon Tue Wed Thu Fri Mon"),
        ("FRI-SUN", "Fri Sat Sun Fri Sat Sun"),
        ("6-7", "Sat Sun Sat Sun"),
        ("5-7", "Fri Sat Sun Fri Sat Sun"),
        ("0,3", "Wed Sun Wed Sun"),
        ("*/2", "Tue Thu Sat Sun Tue Thu Sat Sun"),
    ],
)
def test_weekdays_are_those_of_crontab_where_zero_is_sunday(weekday: str, days: str) -> None:
    ran = Machine().run(CronSchedule(f"0 13 * * {weekday}", zone=VIENNA), 14 * DAY - HOUR)
    assert " ".join(time[:3] for time in ran) == days


def test_a_day_of_the_month_and_a_weekday_are_either_enough_as_in_crontab() -> None:
    ran = Machine().run(CronSchedule("0 13 13 * mon", zone=VIENNA), 10 * DAY)
    assert ran == ["Fri 03-13 13:00+0100", "Mon 03-16 13:00+0100"]


def test_where_the_clocks_go_forward_a_time_in_the_gap_comes_once() -> None:
    machine = Machine(datetime(2026, 3, 28, 12, tzinfo=VIENNA))
    ran = machine.run(CronSchedule("30 2 * * *", zone=VIENNA), 2 * DAY)
    assert ran == ["Sun 03-29 03:30+0200", "Mon 03-30 02:30+0200"]


def test_where_the_clocks_go_back_a_time_that_comes_twice_runs_once() -> None:
    machine = Machine(datetime(2026, 10, 24, 12, tzinfo=VIENNA))
    ran = machine.run(CronSchedule("30 2 * * *", zone=VIENNA), 2 * DAY)
    assert ran == ["Sun 10-25 02:30+0200", "Mon 10-26 02:30+0100"]


# Place, the day before a change of its clocks, and the gap or the hour that comes twice.
GAPS = [
    ("Europe/Vienna", datetime(2026, 3, 28), "29 03:00 03:15 03:30 03:45"),
    ("America/New_York", datetime(2026, 3, 7), "08 03:00 03:15 03:30 03:45"),
    # Half an hour is skipped: the other half comes at the same times.
    ("Australia/Lord_Howe", datetime(2026, 10, 3), "04 02:30 02:45"),
    # A whole day is skipped.
    ("Pacific/Apia", datetime(2011, 12, 29), "31 02:00 02:15 02:30 02:45"),
]


@pytest.mark.parametrize(("place", "day", "times"), GAPS)
def test_each_time_of_an_hour_that_is_skipped_comes_after_the_gap(place: str, day: datetime, times: str) -> None:
    zone = ZoneInfo(place)
    machine = Machine((day + timedelta(hours=12)).replace(tzinfo=zone), zone)
    ran = machine.run(CronSchedule("*/15 2 * * *", zone=zone), DAY)
    expected_day, *expected = times.split()
    assert [time[7:15] for time in ran] == [f"{expected_day} {time}" for time in expected]


@pytest.mark.parametrize(("place", "day"), [("America/Santiago", (2026, 9, 5)), ("Africa/Cairo", (2026, 4, 23))])
def test_midnight_that_is_skipped_comes_after_the_gap(place: str, day: tuple[int, int, int]) -> None:
    zone = ZoneInfo(place)
    for expression, count in (("*/15 0 * * *", 4), ("30 0 * * *", 1), ("0 */2 * * *", 13)):
        machine = Machine(datetime(*day, 12, tzinfo=zone), zone)
        ran = machine.run(CronSchedule(expression, zone=zone), DAY)
        assert len(ran) == count
        assert any(time[9:12] == " 01" for time in ran)


@pytest.mark.parametrize(
    ("place", "day", "hour"),
    [
        ("Europe/Vienna", (2026, 10, 24), 2),
        ("America/New_York", (2026, 10, 31), 1),
        ("America/Santiago", (2026, 4, 4), 23),
        ("Africa/Cairo", (2026, 10, 29), 23),
        ("Atlantic/Azores", (2026, 10, 24), 0),
    ],
)
def test_an_hour_that_comes_twice_runs_a_fixed_hour_once_and_any_hour_twice(
    place: str, day: tuple[int, int, int], hour: int
) -> None:
    zone = ZoneInfo(place)
    counts = []
    for expression in (f"*/15 {hour} * * *", "*/15 * * * *"):
        machine = Machine(datetime(*day, 12, 1, tzinfo=zone), zone)
        ran = machine.run(CronSchedule(expression, zone=zone), DAY)
        counts.append(sum(int(time[10:12]) == hour for time in ran))
        assert len({time[10:] for time in ran}) == len(ran)
    assert counts == [4, 8]


@pytest.mark.parametrize("day", [datetime(2026, 3, 28, 12, tzinfo=VIENNA), datetime(2026, 10, 24, 12, tzinfo=VIENNA)])
def test_each_hour_comes_once_over_a_change_of_the_clocks(day: datetime) -> None:
    machine = Machine(day + timedelta(minutes=1))
    assert len(machine.run(CronSchedule("0 * * * *", zone=VIENNA), DAY)) == 24


@pytest.mark.parametrize(("step", "runs"), [(-HOUR, 3), (HOUR, 4), (60 * DAY, 4), (2 * YEAR, 4), (-60 * DAY, 3)])
def test_after_a_clock_step_cron_catches_up_with_one_run_at_most(step: float, runs: int) -> None:
    task, machine = CronSchedule("30 * * * *", zone=VIENNA), Machine()
    assert len(machine.run(task, 2 * HOUR - 60)) == 2
    machine.step(step)
    machine.query_count = 0
    ran = machine.run(task, 3 * HOUR - 60)
    assert len(ran) == runs, ran
    assert machine.query_count < 250


def test_a_time_that_passed_between_two_looks_is_caught_up_once() -> None:
    task, machine = CronSchedule("0 * * * *", zone=VIENNA), Machine()
    assert not task.is_due(machine.now, 0)
    machine.sleep(3 * DAY)
    assert machine.run(task, 60) == ["Fri 03-13 12:00+0100"]


def test_a_time_missed_while_off_is_caught_up_once_after_the_start() -> None:
    last_us = round((START - timedelta(days=3)).timestamp() * 1e6)
    ran = Machine().run(CronSchedule("0 13 * * *", last_us, VIENNA), 2 * HOUR)
    assert ran == ["Tue 03-10 12:00+0100", "Tue 03-10 13:00+0100"]


def test_a_time_that_was_not_missed_while_off_is_not_repeated() -> None:
    last_us = round((START - timedelta(hours=23)).timestamp() * 1e6)
    assert Machine().run(CronSchedule("0 13 * * *", last_us, VIENNA), 30 * 60) == []


def test_a_last_run_in_the_future_says_nothing() -> None:
    last_us = round((START + timedelta(days=900)).timestamp() * 1e6)
    assert Machine().run(CronSchedule("0 13 * * *", last_us, VIENNA), 2 * HOUR) == ["Tue 03-10 13:00+0100"]


def test_at_the_very_microsecond_of_its_time_cron_runs_once() -> None:
    task = CronSchedule("0 13 * * *", zone=VIENNA)
    machine = Machine(datetime(2026, 3, 10, 12, 59, 59, tzinfo=VIENNA))
    assert not task.is_due(machine.now, 0)
    machine.sleep(1.0)
    assert task.is_due(machine.now, 0)
    task.record_run(machine.now)
    assert not task.is_due(machine.now, 0)


def test_runs_by_row_count_of_a_fast_stream_follow_one_another_after_a_tenth_of_a_second_or_with_enough_rows() -> None:
    task, machine = RowCountSchedule(500), Machine()
    assert task.is_due(machine.now, 500, 2000), "the first run never waits"
    task.record_run(machine.now)
    machine.sleep(0.03)
    assert not task.is_due(machine.now, 499, 2000)
    assert task.wait_s(machine.now) > 1
    assert not task.is_due(machine.now, 1999, 2000)
    assert task.wait_s(machine.now) == pytest.approx(0.07)
    assert task.is_due(machine.now, 2000, 2000)
    machine.sleep(0.07)
    assert task.is_due(machine.now, 500, 2000)
    task.record_run(machine.now)
    assert task.is_due(machine.now, 500)


def test_only_cron_needs_its_last_run_remembered_and_only_a_row_count_is_woken_by_rows() -> None:
    result = [parse("f", "t", text) for text in ("every 60 s", "when 5 rows", "0 3 * * *")]
    assert [(type(task), task.needs_last_run, task.counts_rows) for task in result] == [
        (IntervalSchedule, False, False),
        (RowCountSchedule, False, True),
        (CronSchedule, True, False),
    ]


def test_runs_between_two_cron_times_are_not_to_be_saved() -> None:
    task, machine, saved = parse("f", "t", "every 60 s or 30 3 * * * in Europe/Vienna"), Machine(), []
    for _ in range(2 * 24 * 60):
        assert task.is_due(machine.now, 0)
        if task.record_run(machine.now):
            saved.append(machine.local())
        machine.sleep(60.0)
    assert saved == ["Tue 03-10 12:00+0100", "Wed 03-11 03:30+0100", "Thu 03-12 03:30+0100"]


@given(
    st.sampled_from(["30 3 * * *", "*/20 * * * *", "0 0 1 * *", "30 3 * * * jitter 20 min"]),
    st.integers(60, 7200),
    st.integers(0, 5 * 86_400),
    st.integers(0, 90_000),
)
def test_a_restart_catches_up_from_the_saved_run_as_from_the_last_one(
    cron: str, interval_s: int, on_s: int, off_s: int
) -> None:
    task, machine, saved, last = parse("f", "t", f"{cron} or every {interval_s} s"), Machine(), None, 0
    for passed in range(0, on_s + 1, interval_s):
        machine.wall, machine.boot_s = START.astimezone(UTC) + timedelta(seconds=passed), 1000.0 + passed
        if task.is_due(machine.now, 0):
            last = machine.now.wall_us
            saved = last if task.record_run(machine.now) else saved
    machine.sleep(off_s)
    assert saved is not None
    [from_saved, from_last] = [parse("f", "t", cron, run_us) for run_us in (saved, last)]
    assert from_saved.is_due(machine.now, 0) == from_last.is_due(machine.now, 0)
    assert from_saved.wait_s(machine.now) == from_last.wait_s(machine.now)


def test_a_clock_set_back_before_a_crash_still_catches_up_from_the_last_run() -> None:
    task, machine, saved = parse("f", "t", "30 */6 * * * or every 1 h"), Machine(), 0
    for hours in (0, 1, 1, -5, 1, 1):
        machine.wall += timedelta(hours=hours)
        machine.boot_s += 3600 * abs(hours)
        if task.is_due(machine.now, 0):
            last = machine.now.wall_us
            saved = last if task.record_run(machine.now) else saved
    machine.sleep(6 * 3600)
    [from_saved, from_last] = [parse("f", "t", "30 */6 * * *", run_us) for run_us in (saved, last)]
    assert from_saved.is_due(machine.now, 0) == from_last.is_due(machine.now, 0)
    assert from_saved.wait_s(machine.now) == from_last.wait_s(machine.now)


def test_a_last_run_reaches_the_cron_schedule() -> None:
    missed = parse("f", "t", "0 3 * * *", round((START - timedelta(days=3)).timestamp() * 1e6))
    assert missed.is_due(Machine().now, 0)
    assert not parse("f", "t", "0 3 * * *").is_due(Machine().now, 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a cron expression has 5 fields, this has 0"),
        ("hourly", "has 5 fields"),
        ("@daily", "has 5 fields"),
        ("every", "has 5 fields"),
        ("every 60", "must be a number with a unit"),
        ("every 0 s", "an interval must be positive"),
        ("when 0 rows", "a number of rows must be positive"),
        ("every -5 s", "must be a number with a unit"),
        ("every 5 parsecs", "must be a number with a unit"),
        ("when rows", "has 5 fields"),
        ("when -5 rows", "has 5 fields"),
        ("0 3 * *", "has 5 fields, this has 4"),
        ("0 3 * * * *", "has 5 fields, this has 6"),
        ("60 * * * *", "60"),
        ("* 24 * * *", "24"),
        ("* * 0 * *", "0"),
        ("* * * 13 *", "13"),
        ("* * * * 8", "'8' is no weekday: 0-7"),
        ("* * * * 5-1", "'5-1' runs backwards"),
        ("* * * * 1,", "'' is no weekday"),
        ("*/0 * * * *", "higher than 0"),
        ("5-1 * * * *", "minimum value"),
        ("x * * * *", "x"),
        ("0 0 30 2 *", "that time never comes"),
        ("\x00 * * * *", "minute"),
    ],
)
def test_a_bad_schedule_is_named_with_its_task_and_what_to_write(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("outstation.toml", "exercise", text)
    assert caught.value.key == "tasks.exercise.schedule"
    assert reason in caught.value.problem
    assert caught.value.problem.endswith(
        'write "every 60 s", "when 500 rows" or a cron expression such as "30 3 * * *"'
    )


NUMBERS = st.integers(0, 70).map(str)
NEARLY_CRON = st.lists(NUMBERS | st.sampled_from(["*", "*/2", "1-5", "mon", "7"]), min_size=4, max_size=6).map(" ".join)
NEARLY_RIGHT = st.one_of(
    st.builds("every {} {}".format, NUMBERS, st.sampled_from(["s", "min", "h", "d", "ms", "parsecs"])),
    st.builds("when {} {}".format, NUMBERS, st.sampled_from(["row", "rows", "lines"])),
    NEARLY_CRON,
)
# What a text that is accepted must look like, whichever parser reads it.
RIGHT = {
    IntervalSchedule: re.compile(r"every .*[1-9].* ?(ms|s|min|h|d)"),
    RowCountSchedule: re.compile(r"when \d+ rows?"),
    CronSchedule: re.compile(r"\S+(\s+\S+){4}", re.ASCII),
}


def parse_or_refuse(text: str) -> Schedule | ConfigError:
    try:
        return parse("outstation.toml", "exercise", text)
    except ConfigError as error:
        return error


@given(st.text(max_size=20) | NEARLY_RIGHT)
def test_any_text_is_a_schedule_of_its_kind_or_refused_by_its_key(text: str) -> None:
    schedule = parse_or_refuse(text)
    if isinstance(schedule, ConfigError):
        assert (schedule.file, schedule.key) == ("outstation.toml", "tasks.exercise.schedule")
        assert repr(text) in schedule.problem
        return
    assert RIGHT[type(schedule)].fullmatch(text.strip())
    machine = Machine()
    if isinstance(schedule, RowCountSchedule):
        limit = max(1, int(text.split()[1]))
        assert [schedule.is_due(machine.now, backlog) for backlog in (limit - 1, limit)] == [False, True]
        return
    schedule.record_run(machine.now)
    assert not schedule.is_due(machine.now, 10**9)
    assert schedule.wait_s(machine.now) > 0


def test_alternatives_are_due_when_any_of_them_is() -> None:
    task, machine = parse("f", "t", "every 10 min or when 500 rows"), Machine()
    assert (task.needs_last_run, task.counts_rows) == (False, True)
    assert len(machine.run(task, 0)) == 1
    assert not task.is_due(machine.now, 499)
    assert task.is_due(machine.now, 500)
    task.record_run(machine.now)
    assert machine.run(task, 600) == ["Tue 03-10 12:10+0100"], "rows leave the beat of the interval alone"


def test_a_cron_time_follows_the_zone_that_it_names_over_a_change_of_its_offset() -> None:
    machine = Machine(datetime(2026, 3, 28, 0, 0, tzinfo=VIENNA))
    assert machine.run(parse("f", "t", "0 9 * * * in Asia/Tokyo"), 2 * DAY) == [
        "Sat 03-28 01:00+0100", "Sun 03-29 01:00+0100"
    ]  # fmt: skip
    machine = Machine(datetime(2026, 3, 28, 0, 0, tzinfo=VIENNA))
    assert machine.run(parse("f", "t", "0 9 * * * in Europe/Vienna"), 2 * DAY) == [
        "Sat 03-28 09:00+0100", "Sun 03-29 09:00+0200"
    ]  # fmt: skip


RANGE = "in Europe/Vienna from 2026-03-12 until 2026-03-13"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"0 12 * * * {RANGE}", ["Thu 03-12 12:00+0100", "Fri 03-13 12:00+0100"]),
        (
            f"every 12 h {RANGE}",
            [f"{day} {time}+0100" for day in ("Thu 03-12", "Fri 03-13") for time in ("00:00", "12:00")],
        ),
        (f"0 0 * * * {RANGE}T00:00", ["Thu 03-12 00:00+0100"]),
    ],
)  # fmt: skip
def test_a_date_range_contains_its_last_day_and_ends_before_a_time(text: str, expected: list[str]) -> None:
    assert Machine().run(parse("f", "t", text), 7 * DAY) == expected


def test_rows_wait_outside_a_date_range() -> None:
    task, machine = parse("f", "t", f"when 5 rows {RANGE}"), Machine()
    assert not task.is_due(machine.now, 5)
    machine.sleep(2 * DAY)
    assert task.is_due(machine.now, 5)
    machine.sleep(2 * DAY)
    assert not task.is_due(machine.now, 5)
    assert task.wait_s(machine.now) == 60


@pytest.mark.parametrize("moment", ["2026-03-13T12:00:00", "2026-03-14T00:00:00", "2026-09-01T12:00:00"])
def test_a_range_that_is_over_starts_no_run_and_catches_up_on_none(moment: str) -> None:
    wall = datetime.fromisoformat(moment).replace(tzinfo=VIENNA)
    text = f"* * * * * {RANGE}T12:00"
    machine = Machine(wall)
    assert machine.run(parse("f", "t", text), HOUR) == []
    assert machine.query_count <= 62
    missed = parse("f", "t", text, round(datetime(2026, 3, 13, 11, tzinfo=VIENNA).timestamp() * 1e6))
    assert Machine(wall).run(missed, HOUR) == []


def test_a_time_that_a_busy_machine_missed_before_the_end_of_its_range_is_not_waited_for() -> None:
    task, machine = parse("f", "t", f"59 11 * * * {RANGE}T12:00"), Machine(datetime(2026, 3, 13, 11, tzinfo=VIENNA))
    assert not task.is_due(machine.now, 0)
    machine.sleep(2 * HOUR)
    assert machine.run(task, HOUR) == []
    assert machine.query_count <= 62


@pytest.mark.parametrize("text", ["0 3 * * * in Europe/Vienna jitter 20 min", "every 6 h jitter 20 min"])
def test_a_jitter_spreads_a_fleet_and_leaves_each_device_its_beat(text: str) -> None:
    delays = []
    for number in range(40):
        machine = Machine(datetime(2026, 11, 25, 3, tzinfo=VIENNA))
        ran = machine.run(parse("f", "t", text, device=f"pi-{number}"), 12 * HOUR - 1)
        if "every" in text:
            first, second = (datetime.strptime(each[-10:-5], "%H:%M") for each in ran)
            assert second - first == timedelta(hours=6)
        delays.append(int(ran[0][-7:-5]))
    assert 0 <= min(delays) <= 2
    assert 17 <= max(delays) < 20
    assert len(set(delays)) > 10


def test_a_delayed_cron_time_comes_once_over_restarts_and_steps() -> None:
    text = "0 3 * * * in Europe/Vienna jitter 6 h"
    machine = Machine(datetime(2026, 11, 25, 2, tzinfo=VIENNA))
    [ran] = machine.run(parse("f", "t", text, device="pi"), 12 * HOUR)
    last_us = round(datetime.strptime(f"2026 {ran}", "%Y %a %m-%d %H:%M%z").timestamp() * 1e6) + 60_000_000
    assert machine.run(parse("f", "t", text, last_us, "pi"), 10 * HOUR) == []
    machine.step(-HOUR)
    assert len(machine.run(parse("f", "t", text, last_us, "pi"), DAY)) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("every 60 s or", "'60 s or' must be a number"),
        ("every 60 s or every 0 s", "an interval must be positive"),
        ("0 3 * * * in Mars/Olympus", "'Mars/Olympus' is no time zone here"),
        ("0 3 * * * in ../../etc/passwd", "is no time zone here"),
        ("every 60 s in Europe/Vienna", "belongs to a cron expression or to dates"),
        ("when 5 rows jitter 5 s", "no time that a jitter could delay"),
        ("0 3 * * * jitter 5", "must be a number with a unit"),
        ("0 3 * * * from tomorrow", "'tomorrow' is no date"),
        ("0 3 * * * from 2026-02-30", "'2026-02-30' is no date"),
        ("0 3 * * * until 9999-12-31", "'9999-12-31' is no date"),
        ("0 3 * * * from 2026-03-02 until 2026-03-01", "ends before it begins"),
        ("0 3 * * * from 2026-03-02 from 2026-03-01", "may each come once"),
    ],
)
def test_a_bad_clause_is_named_with_what_to_write(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("outstation.toml", "exercise", text)
    assert reason in caught.value.problem
