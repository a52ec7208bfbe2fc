"""Sampler: reads the rows of waiting requests, rounds and seals them, and appends them to the message log.

It runs between batches. The message, the budget, and the end of the request are one commit: a crash sends nothing
twice. A request whose later rows have not arrived waits for them for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.samples import budget, joined_readings, requests
from outstation.device.samples.joined_readings import JoinedReadings
from outstation.device.samples.requests import SampleRequest
from outstation.device.samples.rounding import protect_column
from outstation.device.samples.selection import SampledTask
from outstation.device.store import predictions
from outstation.device.store.message_log import MessageLog
from outstation.device.store.rows import Rows, concatenate
from outstation.device.store.store import Store
from outstation.foundation.arrays import Ints
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.protocol.transport import sample_content, sealing
from outstation.protocol.wire import jws
from outstation.protocol.wire.keys import EncryptionKey, b64url_encode
from outstation.protocol.wire.topics import Topic

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


class _Draft(msgspec.Struct, frozen=True):
    """Message of `size` bytes with the readings of `rows`, or the `problem` why there is none."""

    problem: str
    rows: tuple[int, int] = (0, 0)
    body: dict[str, object] = {}
    size: int = 0


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
            cursor = self._store.cursor(task.name) or 0
            waiting_requests = requests.load(self._store, task.name).waiting
            for request in sorted(waiting_requests, key=lambda request: request.reason == "uncertain"):
                place = (task.name, request.row)
                since = self._waiting_since.get(place, now.boot_s)
                # Rows of joined streams are known once the windows are done.
                is_done = request.last <= last_row and (not task.joined or task.has_results(cursor, request))
                if not is_done and now.boot_s - since < _MAX_WAIT_S:
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
        problem = self._find_problem(task, rows)
        draft = _Draft(problem) if problem else self._fit(task, request, key, first, rows, now)
        problem = draft.problem
        with self._store.transaction() as tx:
            if not problem:
                spent = budget.load(tx, now).spend(draft.size, task.config.max_per_day, request.reason)
                if spent is None:
                    problem = "budget"
                else:
                    budget.save(tx, spent)
                    self._message_log.append(tx, "samples", task.name, draft.body, now)
            if problem:
                budget.count_drop(tx, problem)
            requests.finish(tx, task.name, request, None if problem else draft.rows)
        return not problem

    def _find_problem(self, task: SampledTask, rows: Rows) -> str:
        """Return why no sample of these rows may leave; "" if one may."""
        privacy = self._message_log.field_privacy(task.name)
        if privacy.keeps("samples") or privacy.min_results > 1 or all(map(privacy.hides_numbers, task.fields)):
            return "private"
        if not len(rows):
            return "gone"
        return "few" if len(rows) < self._message_log.least_count(task.name) else ""

    def _fit(
        self, task: SampledTask, request: SampleRequest, key: EncryptionKey, first: int, rows: Rows, now: ClockReading
    ) -> _Draft:
        """Build the largest message around the result that fits, with the rows that its windows were joined with."""
        least_count = self._message_log.least_count(task.name)
        limit = min(task.config.max_message, self._message_log.max_bytes)
        read = self._read_joined(task, request, first, rows, least_count)
        while True:
            ends_us = rows.t[(request.row - first) % task.step :: task.step]
            joined = {name: readings.select(ends_us, least_count) for name, readings in read.items()}
            known = {name: readings for name, readings in joined.items() if readings is not None}
            if any(0 < len(readings.t) < least_count for readings in known.values()):
                return _Draft("few")
            values = len(rows) * len(task.fields) + sum(len(each.t) * len(each.columns) for each in known.values())
            if len(known) == len(read) and values <= _MAX_VALUES_PER_BYTE * limit:
                # The receiver bounds rows and bytes of a content, too.
                with suppress(sample_content.SampleTooLarge):
                    body = self._build_body(task, request, key, first, rows, now)
                    if seals := self._seal_joined(task, key, known, now):
                        body["joined"] = seals
                    size = len(jws.encode(body)) + _HEAD_BYTES
                    if size <= limit:
                        return _Draft("", (first, first + len(rows) - 1), body, size)
            begin, end = _shrink(request, first, len(rows))
            if end - begin == len(rows) or end - begin < least_count:
                return _Draft("size" if len(known) == len(read) else "gone")
            first, rows = first + begin, rows.slice(begin, end)

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

    def _read_joined(
        self, task: SampledTask, request: SampleRequest, first: int, rows: Rows, least_count: int
    ) -> dict[str, JoinedReadings]:
        """Read the rows of further inputs, as far as they may leave."""
        privacy, result_us = self._message_log.field_privacy(task.name), int(rows.t[request.row - first])
        ends_us = rows.t[(request.row - first) % task.step :: task.step]
        batch = self._store.query(predictions.load_joined, task.name, request.row) if task.joined else {}
        read = {}
        for name, source in task.joined.items():
            stream, last = batch.get(name, (source.stream, None))
            if stream == source.stream and not all(map(privacy.hides_numbers, source.spec.fields)):
                read[name] = joined_readings.read(self._store, source, ends_us, result_us, last, least_count)
        return read

    def _seal_joined(
        self, task: SampledTask, key: EncryptionKey, joined: Mapping[str, JoinedReadings], now: ClockReading
    ) -> dict[str, dict[str, object]]:
        sealed = {}
        for name, readings in joined.items():
            if not len(readings.t):
                continue
            stored = dict(zip(readings.source.spec.fields, readings.columns, strict=True))
            sealed[name] = {
                "stream": readings.source.stream,
                "rows": readings.numbers[[0, -1]].tolist(),
                "n": len(readings.t),
                "sealed": self._seal(task, key, stored, readings.t, now, readings.numbers),
            }
        return sealed

    def _seal(
        self,
        task: SampledTask,
        key: EncryptionKey,
        stored: Mapping[str, NDArray[Any]],
        t: Ints,
        now: ClockReading,
        numbers: Ints | None = None,
    ) -> str:
        """Round the columns `stored` by field, leave out private ones, and seal them."""
        privacy, columns = self._message_log.field_privacy(task.name), {}
        for name, column in stored.items():
            if (values := protect_column(name, column, task.config.digits, privacy, now.wall_us)) is not None:
                columns[name] = values
        content = sample_content.encode(task.config.consent, [*columns], t, [*columns.values()], numbers)
        topic = str(Topic(self._message_log.fleet, self._message_log.device, "samples", task.name))
        return b64url_encode(sealing.seal_content(key, topic, content))

    def _build_body(
        self, task: SampledTask, request: SampleRequest, key: EncryptionKey, first: int, rows: Rows, now: ClockReading
    ) -> dict[str, object]:
        names = [field.name for field in task.stream_fields]
        stored = {name: rows.columns[names.index(name)] for name in task.fields}
        return {
            "model": request.model,
            "stream": task.stream,
            "reason": request.reason,
            "subject": request.subject,
            "row": request.row,
            "rows": [first, first + len(rows) - 1],
            "n": len(rows),
            "digits": task.config.digits,
            "sealed": self._seal(task, key, stored, rows.t, now),
        }


def _shrink(request: SampleRequest, first: int, count: int) -> tuple[int, int]:
    """Return begin and end of half the steps around the window, within `count` rows from `first` on."""
    window_begin, window_end = request.begin - first, request.row + 1 - first
    before, after = window_begin // request.step // 2, (count - window_end) // request.step // 2
    return window_begin - before * request.step, window_end + after * request.step
