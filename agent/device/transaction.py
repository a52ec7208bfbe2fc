"""What can be written to the device store, inside one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from agent.device import schema
from agent.device.rows import Rows, pack

_QUALITIES = ("synced", "restored", "unsynced")
_MOST_CATEGORIES = 0xFFFF


@dataclass(frozen=True, slots=True)
class Pending:
    """One message of the outbox."""

    seq: int
    topic: str
    payload: bytes
    jws: str
    time: str


class Transaction:
    """What can be written; lives inside `Store.transaction`."""

    def __init__(self, db: sqlite3.Connection, boot: int) -> None:
        self._db, self._boot = db, boot
        self._chain: tuple[int, str] | None = None

    def declare(self, stream: str, fields: str) -> None:
        self._db.execute(
            "INSERT INTO streams (name, fields, next_row) VALUES (?, ?, 1) "
            "ON CONFLICT (name) DO UPDATE SET fields = excluded.fields",
            (stream, fields),
        )

    def append(self, stream: str, rows: Rows, quality: str) -> int:
        """Add rows to a stream as one chunk; the number of the last one."""
        stream_id, first = self._db.execute("SELECT id, next_row FROM streams WHERE name = ?", (stream,)).fetchone()
        packed = pack(rows)
        self._db.execute(
            schema.ADD_CHUNK,
            (
                *(stream_id, first, packed.n, packed.first_t, packed.time_bytes, packed.data, packed.crc),
                *(self._boot, _QUALITIES.index(quality)),
            ),
        )
        self._db.execute("UPDATE streams SET next_row = ? WHERE id = ?", (first + packed.n, stream_id))
        return int(first) + packed.n - 1

    def category_codes(self, stream: str, field: str, texts: Sequence[str]) -> list[int]:
        """The code of each text, new ones given; -1 where 65,535 texts are known and this is another one."""
        known = {
            str(value): int(code)
            for code, value in self._db.execute(
                "SELECT code, value FROM categories WHERE stream = ? AND field = ?", (stream, field)
            )
        }
        known[""] = 0
        for text in dict.fromkeys(texts):
            if text not in known and (code := len(known)) <= _MOST_CATEGORIES:
                known[text] = code
                self._db.execute("INSERT INTO categories VALUES (?, ?, ?, ?)", (stream, field, code, text))
        return [known.get(text, -1) for text in texts]

    def advance(self, task: str, first: int, last: int) -> None:
        """Move the cursor of `task` to `last`; `first` is remembered once, as where the task began."""
        self._db.execute(
            "INSERT INTO cursors (task, row, first) VALUES (?, ?, ?) "
            "ON CONFLICT (task) DO UPDATE SET row = excluded.row",
            (task, last, first),
        )

    def keep(self, task: str, name: str, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO state (task, name, value) VALUES (?, ?, ?)", (task, name, value))

    def drop(self, task: str, name: str) -> None:
        self._db.execute("DELETE FROM state WHERE task = ? AND name = ?", (task, name))

    def set_mark(self, source: str, item: str, position: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", (source, item, position))

    def drop_mark(self, source: str, item: str) -> None:
        self._db.execute("DELETE FROM marks WHERE source = ? AND item = ?", (source, item))

    def count(self, name: str, n: int) -> None:
        if n:
            self._db.execute(
                "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n", (name, n)
            )

    def raise_floor(self, wall_us: int) -> None:
        """Remember that this time has passed, on the word of someone whose clock is right."""
        self._db.execute(
            "INSERT INTO meta VALUES ('time floor', ?) ON CONFLICT (key) DO UPDATE "
            "SET value = max(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER))",
            (str(wall_us),),
        )

    def set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def chain(self) -> tuple[int, str]:
        """The last seq given and the digest of its payload; (0, "") in a new log."""
        if self._chain is None:
            found = dict(self._db.execute("SELECT key, value FROM meta WHERE key IN ('seq', 'digest')").fetchall())
            self._chain = int(found.get("seq", "0")), str(found.get("digest", ""))
        return self._chain

    def enqueue(self, message: Pending, digest: str) -> None:
        """Add the next message of the log; `digest` is of its payload."""
        self._db.execute(
            "INSERT INTO outbox VALUES (?, ?, ?, ?, ?)",
            (message.seq, message.topic, message.payload, message.jws, message.time),
        )
        self._chain = message.seq, digest

    def note_alert(self, body: str) -> None:
        """Keep an alert for local eyes; the newest thousand stay."""
        self._db.execute("INSERT INTO alerts (body) VALUES (?)", (body,))
        self._db.execute("DELETE FROM alerts WHERE rowid <= (SELECT max(rowid) FROM alerts) - 1000")

    def acknowledge(self, through: int, missing: Sequence[tuple[int, int]]) -> int:
        """Delete messages up to `through` but for `missing`; how many."""
        kept = " ".join(f"AND seq NOT BETWEEN {int(a)} AND {int(b)}" for a, b in missing)
        return self._db.execute(f"DELETE FROM outbox WHERE seq <= ? {kept}", (through,)).rowcount

    def forget(self, seqs: Sequence[int]) -> None:
        """Delete these messages."""
        self._db.executemany("DELETE FROM outbox WHERE seq = ?", ((seq,) for seq in seqs))

    def set_aside(self, stream: str, first: int, last: int) -> None:
        """Move damaged chunks out of the way of every task, bytes kept for a look."""
        values = {"stream": stream, "first": first, "last": last}
        self._db.execute(schema.SET_ASIDE, values)
        self._db.execute(schema.DROP_DAMAGED, values)

    def trim(self, stream: str, used_through: int, before_t: int, limit: int) -> int:
        """Delete up to `limit` chunks whose rows all tasks have used and that end before `before_t`; how many."""
        return self._db.execute(
            schema.TRIM, {"stream": stream, "used": used_through, "before": before_t, "limit": limit}
        ).rowcount

    def finish(self) -> None:
        if self._chain is not None:
            self.set_meta("seq", str(self._chain[0]))
            self.set_meta("digest", self._chain[1])
