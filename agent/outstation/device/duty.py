"""Duty: one kind of work of the daemon's main loop, and when it is due."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from outstation.foundation.clock import ClockReading


class Duty(msgspec.Struct):
    """Work of the main loop: due in each tick, or each `every_s` seconds, or at once where `is_urgent`.

    `tick` may return the seconds until there is more to do. `due_s` is on the boot-time clock.
    """

    tick: Callable[[ClockReading], float | None]
    every_s: float = 0.0
    is_urgent: Callable[[], bool] = lambda: False
    due_s: float = 0.0

    def run(self, now: ClockReading) -> float:
        """Run `tick` if it is due; return the seconds until the main loop must not wait any longer for it."""
        if now.boot_s < self.due_s and not self.is_urgent():
            return math.inf
        wait = self.tick(now)
        if self.every_s:
            self.due_s = now.boot_s + (self.every_s if wait is None else wait)
        return math.inf if wait is None else wait
