"""When a task is due: an interval, a cron expression or a number of rows, on clocks that may be stepped.

Intervals are counted on the boot-time clock. Cron needs wall time: APScheduler computes the next time, and it is
computed anew after each step of the wall clock. However much was missed, it is caught up with one run.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Protocol

from agent import config
from agent.clock import Now
from agent.errors import ConfigError

_STEP_S = 1.0
_LONGEST_WAIT_S = 60.0


class Schedule(Protocol):
    def due(self, now: Now, backlog: int) -> bool:
        """Whether to run now, with `backlog` rows waiting."""
        ...

    def ran(self, now: Now) -> None:
        """A run was started at `now`."""
        ...

    def wait_s(self, now: Now) -> float:
        """How long nothing needs to be asked, unless rows come."""
        ...


def parse(file: str, task: str, text: str) -> Schedule:
    """`"every 60 s"`, `"when 500 rows"` or a cron expression of five fields (local time). Raises ConfigError."""
    key = f"tasks.{task}.schedule"
    try:
        if text.startswith("every "):
            seconds = config.parse_duration(text.removeprefix("every "))
            if seconds <= 0:
                raise ValueError("an interval must be longer than nothing")
            return Every(seconds)
        rows = re.fullmatch(r"when (\d+) rows?", text)
        if rows:
            return When(max(1, int(rows[1])))
        return Cron(text)
    except ValueError as error:
        raise ConfigError(
            file, key, f'{text!r}: {error}; write "every 60 s", "when 500 rows" or a cron expression'
        ) from None


class Every:
    """Each `seconds`, first at once."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next: float | None = None

    def due(self, now: Now, backlog: int) -> bool:
        return self._next is None or now.boot_s >= self._next

    def ran(self, now: Now) -> None:
        planned = now.boot_s if self._next is None else self._next
        missed = (now.boot_s - planned) // self._seconds
        self._next = planned + (missed + 1) * self._seconds

    def wait_s(self, now: Now) -> float:
        return 0.0 if self._next is None else max(0.0, self._next - now.boot_s)


class When:
    """As soon as `rows` wait."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def due(self, now: Now, backlog: int) -> bool:
        return backlog >= self._rows

    def ran(self, now: Now) -> None:
        pass

    def wait_s(self, now: Now) -> float:
        return _LONGEST_WAIT_S


class Cron:
    """At the times of a cron expression in local time. Raises ValueError."""

    def __init__(self, expression: str) -> None:
        # Costs 40 ms and several MB: only for those who write a cron expression.
        from apscheduler.triggers.cron import CronTrigger

        self._trigger = CronTrigger.from_crontab(expression)
        self._next: datetime | None = None
        self._seen: Now | None = None

    def due(self, now: Now, backlog: int) -> bool:
        if self._next is None or self._stepped_back(now):
            self._plan(now)
        self._seen = now
        return self._next is not None and _moment(now) >= self._next

    def ran(self, now: Now) -> None:
        self._plan(now)

    def wait_s(self, now: Now) -> float:
        if self._next is None:
            return _LONGEST_WAIT_S
        return min(_LONGEST_WAIT_S, max(0.0, (self._next - _moment(now)).total_seconds()))

    def _plan(self, now: Now) -> None:
        self._next = self._trigger.get_next_fire_time(None, _moment(now))

    def _stepped_back(self, now: Now) -> bool:
        if self._seen is None:
            return False
        wall = (now.wall_us - self._seen.wall_us) / 1e6
        return wall < now.boot_s - self._seen.boot_s - _STEP_S


def _moment(now: Now) -> datetime:
    return datetime.fromtimestamp(now.wall_us / 1e6, UTC)
