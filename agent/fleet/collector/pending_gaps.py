"""Pending gaps: delay the request for a missing message until no other collector can still hold it."""

from __future__ import annotations

import msgspec

from agent.fleet.database.interface import LogId

# A collector stores the messages that it holds within a second, unless its database is slow or it was killed.
WAIT_S = 2.0


class _LogProgress(msgspec.Struct):
    """`last_seq` was reported at `since_s`; gaps up to `settled`, reported before that, may be requested."""

    settled: int
    last_seq: int
    since_s: float


class PendingGaps:
    """The logs with gaps, and up to which seq their gaps may be requested."""

    def __init__(self) -> None:
        self._progress: dict[LogId, _LogProgress] = {}
        self._due_s: dict[LogId, float] = {}

    def trim(
        self, now_s: float, log: LogId, through: int, missing: list[tuple[int, int]]
    ) -> tuple[int, list[tuple[int, int]]]:
        """Return the acknowledgement as (through, missing) without recent gaps; `due_logs` lists the log later."""
        self._due_s.pop(log, None)
        if not missing:
            self._progress.pop(log, None)
            return through, missing
        known = self._progress.setdefault(log, _LogProgress(0, through, now_s))
        if now_s - known.since_s >= WAIT_S:
            known.settled, known.last_seq, known.since_s = known.last_seq, through, now_s
        recent = next((i for i, (first, _) in enumerate(missing) if first > known.settled), None)
        if recent is None:
            return through, missing
        self._due_s[log] = known.since_s + WAIT_S
        return missing[recent][0] - 1, missing[:recent]

    def due_logs(self, now_s: float) -> list[LogId]:
        """Return the logs whose acknowledgement is due again."""
        return [log for log, due_s in self._due_s.items() if due_s <= now_s]
