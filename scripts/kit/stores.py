"""Small, complete device store and the messages about it, for tests that damage it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from outstation.device.capacity.eviction import quarantine_damaged
from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.recovery.open import open_store
from outstation.device.recovery.report_findings import report_findings
from outstation.device.store.message_log import MessageLog
from outstation.device.store.outbox import MESSAGE_COLUMNS, OutboxMessage
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.rows import Rows
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.workbench.testing.messages import new_key

KEY = new_key(7)
NUMBERS = StreamConfig(fields=[FieldConfig(name="n", type="i64"), FieldConfig(name="mode", type="category")])
STREAMS = {"numbers": NUMBERS, "others": NUMBERS}
TASKS = {"numbers": ["judge"]}
MODES = ("low", "high")


def opened(folder: Path, **options: Any) -> tuple[Store, MessageLog]:
    """Open the store and its message log as the daemon does."""
    store = open_store(folder, **options)
    store.bind_device("acme", "pi-07")
    store.declare_streams(STREAMS)
    author = MessageLog("acme", "pi-07", KEY, store.log_id, store.boot, 120_000)
    report_findings(store, author, TASKS, clock.read())
    return store, author


def append(store: Store, stream: str, n: int, *, small: bool = False) -> None:
    """Append the next `n` rows; their value is their number. `small`: as a commit for the journal."""
    first = store.last_row(stream) + 1
    values = np.arange(first, first + n, dtype=np.int64)
    with store.transaction(small=small) as tx:
        codes = tx.assign_category_codes(stream, "mode", [MODES[int(v) % 2] for v in values], limit=1000, last_row=0)[0]
        tx.append(stream, Rows(values * 1000, (values, np.array(codes, np.uint16))), "synced")


def append_message(store: Store, author: MessageLog, text: str, rows: tuple[int, int] | None = None) -> int:
    """Append a message to the log; with `rows`, the task consumes them in the same transaction."""
    with store.transaction() as tx:
        if rows:
            tx.advance_cursor("judge", *rows)
        body = {"event": "said", "summary": text, "evidence": {"rows": rows}}
        return author.append(tx, "audit", None, body, clock.read())


def filled(folder: Path, chunks: int = 40, messages: int = 30, acknowledged: int = 8) -> tuple[Store, MessageLog]:
    """Fill both streams with rows, 10 per chunk, and the outbox with messages, the first of them acknowledged."""
    store, author = opened(folder)
    for number in range(chunks):
        append(store, "numbers", 10)
        if number % 3 == 0:
            append(store, "others", 10)
    for number in range(1, messages + 1):
        append_message(store, author, f"message {number} " + "x" * 200, (5 * number - 4, 5 * number))
    with store.transaction() as tx:
        tx.outbox.set_acknowledged(AcknowledgedSeqs(acknowledged))
        tx.save_state("judge", "drift", b"state")
        tx.set_source_position("files", "a.csv", 17)
    return store, author


def pulled(folder: Path, to: Path, store: Store | None = None, *, emptied: bool = False) -> Path:
    """Copy the files in `folder` as a power cut would leave them; with `emptied`, after a checkpoint."""
    if emptied and store is not None:
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("outstation.db-shm", "lock"):
            shutil.copyfile(path, to / path.name)
    return to


def served(store: Store, stream: str = "numbers") -> dict[int, int]:
    """Return row number → value of all readable rows."""
    counts: dict[int, int] = {}
    after = store.first_row(stream) - 1
    while (batch := store.read_rows(stream, NUMBERS.fields, after, 1000)) is not None:
        if not batch.loss_reason:
            values = batch.rows.columns[0].tolist()
            assert not counts.keys() & range(batch.first, batch.first + len(values)), "a row is served twice"
            counts.update(zip(range(batch.first, batch.first + len(values)), values, strict=True))
        after = batch.last
    return counts


def outbox_payloads(store: Store) -> dict[int, dict[str, Any]]:
    """Return seq → payload of all outbox messages with a valid CRC."""
    payloads = [
        OutboxMessage.from_row(row) for row in store._fetch_all(f"SELECT {MESSAGE_COLUMNS} FROM outbox ORDER BY seq")
    ]
    return {message.seq: json.loads(message.payload) for message in payloads if message.intact}


def put_aside(store: Store, author: MessageLog) -> list[int]:
    """Quarantine damaged messages, as an uplink session does."""
    damaged = [message.seq for message in store.unacknowledged_messages(0, 10_000) if not message.intact]
    if damaged:
        quarantine_damaged(store, author, damaged, clock.read())
    return damaged


def declared_numbers(messages: dict[int, dict[str, Any]], name: str, stream: str | None = None) -> set[int]:
    """Return the numbers that "evicted" messages list as `name` (seq or rows)."""
    numbers: set[int] = set()
    for body in messages.values():
        evidence = body.get("evidence", {})
        if body.get("event") == "evicted" and evidence.get("stream") == stream:
            for first, last in evidence.get(name, []):
                numbers |= set(range(first, last + 1))
    return numbers


def alarms(messages: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [body for body in messages.values() if body["kind"] == "alerts"]
