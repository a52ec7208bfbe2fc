"""Declared losses: rows that the device's signed messages declare as lost, per task.

Declarations are:
- the rows of a results message with `lost`
- the unused `rows` of an `evicted` event, for the tasks it names
- messages of an `evicted` event with `seq`, and thus the rows between the neighbouring runs in that log
- a `storage` alert at opening, if the medium may forget confirmed data: it names the newest readings, so all later
  acknowledged rows are lost, in any number
- a `new log` event: rows after the last run of the previous log and before the first new run of its own. Rows that an
  old copy of the store still held may also be judged once more in this log, with equal results.

Row numbers belong to the device, so an absent row is located between the numbers of its neighbours with results: row
numbers follow the order of sending. Between two neighbours, no more rows count as declared than the messages state.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from outstation.foundation import ranges
from outstation.foundation.ranges import Ranges
from outstation.protocol.wire.messages import ResultColumns

NEW_LOG = "new log"
_END = 2**62

# Log and row number of a result.
_Place = tuple[str, int]


class _Log(msgspec.Struct):
    runs: dict[str, list[tuple[int, int, int]]] = msgspec.field(default_factory=dict)
    rows: dict[str, list[tuple[int, int]]] = msgspec.field(default_factory=dict)
    seqs: list[tuple[int, int]] = msgspec.field(default_factory=list)
    newest: list[int] = msgspec.field(default_factory=list)
    follows: str = ""  # the previous log, which ended without declaring its end

    def missing_rows(self, task: str) -> list[tuple[int, int]]:
        """Return the row ranges declared for `task`."""
        runs = sorted(self.runs.get(task, []))
        edges = [(0, 0, 0), *runs, (_END, _END, _END)]
        evicted = [
            (before[2] + 1, after[1] - 1)
            for before, after in pairwise(edges)
            if after[1] > before[2] + 1 and ranges.intersect(ranges.union(self.seqs), [(before[0] + 1, after[0] - 1)])
        ]
        return ranges.union(self.rows.get(task, []), evicted)


class Declarations:
    """Declarations in a device's messages of one stream; `payloads` may be in any order."""

    def __init__(self, payloads: Iterable[bytes], tasks: Sequence[str], *, forgetful: bool = False) -> None:
        self._tasks = tasks
        self._logs: dict[str, _Log] = {}
        self._places: dict[str, dict[int, _Place]] = {task: {} for task in tasks}
        runs: list[dict[str, Any]] = []
        for payload in payloads:
            body = json.loads(payload)
            log = self._logs.setdefault(body["log"], _Log())
            if body["kind"] == "results" and body["task"] in tasks:
                runs.append(body)
            elif body["kind"] == "audit":
                self._event(log, body)
            elif forgetful and body["kind"] == "alerts" and body["alert"] == "storage":
                log.newest += body["evidence"].get("newest", {}).values()
        # A repeated row keeps the position of its first result.
        for body in sorted(runs, key=lambda run: self._before(run["log"])):
            self._run(self._logs[body["log"]], body)

    def undeclared(self, task: str, absent: Collection[int], sent: Iterable[int]) -> int:
        """Return how many rows with times `absent` no message declares; `sent` are all times in sending order."""
        places, count, group = self._places[task], 0, 0
        left: _Place | None = None
        for t in sent:
            # A result that arrived after `absent` was computed counts as present.
            group += t in absent and t not in places
            if t in places:
                count += max(0, group - self._between(task, left, places[t])) if group else 0
                left, group = places[t], 0
        return count + (max(0, group - self._after(task, left)) if group else 0)

    def doubled(self, results: Iterable[tuple[Any, ...]]) -> int:
        """Return the number of duplicate (t, log, row, label, score, value) that no `new log` event allows."""
        by_time: dict[int, list[tuple[Any, ...]]] = {}
        for t, *rest in results:
            by_time.setdefault(t, []).append(tuple(rest))
        return sum(len(same) - 1 for same in by_time.values() if len(same) > 1 and not self._again(same))

    def _again(self, same: Sequence[tuple[Any, ...]]) -> bool:
        logs = [log for log, *_ in same]
        first_lives = [log for log in logs if not self._logs[log].follows]
        equal = len({result[1:] for result in same}) == 1
        return equal and len(set(logs)) == len(logs) and len(first_lives) <= 1

    def _between(self, task: str, left: _Place | None, right: _Place) -> int:
        """Return the number of rows declared between two rows with results; None stands for the beginning."""
        if left is not None and left[0] == right[0]:
            if self._forgot(left, right[1]):
                return _END
            return self._declared(task, left[0], (left[1] + 1, right[1] - 1))
        # Of the previous log, nothing may have arrived.
        if self._logs[right[0]].follows:
            return _END
        before = self._declared(task, left[0], (left[1] + 1, _END)) if left else 0
        return before + self._declared(task, right[0], (1, right[1] - 1))

    def _after(self, task: str, left: _Place | None) -> int:
        """Return the number of rows declared after the last row with a result."""
        if left is not None and any(log.follows == left[0] for log in self._logs.values()):
            return _END
        # A run of a log may cover lost rows, which have no results.
        declared = {log for log, _ in self._places[task].values()}
        later = [name for name in self._logs if name not in declared]
        if any(self._logs[name].follows for name in later):
            return _END
        if left is not None and self._forgot(left, _END):
            return _END
        more = sum(self._declared(task, name, (1, _END)) for name in later)
        return more + (self._declared(task, left[0], (left[1] + 1, _END)) if left else 0)

    def _declared(self, task: str, log: str, span: tuple[int, int]) -> int:
        within: Ranges = ranges.intersect(self._logs[log].missing_rows(task), [span]) if span[0] <= span[1] else []
        return ranges.count(within)

    def _before(self, name: str) -> int:
        """Return the number of consecutive earlier logs."""
        seen = {name}
        while (name := self._logs[name].follows) in self._logs and name not in seen:
            seen.add(name)
        return len(seen)

    def _forgot(self, left: _Place, before: int) -> bool:
        return any(left[1] <= newest < before for newest in self._logs[left[0]].newest)

    def _run(self, log: _Log, body: dict[str, Any]) -> None:
        first, last = body["rows"]
        log.runs.setdefault(body["task"], []).append((body["seq"], first, last))
        if body.get("lost"):
            log.rows.setdefault(body["task"], []).append((first, last))
        columns = msgspec.convert(body["columns"], ResultColumns)
        for row, t in zip(columns.expand_rows(), columns.expand_times(), strict=True):
            self._places[body["task"]].setdefault(t, (body["log"], row))

    def _event(self, log: _Log, body: dict[str, Any]) -> None:
        evidence = body.get("evidence", {})
        if body["event"] == NEW_LOG:
            log.follows = evidence["old"]
        if body["event"] == "evicted":
            log.seqs += [(a, b) for a, b in evidence.get("seq", [])]
            # Used readings have results, or their messages are declared lost.
            for task in [] if evidence.get("used") else evidence.get("tasks") or self._tasks:
                log.rows.setdefault(task, []).extend((a, b) for a, b in evidence.get("rows", []))
