"""Whether the results of one log cover every row that its tasks consumed, exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.wire.messages import Health, Results


@dataclass(slots=True)
class Track:
    """What the results of one task say about one stream so far; rows count from 1."""

    first: int
    last: int
    seq: int
    messages: int = 1
    results: int = 0


class Coverage:
    """Fed the messages of a log in order of seq; says what is wrong with each."""

    def __init__(self) -> None:
        self.tracks: dict[tuple[str, str], Track] = {}
        self.doubled = 0
        self._broken_at = 0

    def broken(self, seq: int) -> None:
        """Messages before `seq`, or it itself, cannot be read: rows they covered are not missed a second time."""
        self._broken_at = seq

    def results(self, body: Results) -> str | None:
        """The problem with a results message."""
        first, last = body.rows
        track = self.tracks.get((body.task, body.stream))
        if track is None:
            self.tracks[body.task, body.stream] = Track(first, last, body.seq, results=len(body.columns.row))
            return None
        problem = self._step(track, body)
        track.last, track.seq = max(track.last, last), body.seq
        track.messages += 1
        track.results += len(body.columns.row)
        return problem

    def health(self, body: Health) -> list[str]:
        """The problems between what the device says its tasks consumed and what was reported by then."""
        return [problem for task, said in body.tasks.items() if (problem := self._cursor(task, said))]

    def _step(self, track: Track, body: Results) -> str | None:
        first, last = body.rows
        if first <= track.last:
            self.doubled += 1
            return f"covers rows {first}-{last} of {body.stream}, but row {min(last, track.last)} was reported before"
        if first > track.last + 1 and self._broken_at <= track.seq:
            return f"starts at row {first} of {body.stream}, but the results before it end at row {track.last}"
        return None

    def _cursor(self, task: str, said: dict[str, Any]) -> str | None:
        stream, row, first = said.get("stream"), said.get("row"), said.get("first")
        if not isinstance(stream, str) or type(row) is not int or row < 1:
            return None
        track = self.tracks.get((task, stream))
        last, since = (track.last, track.seq) if track else (0, 0)
        if row > last and self._broken_at <= since:
            return f"says that {task} consumed {stream} up to row {row}, but the results before it end at row {last}"
        if track and type(first) is int and 1 <= first < track.first and not self._broken_at:
            return f"says that {task} consumed {stream} from row {first}, but the first results start at {track.first}"
        return None
