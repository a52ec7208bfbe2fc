"""Statistics of a running collector, which its metrics show. One thread writes them, any may read."""

from __future__ import annotations

from collections import Counter

import msgspec


class CollectorStatistics(msgspec.Struct):
    """`outcomes`: messages by outcome of ingest; `waiting_since_s`: boot time since when one waits, or None."""

    outcomes: Counter[str] = msgspec.field(default_factory=lambda: Counter(new=0, duplicate=0, conflict=0, live=0))
    refusals: Counter[str] = msgspec.field(default_factory=Counter)
    storage_failures: int = 0
    is_connected: bool = False
    held: int = 0
    waiting_since_s: float | None = None

    def set_held(self, count: int, now_s: float) -> None:
        """Record how many received messages are not stored yet."""
        self.held = count
        if not count:
            self.waiting_since_s = None
        elif self.waiting_since_s is None:
            self.waiting_since_s = now_s
