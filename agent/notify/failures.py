"""Failure of one attempt to deliver a notification, and the back-off after it."""

from __future__ import annotations

import random

from agent.errors import OutstationError

MIN_DELAY_S, MAX_DELAY_S = 5.0, 3600.0


class SendFailed(OutstationError):
    """A target did not accept a message. `is_rejected`: it refuses this message, whenever it is sent.

    `retry_after_s`: what the target asks for; None if it asks for nothing.
    """

    def __init__(self, problem: str, *, is_rejected: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.is_rejected, self.retry_after_s = is_rejected, retry_after_s


def backoff_s(failures: int, retry_after_s: float | None = None) -> float:
    """Return seconds until the next attempt: 5 s, 10 s, 20 s … 1 h, less up to half, so that targets do not meet."""
    delay = min(MIN_DELAY_S * 2.0 ** min(failures - 1, 20), MAX_DELAY_S) * random.uniform(0.5, 1.0)
    return min(max(delay, retry_after_s or 0.0), MAX_DELAY_S)
