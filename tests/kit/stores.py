"""A small device store with everything in it, and what a device would say of it, for tests that damage it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from agent import clock
from agent.config import Field, Stream
from agent.device.recovery.report_findings import settle
from agent.device.store.checked import COLUMNS
from agent.device.store.damaged_messages import declare_damaged
from agent.device.store.message_log import Author
from agent.device.store.retention import Acknowledged
from agent.device.store.rows import Rows
from agent.device.store.store import Store
from agent.device.store.transaction import Pending
from tests.kit.senders import new_key

KEY = new_key(7)
NUMBERS = Stream(fields=[Field(name="n", type="i64"), Field(name="mode", type="category")])
STREAMS = {"numbers": NUMBERS, "others": NUMBERS}
TASKS = {"numbers": ["judge"]}
MODES = ("low", "high")


def opened(folder: Path, **options: Any) -> tuple[Store, Author]:
    """The store and its author, as the daemon opens them."""
    store = Store(folder, **options)
    store.claim("acme", "pi-07")
    store.declare(STREAMS)
    author = Author("acme", "pi-07", KEY, store.log_id, store.boot, 120_000)
    settle(store, author, TASKS, clock.read())
    return store, author


def append(store: Store, stream: str, n: int) -> None:
    """The next `n` rows: their value is their number."""
    first = store.last_row(stream) + 1
    values = np.arange(first, first + n, dtype=np.int64)
    with store.transaction() as tx:
        codes = tx.category_codes(stream, "mode", [MODES[int(v) % 2] for v in values])
        tx.append(stream, Rows(values * 1000, (values, np.array(codes, np.uint16))), "synced")


def say(store: Store, author: Author, text: str, rows: tuple[int, int] | None = None) -> int:
    """A message of the log; with `rows`, the task consumed them in the same transaction."""
    with store.transaction() as tx:
        if rows:
            tx.advance("judge", *rows)
        body = {"event": "said", "summary": text, "evidence": {"rows": rows}}
        return author.write(tx, "audit", None, body, clock.read())


def filled(folder: Path, chunks: int = 40, messages: int = 30, acknowledged: int = 8) -> tuple[Store, Author]:
    """Rows of 10 to a chunk in both streams, messages of which the first were acknowledged."""
    store, author = opened(folder)
    for number in range(chunks):
        append(store, "numbers", 10)
        if number % 3 == 0:
            append(store, "others", 10)
    for number in range(1, messages + 1):
        say(store, author, f"message {number} " + "x" * 200, (5 * number - 4, 5 * number))
    with store.transaction() as tx:
        tx.outbox.set_acknowledged(Acknowledged(acknowledged))
        tx.keep("judge", "drift", b"state")
        tx.set_mark("files", "a.csv", 17)
    return store, author


def pulled(folder: Path, to: Path, store: Store | None = None, *, emptied: bool = False) -> Path:
    """A copy of the files in `folder` as a power cut would leave them; `emptied`: with the log in the database."""
    if emptied and store is not None:
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("outstation.db-shm", "lock"):
            shutil.copyfile(path, to / path.name)
    return to


def served(store: Store, stream: str = "numbers") -> dict[int, int]:
    """Row number → value of everything that can be taken."""
    found: dict[int, int] = {}
    after = store.first_row(stream) - 1
    while (batch := store.take(stream, NUMBERS.fields, after, 1000)) is not None:
        if not batch.lost:
            values = batch.rows.columns[0].tolist()
            assert not found.keys() & range(batch.first, batch.first + len(values)), "a row is served twice"
            found.update(zip(range(batch.first, batch.first + len(values)), values, strict=True))
        after = batch.last
    return found


def said(store: Store) -> dict[int, dict[str, Any]]:
    """Seq → payload of everything in the outbox, acknowledged or not, with its CRC right."""
    found = [Pending.stored(row) for row in store._all(f"SELECT {COLUMNS} FROM outbox ORDER BY seq")]
    return {message.seq: json.loads(message.payload) for message in found if message.intact}


def put_aside(store: Store, author: Author) -> list[int]:
    """What a session does with messages that are not what was written."""
    damaged = [message.seq for message in store.unsent(0, 10_000) if not message.intact]
    if damaged:
        declare_damaged(store, author, damaged, clock.read())
    return damaged


def declared(messages: dict[int, dict[str, Any]], name: str, stream: str | None = None) -> set[int]:
    """Numbers that "evicted" messages list as `name` (seq or rows)."""
    found: set[int] = set()
    for body in messages.values():
        evidence = body.get("evidence", {})
        if body.get("event") == "evicted" and evidence.get("stream") == stream:
            for first, last in evidence.get(name, []):
                found |= set(range(first, last + 1))
    return found


def alarms(messages: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [body for body in messages.values() if body["kind"] == "alerts"]
