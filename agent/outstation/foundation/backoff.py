"""Exponential back-off: each failure in a row doubles the wait, so that a broken peer costs little and is not flooded.

With jitter, clients that lost a peer together do not return together.
"""

from __future__ import annotations

import random

import msgspec


class Backoff(msgspec.Struct, frozen=True):
    """Waits of `first_s` seconds, doubled up to `longest_s`."""

    first_s: float
    longest_s: float

    def wait_s(self, failures: int) -> float:
        """Return the seconds to wait after this many failures in a row, from 1 on."""
        return min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 30))

    def draw_s(self, failures: int, rng: random.Random | None = None) -> float:
        """Return a random wait, from half of `wait_s` to all of it."""
        return self.wait_s(failures) * (rng or random).uniform(0.5, 1.0)

    def double_s(self, wait_s: float) -> float:
        """Return the wait that follows one of `wait_s`."""
        return min(self.longest_s, 2 * wait_s)


class Retries:
    """Failures in a row of one peer, each with a random wait."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff, self.failures = backoff, 0

    def next_delay(self) -> float:
        """Count a failure, and return the seconds to wait after it."""
        self.failures += 1
        return self._backoff.draw_s(self.failures)

    def reset(self) -> None:
        self.failures = 0
