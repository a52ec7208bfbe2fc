"""Sample requests of a task: rows that wait to be sent, in the commit that asked for them, and rows that were sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from outstation.device.samples import budget
from outstation.device.samples.budget import Reason
from outstation.device.store import task_keys
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.protocol.wire.messages import ModelRef

log = logging.getLogger("outstation.samples")

# Requests that wait, and ranges of rows that were sent, of each task.
MAX_REQUESTS, _MAX_SENT = 64, 64


class SampleRequest(msgspec.Struct, frozen=True, array_like=True):
    """Rows `first` to `last` around the result at `row`, by the bundle `model`; `begin`: first row of its window.

    Rows are cut at a distance of whole `step`s from the window, so that the same windows are cut from the sample.
    """

    reason: Reason
    subject: str
    row: int
    begin: int
    first: int
    last: int
    step: int
    model: ModelRef


class RequestQueue(msgspec.Struct, frozen=True, array_like=True):
    """Requests that wait, in order, and ranges of rows that were sent."""

    waiting: list[SampleRequest] = []
    sent: list[tuple[int, int]] = []

    def covers(self, request: SampleRequest) -> bool:
        """Return True if the window of a request lies within rows that were sent."""
        return any(first <= request.begin and request.row <= last for first, last in self.sent)


def load(store: Store, task: str) -> RequestQueue:
    """Return a task's queue; one that cannot be read is empty. Raises StorageError."""
    return _decode(store.load_state(task, task_keys.SAMPLE_REQUESTS), task)


def add(tx: Transaction, task: str, requests: Sequence[SampleRequest]) -> None:
    """Add requests in the caller's transaction.

    One about a result that was sent, or waits, is counted as covered. Above the limit, the oldest about uncertain
    results go first, and are counted.
    """
    queue = _decode(tx.load_state(task, task_keys.SAMPLE_REQUESTS), task)
    waiting = list(queue.waiting)
    for request in requests:
        if queue.covers(request) or any(request.row == other.row for other in waiting):
            count_covered(tx)
        else:
            waiting.append(request)
    while len(waiting) > MAX_REQUESTS:
        waiting.remove(next((request for request in waiting if request.reason == "uncertain"), waiting[0]))
        budget.count_drop(tx, "queue")
    _save(tx, task, RequestQueue(waiting, queue.sent))


def count_covered(tx: Transaction) -> None:
    tx.increment_counter(budget.COVERED, 1)


def finish(tx: Transaction, task: str, request: SampleRequest, sent: tuple[int, int] | None) -> None:
    """Remove a request that is answered; `sent`: the rows that were sent."""
    queue = _decode(tx.load_state(task, task_keys.SAMPLE_REQUESTS), task)
    ranges = [*queue.sent, *([] if sent is None else [sent])][-_MAX_SENT:]
    _save(tx, task, RequestQueue([other for other in queue.waiting if other != request], ranges))


def _decode(stored: bytes | None, task: str) -> RequestQueue:
    try:
        return RequestQueue() if stored is None else decoders.from_msgpack(stored, RequestQueue)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        log.error("task %s: its sample requests cannot be read, so they are dropped", task)
        return RequestQueue()


def _save(tx: Transaction, task: str, queue: RequestQueue) -> None:
    tx.save_state(task, task_keys.SAMPLE_REQUESTS, msgspec.msgpack.encode(queue))
