"""Pace: how fast simulated time may pass, as a multiple of real time."""

from __future__ import annotations

import time

# A process that falls behind by more does not hurry to catch up: timeouts would end before their answers come.
_MAX_LAG_S = 1.0


class Pace:
    """Clock of a simulation at `speed` times real time; `resume` it after a pause."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._origin_s = self._origin_real_s = 0.0

    def resume(self, now_s: float) -> None:
        """Let real time count from now on, at simulated time `now_s`."""
        self._origin_s, self._origin_real_s = now_s, time.monotonic()

    def remaining_s(self, due_s: float) -> float:
        """Return the real seconds until simulated time may be `due_s`; 0 once it may."""
        wait_s = (due_s - self._origin_s) / self.speed - (time.monotonic() - self._origin_real_s)
        if wait_s < -_MAX_LAG_S:
            self.resume(due_s)
        return max(0.0, wait_s)
