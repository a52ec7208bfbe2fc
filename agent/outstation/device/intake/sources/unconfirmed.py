"""Limit of unconfirmed messages on a subscription: at its limit, a broker sends nothing before a confirmation.

MQTT 5 lets a broker announce only how many messages it takes (Receive Maximum, 3.2.2.3.3). Mosquitto sends as many. The
messages themselves show whether another broker sends more or fewer. Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import math

# A message that follows a confirmation this soon, after a silence this long, was waiting for it at the broker.
_PROMPT_S, _SILENCE_S = 0.02, 0.1


class UnconfirmedMessages:
    """Count of the unconfirmed messages on one connection, and the broker's limit as far as it is known."""

    def __init__(self, announced: int) -> None:
        self._announced = self.limit = announced
        self._count = 0
        self._arrived_s = self._confirmed_s = -math.inf
        # Count that the last confirmation brought to 0, after a silence; else 0.
        self._silent_count = 0

    @property
    def is_at_limit(self) -> bool:
        """True if the broker sends nothing before a confirmation."""
        return self._count >= self.limit

    def add(self, now_s: float) -> None:
        """Count a message that arrived."""
        if not self._count:
            if now_s - self._confirmed_s > _PROMPT_S:
                # Nothing waited at the broker: a lower limit may have been a pause of the publisher.
                self.limit = max(self.limit, self._announced)
            elif self._silent_count:
                self.limit = min(self.limit, self._silent_count)
        self._count += 1
        self.limit = max(self.limit, self._count)
        self._arrived_s = now_s

    def confirm(self, count: int, now_s: float) -> None:
        """Count messages that were confirmed together."""
        self._count -= count
        self._confirmed_s = now_s
        self._silent_count = count if not self._count and now_s - self._arrived_s >= _SILENCE_S else 0
