"""What is missing here may be in another collector's hands: it is asked for once that can be no more."""

from __future__ import annotations

import msgspec

from agent.fleet.database.interface import LogId

# A collector stores what it has in hand within a second, unless its database is slow, or it was killed.
WAIT_S = 2.0


class _LogProgress(msgspec.Struct):
    """`settled`: through a while ago, so that what lies below it is not on its way; `through`: since `at_s`."""

    settled: int
    through: int
    since_s: float


class PendingGaps:
    """Of each log with something missing: how far what is missing may be asked for."""

    def __init__(self) -> None:
        self._progress: dict[LogId, _LogProgress] = {}
        self._due_s: dict[LogId, float] = {}

    def trim(
        self, now_s: float, log: LogId, through: int, missing: list[tuple[int, int]]
    ) -> tuple[int, list[tuple[int, int]]]:
        """As far as the acknowledgement goes now; the rest is `due` after a while."""
        self._due_s.pop(log, None)
        if not missing:
            self._progress.pop(log, None)
            return through, missing
        known = self._progress.setdefault(log, _LogProgress(0, through, now_s))
        if now_s - known.since_s >= WAIT_S:
            known.settled, known.through, known.since_s = known.through, through, now_s
        young = next((i for i, (first, _) in enumerate(missing) if first > known.settled), None)
        if young is None:
            return through, missing
        self._due_s[log] = known.since_s + WAIT_S
        return missing[young][0] - 1, missing[:young]

    def due_logs(self, now_s: float) -> list[LogId]:
        """Logs to look at again."""
        return [log for log, at_s in self._due_s.items() if at_s <= now_s]
