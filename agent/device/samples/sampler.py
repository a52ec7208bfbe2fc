"""Sampler: reads the rows of waiting requests, rounds and seals them, and appends them to the message log.

It runs between batches. The message, the budget, and the end of the request are one commit: a crash sends nothing
twice. A request whose later rows have not arrived waits for them for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np

from agent.clock import ClockReading
from agent.device.samples import budget, requests
from agent.device.samples.requests import SampleRequest
from agent.device.samples.rounding import protect_column
from agent.device.samples.selection import SampledTask
from agent.device.store.message_log import MessageLog
from agent.device.store.rows import Rows, concatenate
from agent.device.store.store import Store
from agent.errors import StorageFull
from agent.transport import sample_content, sealing
from agent.wire import messages
from agent.wire.keys import EncryptionKey, b64url_encode
from agent.wire.topics import Topic

log = logging.getLogger("outstation.samples")

_INTERVAL_S = 2.0
# Each is a commit; the rest has its turn at the next tick.
_MAX_PER_TICK = 16
# For rows after the result.
_MAX_WAIT_S = 600.0
# Members that the log adds, and the signature.
_HEAD_BYTES = 600
# More would hardly fit, and take long to compress.
_MAX_VALUES_PER_BYTE = 2


class Sampler:
    """Used on the main loop only. `find_key` returns the collectors' key in force; without one, requests wait."""

    def __init__(self, store: Store, message_log: MessageLog, find_key: Callable[[], EncryptionKey | None]) -> None:
        self._store, self._message_log, self._find_key = store, message_log, find_key
        self._next_s = float("-inf")
        self._waiting_since: dict[tuple[str, int], float] = {}

    def tick(self, tasks: Iterable[SampledTask], now: ClockReading) -> int:
        """Answer the requests that are due; return the number of messages. Raises StorageError."""
        if now.boot_s < self._next_s:
            return 0
        self._next_s = now.boot_s + _INTERVAL_S
        if (key := self._find_key()) is None:
            return 0
        sent, answered, waiting = 0, 0, {}
        for task in tasks:
            last_row = self._store.last_row(task.stream)
            waiting_requests = requests.load(self._store, task.name).waiting
            for request in sorted(waiting_requests, key=lambda request: request.reason == "uncertain"):
                place = (task.name, request.row)
                since = self._waiting_since.get(place, now.boot_s)
                if request.last > last_row and now.boot_s - since < _MAX_WAIT_S:
                    waiting[place] = since
                    continue
                if answered == _MAX_PER_TICK:
                    break
                answered += 1
                try:
                    sent += self._answer(task, request, key, now)
                except StorageFull as full:
                    log.warning("task %s: %s; its samples wait", task.name, full)
                    return sent
        self._waiting_since = waiting
        return sent

    def _answer(self, task: SampledTask, request: SampleRequest, key: EncryptionKey, now: ClockReading) -> bool:
        """Send one sample, or count why it is not sent; return True if it was. Raises StorageError."""
        if requests.load(self._store, task.name).covers(request):
            with self._store.transaction() as tx:
                requests.count_covered(tx)
                requests.finish(tx, task.name, request, None)
            return False
        first, rows = self._read_rows(task, request)
        least_count = self._message_log.least_count(task.name)
        problem = "gone" if not len(rows) else "few" if len(rows) < least_count else ""
        privacy = self._message_log.field_privacy(task.name)
        if privacy.keeps("samples") or privacy.min_results > 1 or all(map(privacy.hides_numbers, task.fields)):
            problem = "private"
        limit, size = min(task.config.max_message, self._message_log.max_bytes), 0
        body: dict[str, object] = {}
        while not problem:
            if len(rows) * len(task.fields) <= _MAX_VALUES_PER_BYTE * limit:
                body = self._build_body(task, request, key, first, rows, now)
                size = len(messages.encode(body)) + _HEAD_BYTES
                if size <= limit:
                    break
            begin, end = _shrink(request, first, len(rows))
            if end - begin == len(rows) or end - begin < least_count:
                problem = "size"
            first, rows = first + begin, rows.slice(begin, end)
        with self._store.transaction() as tx:
            if not problem:
                spent = budget.load(tx, now).spend(size, task.config.max_per_day, request.reason)
                if spent is None:
                    problem = "budget"
                else:
                    budget.save(tx, spent)
                    self._message_log.append(tx, "samples", task.name, body, now)
            if problem:
                budget.count_drop(tx, problem)
            requests.finish(tx, task.name, request, None if problem else (first, first + len(rows) - 1))
        return not problem

    def _read_rows(self, task: SampledTask, request: SampleRequest) -> tuple[int, Rows]:
        """Return the stored rows that hold the whole window without a hole, and the number of the first one."""
        at, pieces, first = request.first - 1, list[Rows](), request.first
        while at < request.last:
            piece = self._store.read_rows(task.stream, task.stream_fields, at, request.last - at)
            if piece is None:
                break
            if piece.loss_reason is None:
                pieces.append(piece.rows)
            elif piece.last < request.begin:
                # Whole steps before the window.
                first = request.begin - (request.begin - piece.last - 1) // request.step * request.step
                pieces, at = [], first - 1
                continue
            else:
                break
            at = piece.last
        count = sum(map(len, pieces))
        if first + count <= request.row:
            return first, Rows(np.zeros(0, np.int64), ())
        return first, concatenate(pieces)

    def _build_body(
        self, task: SampledTask, request: SampleRequest, key: EncryptionKey, first: int, rows: Rows, now: ClockReading
    ) -> dict[str, object]:
        names, privacy = [field.name for field in task.stream_fields], self._message_log.field_privacy(task.name)
        columns = {}
        for name in task.fields:
            column = rows.columns[names.index(name)]
            if (values := protect_column(name, column, task.config.digits, privacy, now.wall_us)) is not None:
                columns[name] = values
        content = sample_content.encode(task.config.consent, [*columns], rows.t, [*columns.values()])
        topic = str(Topic(self._message_log.fleet, self._message_log.device, "samples", task.name))
        sealed = sealing.seal_content(key, topic, content)
        return {
            "model": request.model,
            "stream": task.stream,
            "reason": request.reason,
            "subject": request.subject,
            "row": request.row,
            "rows": [first, first + len(rows) - 1],
            "n": len(rows),
            "digits": task.config.digits,
            "sealed": b64url_encode(sealed),
        }


def _shrink(request: SampleRequest, first: int, count: int) -> tuple[int, int]:
    """Return begin and end of half the steps around the window, within `count` rows from `first` on."""
    window_begin, window_end = request.begin - first, request.row + 1 - first
    before, after = window_begin // request.step // 2, (count - window_end) // request.step // 2
    return window_begin - before * request.step, window_end + after * request.step
