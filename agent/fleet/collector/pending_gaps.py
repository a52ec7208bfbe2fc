"""What is missing here may be in another collector's hands: it is asked for once that can be no more."""

from __future__ import annotations

import msgspec

from agent.fleet.database.interface import Log

# A collector stores what it has in hand within a second, unless its database is slow, or it was killed.
WAIT_S = 2.0


class _Known(msgspec.Struct):
    """`settled`: through a while ago, so that what lies below it is not on its way; `through`: since `at_s`."""

    settled: int
    through: int
    at_s: float


class Patience:
    """Of each log with something missing: how far what is missing may be asked for."""

    def __init__(self) -> None:
        self._known: dict[Log, _Known] = {}
        self._due_s: dict[Log, float] = {}

    def trim(
        self, now_s: float, log: Log, through: int, missing: list[tuple[int, int]]
    ) -> tuple[int, list[tuple[int, int]]]:
        """As far as the acknowledgement goes now; the rest is `due` after a while."""
        self._due_s.pop(log, None)
        if not missing:
            self._known.pop(log, None)
            return through, missing
        known = self._known.setdefault(log, _Known(0, through, now_s))
        if now_s - known.at_s >= WAIT_S:
            known.settled, known.through, known.at_s = known.through, through, now_s
        young = next((i for i, (first, _) in enumerate(missing) if first > known.settled), None)
        if young is None:
            return through, missing
        self._due_s[log] = known.at_s + WAIT_S
        return missing[young][0] - 1, missing[:young]

    def due(self, now_s: float) -> list[Log]:
        """Logs to look at again."""
        return [log for log, at_s in self._due_s.items() if at_s <= now_s]
