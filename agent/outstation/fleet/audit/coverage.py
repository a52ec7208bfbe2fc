"""Row coverage: check that the results of a log cover each row that its tasks consumed exactly once.

Rows that a signed audit message declares as evicted before a task used them need no results of that task.
"""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.fleet.database.gap_ledger import EVICTED, parse_ranges
from outstation.protocol.wire.commitment import SECRET_REPLACED
from outstation.protocol.wire.messages import AuditPayload, HealthPayload, ResultsPayload


class JoinedCoverage(msgspec.Struct):
    """Rows of the stream that a further input of a task was joined from so far.

    `input` is the newest commitment, which is to `rows`. Its key is derived from `log`, where it was first written, and
    from the device's secret; "" once that was replaced.
    """

    stream: str
    first: int
    last: int
    rows: tuple[int, int] = (0, 0)
    input: str = ""
    log: str = ""
    messages: int = 0
    unproven: int = 0


class TaskCoverage(msgspec.Struct):
    """Coverage of one stream by the results of one task so far; rows count from 1."""

    first: int
    last: int
    seq: int
    messages: int = 1
    results: int = 0
    joined: dict[str, JoinedCoverage] = {}


class CoverageState(msgspec.Struct):
    """State of `RowCoverage`; (task, stream, …) of each track and declaration."""

    tracks: list[tuple[str, str, TaskCoverage]] = []
    declared: list[tuple[str, str, list[tuple[int, int]]]] = []
    evicted: list[dict[str, Any]] = []
    duplicates: int = 0
    unreadable_seq: int = 0
    secrets: list[dict[str, Any]] = []


class RowCoverage:
    """Checks the messages of a log in order of seq, from a state on."""

    def __init__(self, state: CoverageState) -> None:
        self.tracks = {(task, stream): track for task, stream, track in state.tracks}
        self.evicted = [*state.evicted]
        self.duplicates = state.duplicates
        self._declared = {(task, stream): ranges for task, stream, ranges in state.declared}
        self._unreadable_seq = state.unreadable_seq
        self.secrets = [*state.secrets]

    def to_state(self) -> CoverageState:
        return CoverageState(
            [(*name, track) for name, track in self.tracks.items()],
            [(*name, ranges) for name, ranges in self._declared.items()],
            *(self.evicted, self.duplicates, self._unreadable_seq, self.secrets),
        )

    def mark_unreadable(self, seq: int) -> None:
        """Record that messages up to `seq` are missing or unreadable: their rows are not reported again."""
        self._unreadable_seq = seq

    def check_results(self, body: ResultsPayload) -> list[str]:
        """Add the rows of a message; return how they contradict the messages before it."""
        first, last = body.rows
        track = self.tracks.get((body.task, body.stream))
        if track is None:
            track = TaskCoverage(first, last, body.seq, results=len(body.columns))
            self.tracks[body.task, body.stream] = track
            return _check_joined(track, body)
        problem = self._check_next_rows(track, body)
        if body.reissued and body.rows[0] > track.last:
            # The rows in between are in messages of its first log that had arrived.
            problem = None
        track.last, track.seq = max(track.last, last), body.seq
        track.messages += 1
        track.results += len(body.columns)
        return [*([problem] if problem else []), *_check_joined(track, body)]

    def add_evictions(self, body: AuditPayload) -> None:
        """Record readings that a message declares as evicted: stream, rows, used, tasks."""
        stream, rows = body.evidence.get("stream"), parse_ranges(body.evidence.get("rows"))
        tasks = body.evidence.get("tasks")
        if body.event != EVICTED or not isinstance(stream, str) or not rows:
            return
        waiting = [task for task in tasks if isinstance(task, str)] if isinstance(tasks, list) else []
        used = body.evidence.get("used") is True
        self.evicted.append({"stream": stream, "rows": rows, "used": used, "tasks": waiting})
        for task in waiting:
            self._declared[task, stream] = _merge_ranges([*self._declared.get((task, stream), []), *rows])

    def end_secret(self, body: AuditPayload) -> None:
        """Compare no commitment of a message behind this one with those before, if it says that the secret changed."""
        if body.event != SECRET_REPLACED:
            return
        self.secrets.append({"seq": body.seq, "time": body.time})
        for track in self.tracks.values():
            for joined in track.joined.values():
                joined.input = ""

    def check_health(self, body: HealthPayload) -> list[str]:
        """Return differences between the cursors of the device's tasks and the results reported by then."""
        if body.reissued:
            return []
        return [problem for task, cursor in body.tasks.items() if (problem := self._check_cursor(task, cursor))]

    def _check_next_rows(self, track: TaskCoverage, body: ResultsPayload) -> str | None:
        first, last = body.rows
        if first <= track.last:
            self.duplicates += 1
            return f"covers rows {first}-{last} of {body.stream}, but row {min(last, track.last)} was reported before"
        is_gap = self._has_undeclared_gap(body.task, body.stream, track.last + 1, first - 1)
        if is_gap and self._unreadable_seq <= track.seq:
            return f"starts at row {first} of {body.stream}, but the results before it end at row {track.last}"
        return None

    def _check_cursor(self, task: str, cursor: dict[str, Any]) -> str | None:
        stream, row, first = cursor.get("stream"), cursor.get("row"), cursor.get("first")
        if not isinstance(stream, str) or type(row) is not int or row < 1:
            return None
        track = self.tracks.get((task, stream))
        last, since = (track.last, track.seq) if track else (0, 0)
        if self._has_undeclared_gap(task, stream, last + 1, row) and self._unreadable_seq <= since:
            return f"states that {task} consumed {stream} up to row {row}, but the results before it end at row {last}"
        if not track or type(first) is not int or first < 1 or self._unreadable_seq:
            return None
        if self._has_undeclared_gap(task, stream, first, track.first - 1):
            rows = f"from row {first}, but the first results start at {track.first}"
            return f"states that {task} consumed {stream} {rows}"
        return None

    def _has_undeclared_gap(self, task: str, stream: str, first: int, last: int) -> bool:
        """Return True if some row from `first` to `last` was neither used nor evicted."""
        declared = self._declared.get((task, stream), [])
        return first <= last and not any(a <= first and last <= b for a, b in declared)


def _check_joined(track: TaskCoverage, body: ResultsPayload) -> list[str]:
    """Add the joined rows of a message; return how its commitments contradict those of the messages before."""
    problems = []
    log = body.reissued.first_log if body.reissued else body.log
    for name, joined in body.joined.items():
        first, last = joined.rows
        known = track.joined.get(name)
        if known is None or known.stream != joined.stream:
            known = track.joined[name] = JoinedCoverage(joined.stream, first, last)
        known.first, known.last = min(known.first, first), max(known.last, last)
        known.messages += 1
        if not joined.input:
            # The device could not read the rows any more.
            known.unproven += 1
            continue
        if known.input and (known.rows, known.log) == (joined.rows, log) and joined.input != known.input:
            problems.append(f"commits to rows {first}-{last} of {joined.stream} as others than the results before it")
        known.rows, known.input, known.log = joined.rows, joined.input, log
    return problems


def _merge_ranges(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged
