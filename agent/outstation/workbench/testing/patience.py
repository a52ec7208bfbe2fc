"""Waits of tests for events, whose limits a busy machine extends.

A limit only ends a wait for an event that never comes. While processes wait for a processor, the events are late, too:
such time counts a tenth.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

# Long: a test that passes never waits for it.
TIMEOUT_S = 90.0
# Pressure stall information: µs since boot in which a process waited for a processor.
_PRESSURE = Path("/proc/pressure/cpu")
_STALLED_SHARE = 0.1
_POLL_S, _LONGEST_POLL_S = 0.05, 0.5
_FIRST_POLL_S = 0.005


class Patience:
    """Limit of `seconds` on a machine with a free processor."""

    def __init__(self, seconds: float, *, extends: bool = True) -> None:
        self._seconds, self._extends = seconds, extends
        self.renew()

    def renew(self) -> None:
        """Begin again."""
        self._began_s, self._stalled_s = time.monotonic(), _stalled_s()

    def is_over(self) -> bool:
        waited_s = time.monotonic() - self._began_s
        if self._extends and waited_s > self._seconds:
            waited_s -= (1 - _STALLED_SHARE) * min(waited_s, _stalled_s() - self._stalled_s)
        return waited_s > self._seconds


def wait_until(description: str, condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until a condition is true. Raises AssertionError with the description when the patience is over."""
    patience, began_s, poll_s = Patience(timeout_s), time.monotonic(), _FIRST_POLL_S
    computed_s = time.thread_time()
    while not condition():
        if patience.is_over():
            raise AssertionError(f"not within {time.monotonic() - began_s:.0f} s: {description}")
        # A condition that computes takes a quarter of a processor at most: what it waits for needs the others.
        time.sleep(min(max(poll_s, 3 * (time.thread_time() - computed_s)), _LONGEST_POLL_S))
        poll_s, computed_s = min(1.2 * poll_s, _POLL_S), time.thread_time()


def pause(seconds: float) -> None:
    """Sleep for `seconds` on a machine with a free processor."""
    patience = Patience(seconds)
    while not patience.is_over():
        time.sleep(_POLL_S)


def _stalled_s() -> float:
    """Return the seconds since boot in which a process waited for a processor; 0 where the kernel does not count."""
    try:
        line = _PRESSURE.read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return 0.0
    return int(line.rpartition("total=")[2]) / 1e6
