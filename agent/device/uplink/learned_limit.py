"""Largest message of a broker that announces no limit, but ends the connection at a larger one."""

from __future__ import annotations

from agent.transport.capabilities import MAX_PACKET

# Until larger messages are tried again. Each trial that fails costs a connection, and doubles the wait.
SHORTEST_S, LONGEST_S = 60.0, 86_400.0


class LearnedLimit:
    """Limit in `bytes`, learned from lost connections; it is lifted for a trial, as the broker's may have been raised.

    Used by the uplink's thread only.
    """

    def __init__(self) -> None:
        self.bytes = MAX_PACKET
        self._wait_s, self._trial_s = SHORTEST_S, float("-inf")

    def lower(self, largest: int, now_s: float) -> None:
        """Note that the broker ended a connection with a message of `largest` bytes under way."""
        if self.bytes == MAX_PACKET:
            is_new = now_s - self._trial_s > self._wait_s
            self._wait_s = SHORTEST_S if is_new else min(2 * self._wait_s, LONGEST_S)
            self._trial_s = now_s + self._wait_s
        self.bytes = min(self.bytes, largest) - 1

    def lift(self, now_s: float) -> bool:
        """Lift the limit if a trial is due; return True if it was lifted."""
        if self.bytes == MAX_PACKET or now_s < self._trial_s:
            return False
        self.bytes = MAX_PACKET
        return True
